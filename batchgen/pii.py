"""Personal data in prompts, found by Microsoft Presidio's pattern recognisers: no model, no network.

Patterns and checksums find what has a form: addresses, numbers of phones, cards and accounts. Names of people have
none; to find these takes a model, which is not here. Where Presidio's own pattern misses what real prompts hold, ours
replaces it and its checksum stays: cards in groups that any separator parts, or of Mastercard's newer range; mail
addresses with letters beyond ASCII, whose domain Presidio would look up on the web.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from batchgen.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAIL = r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_][\w-]*\w"
_CARD = r"(?<![\d.-])(?:2[2-7]|[3-6]\d)\d\d(?:[ .\n-]?\d){9,15}(?![\d-])"
# National forms of phone numbers are looked for as these write them; international ones are found anyway.
_REGIONS = ("US", "GB", "DE", "FR", "IN")
_STRICT_GROUPING = 2  # phonenumbers.Leniency
_DECIMAL = re.compile(r"\d[.,]$")
_LIKELY = 0.4  # a phone number's score; what Presidio scores lower is a guess that wants a word beside it


class Finder:
    """Finds `entities`, Presidio's names for kinds of personal data."""

    def __init__(self, entities: Sequence[str]) -> None:
        self._recognizers = [recognizer for entity in entities for recognizer in _recognizers(entity)]

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text with `<KIND>` where personal data was, and how often each kind was."""
        spans = [
            (found.start, found.end, found.entity_type, found.score)
            for recognizer in self._recognizers
            for found in recognizer.analyze(text, recognizer.supported_entities, None) or ()
            if found.score >= _LIKELY
        ]
        taken: list[tuple[int, int, str]] = []
        for start, end, kind, _ in sorted(spans, key=lambda span: (-span[3], span[0] - span[1], span[0])):
            if all(end <= other[0] or other[1] <= start for other in taken):
                taken.append((start, end, kind))
        pieces, at = [], 0
        for start, end, kind in sorted(taken):
            pieces += [text[at:start], f"<{kind}>"]
            at = end
        return "".join([*pieces, text[at:]]), Counter(kind for _, _, kind in taken)


def _recognizers(entity: str) -> list[Any]:
    """What finds one kind.

    Raises:
        SpecError: Presidio is not installed.
    """
    try:
        from presidio_analyzer import Pattern, PatternRecognizer, predefined_recognizers
    except ImportError as error:
        raise SpecError("screen.pii: needs Presidio: pip install 'batchgen[pii]'") from error

    if entity == "EMAIL_ADDRESS":
        return [PatternRecognizer(entity, patterns=[Pattern("mail", _MAIL, 1.0)])]
    if entity == "CREDIT_CARD":
        separators = [("-", ""), (" ", ""), (".", ""), ("\n", "")]
        patterns = [Pattern("card", _CARD, 0.3)]  # 1.0 if Luhn's checksum holds
        return [predefined_recognizers.CreditCardRecognizer(patterns, replacement_pairs=separators)]
    if entity == "IBAN_CODE":
        return [predefined_recognizers.IbanRecognizer()]
    if entity == "IP_ADDRESS":
        return [predefined_recognizers.IpRecognizer()]

    class Phones(predefined_recognizers.PhoneRecognizer):
        """Numbers that stand alone, the lenient ones only with the code of a country."""

        def analyze(self, text: str, entities: list[str], nlp_artifacts: Any = None) -> list[Any]:
            """See Presidio."""
            found = super().analyze(text, entities, nlp_artifacts)
            starts = ("+", "00") if (self.leniency or 0) < _STRICT_GROUPING else ""
            return [
                each
                for each in found
                if text[each.start : each.end].startswith(starts)
                and not _DECIMAL.search(text[max(0, each.start - 2) : each.start])
            ]

    # Strict grouping: or any nine digits in code are a number in some country.
    return [Phones(supported_regions=_REGIONS, leniency=leniency) for leniency in (1, _STRICT_GROUPING)]

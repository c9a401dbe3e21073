"""Personal data in prompts, found by Microsoft Presidio or by Google Cloud DLP.

Presidio's patterns and checksums need no model and no network; they find what has a form: addresses, numbers of phones,
cards and accounts. Names have none, so these take a spaCy model. Where Presidio's own pattern misses what real prompts
hold, ours replaces it and its checksum stays: cards in groups that any separator parts, or of Mastercard's newer range;
mail addresses with letters beyond ASCII, whose domain Presidio would look up on the web.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from batchgen.errors import ScreenError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.spec import PiiSpec

_NO_PRESIDIO = "screen.pii: needs Presidio: pip install 'batchgen[pii]'"
_MAIL = r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_][\w-]*\w"
_CARD = r"(?<![\d.-])(?:2[2-7]|[3-6]\d)\d\d(?:[ .\n-]?\d){9,15}(?![\d-])"
# National forms of phone numbers are looked for as these write them; international ones are found anyway.
_REGIONS = ("US", "GB", "DE", "FR", "IN")
_STRICT_GROUPING = 2  # phonenumbers.Leniency
_DECIMAL = re.compile(r"\d[.,]$")
_LIKELY = 0.4  # a phone number's score; what Presidio scores lower is a guess that wants a word beside it


# What spaCy's models call persons and places is Presidio's business; these of its kinds they find.
NAMED = ("PERSON", "LOCATION")
_INFO_TYPES = {"CREDIT_CARD": "CREDIT_CARD_NUMBER", "PERSON": "PERSON_NAME"}  # DLP's names, where they differ
# DLP takes half a megabyte a request.
_REQUEST_BYTES, _REQUEST_TEXTS = 400_000, 256
_PATIENCE_S = 120.0  # no row makes a step meanwhile
# Of a text that is cut, so that nothing shorter falls between two pieces.
_SHARED = 200


class Span(NamedTuple):
    """Personal data of a `kind` at characters `start` <= i < `stop`; a higher `score` is surer."""

    start: int
    stop: int
    kind: str
    score: float

    def moved(self, by: int) -> Span:
        """The same in a longer text."""
        return self._replace(start=self.start + by, stop=self.stop + by)


class Finder(Protocol):
    """Finds personal data, best in `at_once` conversations at a time."""

    at_once: int

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """What is in each text.

        Raises:
            ScreenError: the service that is asked does not answer.
        """


def finder(spec: PiiSpec) -> Finder:
    """What a job file asks for.

    Raises:
        SpecError: Presidio, Google's client or the spaCy model is wanted and not installed.
    """
    if spec.by == "dlp":
        assert spec.project is not None, "the spec asks for it"
        return CloudDlp(spec.entities, spec.project)
    return Presidio(spec.entities, spec.model)


def masked(text: str, spans: Sequence[Span]) -> tuple[str, Counter[str]]:
    """The text with `<KIND>` where personal data was, and how often each kind was.

    Where spans overlap the surest kind counts, and what another one has beyond it is masked as well.
    """
    kinds: list[str | None] = [None] * len(text)
    for span in sorted(spans, key=lambda span: (span.score, span.stop - span.start, -span.start)):
        kinds[span.start : span.stop] = [span.kind] * (span.stop - span.start)
    pieces, count, at = [], Counter[str](), 0
    for kind, run in itertools.groupby(kinds):
        start, at = at, at + len(list(run))
        said = text[start:at]
        if kind is None or not any(sign.isalnum() for sign in said):
            pieces.append(said)
            continue
        # What is left over beside a surer one often begins or ends with a space.
        head, tail = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
        pieces.append(f"{head}<{kind}>{tail}")
        count[kind] += 1
    return "".join(pieces), count


class Presidio:
    """Presidio's recognisers of `entities`, with the spaCy model for those of `NAMED`."""

    at_once = 1

    def __init__(self, entities: Sequence[str], model: str | None = None) -> None:
        self._recognizers = [one for entity in entities if entity not in NAMED for one in _recognizers(entity)]
        self._names = tuple(entity for entity in entities if entity in NAMED)
        self._spacy = _spacy(model) if model is not None and self._names else None

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """See `Finder`."""
        return [[*self._spans(text)] for text in texts]

    def _spans(self, text: str) -> Iterator[Span]:
        asked: list[tuple[Any, Sequence[str], Any]] = [(one, one.supported_entities, None) for one in self._recognizers]
        if self._spacy is not None:
            recognizer, read = self._spacy
            asked.append((recognizer, self._names, read(text)))
        for recognizer, entities, artifacts in asked:
            for found in recognizer.analyze(text, entities, artifacts) or ():
                if found.score >= _LIKELY:
                    yield Span(found.start, found.end, found.entity_type, found.score)


class CloudDlp:
    """Google Cloud DLP (Sensitive Data Protection): `content:inspect` on tables of texts, billed to `project`.

    `client` is Google's, made at the first use with the credentials that are found where it runs.
    """

    at_once = 64

    def __init__(self, entities: Sequence[str], project: str, client: Any = None) -> None:
        try:
            from google.cloud import dlp_v2  # noqa: F401
        except ImportError as error:
            raise SpecError("screen.pii: by: dlp needs Google's client: pip install 'batchgen[dlp]'") from error
        self._kinds = {_INFO_TYPES.get(entity, entity): entity for entity in entities}
        self._parent, self._client = f"projects/{project}/locations/global", client

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """See `Finder`."""
        found: list[list[Span]] = [[] for _ in texts]
        for places, pieces in _requests(texts):
            for (number, start), spans in zip(places, self._inspected(pieces), strict=True):
                found[number] += [span.moved(start) for span in spans]
        return found

    def _inspected(self, texts: Sequence[str]) -> list[list[Span]]:
        rows = [{"values": [{"string_value": text}]} for text in texts]
        config = {"info_types": [{"name": name} for name in self._kinds], "min_likelihood": "POSSIBLE"}
        item = {"table": {"headers": [{"name": "text"}], "rows": rows}}
        result = self._ask({"parent": self._parent, "inspect_config": config, "item": item}).result
        if result.findings_truncated and len(texts) > 1:
            half = len(texts) // 2
            return self._inspected(texts[:half]) + self._inspected(texts[half:])
        if result.findings_truncated and len(texts[0]) > 4 * _SHARED:
            cut = len(texts[0]) // 2
            first, second = self._inspected([texts[0][: cut + _SHARED]])[0], self._inspected([texts[0][cut:]])[0]
            return [[*first, *(span.moved(cut) for span in second)]]
        spans: list[list[Span]] = [[] for _ in texts]
        for finding in result.findings:
            [place], found = finding.location.content_locations, finding.location.codepoint_range
            row = place.record_location.table_location.row_index
            spans[row].append(Span(found.start, found.end, self._kinds[finding.info_type.name], finding.likelihood))
        return spans

    def _ask(self, request: dict[str, Any]) -> Any:
        from google.api_core import exceptions, retry
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import dlp_v2

        passing = (exceptions.TooManyRequests, exceptions.ServerError)
        again = retry.Retry(retry.if_exception_type(*passing), initial=0.5, maximum=20.0, timeout=_PATIENCE_S)
        try:
            self._client = self._client or dlp_v2.DlpServiceClient()
            return self._client.inspect_content(request=request, retry=again)
        except (exceptions.GoogleAPIError, GoogleAuthError) as error:
            why = str(error).strip().partition("\n")[0][:300]
            raise ScreenError(f"screen.pii: Google Cloud DLP cannot be asked for {self._parent}: {why}") from error


def _requests(texts: Sequence[str]) -> Iterator[tuple[list[tuple[int, int]], list[str]]]:
    """The texts in portions that DLP takes, each piece with the number of its text and where in it it begins."""
    places: list[tuple[int, int]] = []
    pieces: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            stop = min(start + _REQUEST_BYTES // 4, len(text))  # a character has at most four bytes
            if pieces and (size + stop - start > _REQUEST_BYTES // 4 or len(pieces) == _REQUEST_TEXTS):
                yield places, pieces
                places, pieces, size = [], [], 0
            places.append((number, start))
            pieces.append(text[start:stop])
            size, start = size + stop - start, stop if stop == len(text) else stop - _SHARED
    if pieces:
        yield places, pieces


def _spacy(model: str) -> tuple[Any, Callable[[str], Any]]:
    """What finds names in what the model read, and what reads a text.

    Raises:
        SpecError: Presidio or the model is not installed.
    """
    try:
        import spacy
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError as error:
        raise SpecError(_NO_PRESIDIO) from error
    try:
        loaded = spacy.load(model)  # Presidio would fetch one that is missing
    except OSError as error:
        message = f"screen.pii.model: {model} is no spaCy model that is installed, and no folder with one"
        raise SpecError(message) from error
    loaded.max_length = 2**31
    language = str(loaded.lang)
    engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}])
    engine.nlp = {language: loaded}  # type: ignore[assignment]
    return SpacyRecognizer(supported_language=language), lambda text: engine.process_text(text, language)


def _recognizers(entity: str) -> list[Any]:
    """What finds one kind.

    Raises:
        SpecError: Presidio is not installed.
    """
    try:
        from presidio_analyzer import Pattern, PatternRecognizer, predefined_recognizers
    except ImportError as error:
        raise SpecError(_NO_PRESIDIO) from error

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

"""A job file as it is written: plain values, the line of every key, overrides, templates, and what is wrong where.

Scalars follow YAML 1.2, because YAML 1.1 reads `tree: off` as `tree: false`: only true and false are booleans, dates
stay text, `1e-3` is a number. Aliases, tags and keys given twice are refused: a line of the file means what it says.
Templates are rendered on string values after parsing, never on the text, so that what they insert cannot become YAML.
Which keys there are, and what they may be, comes as a JSON schema from `batchgen.spec`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
from typing import TYPE_CHECKING, Any, cast

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Key = tuple[str | int, ...]

_QUOTES = "a value that begins with {{ needs quotes around it"
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tag:yaml.org,2002:null": (r"(~|null|Null|NULL|)$", lambda text: None),
    "tag:yaml.org,2002:bool": (r"(true|True|TRUE|false|False|FALSE)$", lambda text: text.lower() == "true"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]{1,999}$", int),
    "tag:yaml.org,2002:float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", float),
    "tag:yaml.org,2002:str": (r"", str),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalars of YAML 1.2's core schema; nothing is ever constructed from a tag."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as PyYAML declares it


for _tag, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), None)


class _Env(dict[str, str]):
    """Environment variables for templates: `env.NAME`, or `env.get("NAME", "fallback")`."""

    def __missing__(self, name: str) -> str:
        raise jinja2.UndefinedError(f"environment variable {name} is not set")


@dataclasses.dataclass
class Document:
    """The file at `path`, read against `places` (what a schema allows); `not_offered` says why some keys are no keys.

    `lines` has None for what an override brought, `templates` the text of rendered values, `bad` the keys whose value
    has a problem.
    """

    path: str
    places: Mapping[Key, dict[str, Any]]
    not_offered: Mapping[Key, str] = dataclasses.field(default_factory=dict)
    value: Any = None
    lines: dict[Key, int | None] = dataclasses.field(default_factory=lambda: {(): 1})
    templates: dict[Key, str] = dataclasses.field(default_factory=dict)
    bad: set[Key] = dataclasses.field(default_factory=set)
    _problems: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything found wrong so far, one line each: by line of the file, then what overrides brought."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    def blame(self, key: Key, text: str, *, line: int | None = None) -> None:
        """Record a problem with the value of `key`, or with what the file has at `line`."""
        if line is None:
            self.bad.add(key)
            written = next(key[:depth] for depth in range(len(key), -1, -1) if key[:depth] in self.lines)
            line = self.lines[written]
        if line is None:
            self._add(None, f"--set {dotted(key)}: {text}")
        else:
            self._add(line, f"{self.path}:{line}: {': '.join(filter(None, (dotted(key), text)))}")

    def blame_unknown(self, key: Key) -> None:
        """Record a key that does not exist."""
        self.blame(key, self._unknown(key))

    def blame_value(self, key: Key, *, missing: bool = False) -> None:
        """Record a value of the wrong type, or out of range, or not there."""
        found = "missing" if missing else f"found {self._found(key)}"
        place = tuple(0 if isinstance(part, int) else part for part in key)
        self.blame(key, f"{found}, expected {expected(self.places[place])}")

    def _add(self, line: int | None, text: str) -> None:
        self._problems.append((line or float("inf"), " ".join(text.split())))

    def parse(self, text: str) -> None:
        """Fill `value` and `lines`; a text that is no YAML mapping is a problem, and leaves `value` what it is."""
        try:
            node = _compose(text)
        except yaml.YAMLError as error:
            line = _error_line(error, text)
            hint = f" ({_QUOTES})" if re.search(r"[:\-]\s+\{\{", text.split("\n")[line - 1]) else ""
            self.blame((), f"not valid YAML: {_reason(error)}{hint}", line=line)
            return
        self.value = self.build(node, ())
        if not isinstance(self.value, dict):
            self.blame_value(())

    def build(self, node: yaml.Node | None, key: Key) -> Any:
        """The plain value of a node (no node: None), recording the lines of all it holds."""
        self.lines.setdefault(key, node.start_mark.line + 1 if node else 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*key, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return None if node is None else _SCALARS[node.tag][1](node.value)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            child, line = (*key, key_node.value), key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.blame(key, f"found a mapping or list where a key belongs; {_QUOTES}")
            elif key_node.value in mapping:
                self.blame(child, f"given twice, first in line {self.lines[child]}", line=line)
            else:
                self.lines[child] = line
                mapping[key_node.value] = self.build(value_node, child)
        return mapping

    def override(self, overrides: Sequence[str]) -> dict[str, str]:
        """Apply each "key=value" that names a key; the others are returned, as names for templates."""
        names = {}
        for override in overrides:
            name, equals, text = override.partition("=")
            key = tuple(name.split("."))
            free = (self._at(key[:depth]).get("additionalProperties") is True for depth in range(1, len(key)))
            if not equals:
                self._add(None, f"--set {name}: found no =, expected key=value")
            elif key in self.places or any(free):
                self._override(key, text)
            elif len(key) > 1 or name == "env":
                self._add(None, f"--set {name}: {self._unknown(key)}")
            else:
                names[name] = text
        return names

    def _override(self, key: Key, text: str) -> None:
        scratch = Document(self.path, self.places)
        with contextlib.suppress(yaml.YAMLError):
            scratch.value = scratch.build(_compose(text), key)
        if not scratch.lines.get(key) or scratch.problems:
            self._add(None, f"--set {dotted(key)}: the value is not valid YAML; put quotes around text")
            return
        parent = self.value
        for part in key[:-1]:
            if parent.get(part) in (None, "auto", "off"):
                parent[part] = {}
            if not isinstance(parent[part], dict):
                return  # a problem of its own, reported where the file has it
            parent = parent[part]
        parent[key[-1]] = scratch.value
        self.lines = {known: line for known, line in self.lines.items() if known[: len(key)] != key} | {key: None}

    def render(self, names: Mapping[str, str], given: Mapping[str, str], env: Mapping[str, str]) -> None:
        """Render every string value that has a `{{`; unknown names, unset variables, unused `given` are problems."""
        sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        sandbox.globals.clear()
        self.value = self._rendered(self.value, (), sandbox, {**names, **given, "env": _Env(env)})
        used = set(re.findall(r"\w+", " ".join(self.templates.values())))
        for name in (name for name in given if name not in used):
            self._add(None, f"--set {name}: no template uses it, and it is an {self._unknown((name,))}")

    def _rendered(self, value: Any, key: Key, sandbox: jinja2.Environment, names: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return {name: self._rendered(item, (*key, name), sandbox, names) for name, item in value.items()}
        if isinstance(value, list):
            return [self._rendered(item, (*key, index), sandbox, names) for index, item in enumerate(value)]
        if not isinstance(value, str) or "{{" not in value:
            return value
        self.templates[key] = value
        try:
            return sandbox.from_string(value).render(names)
        except jinja2.TemplateSyntaxError:
            self.blame(key, "broken template; write {{ date }}, {{ env.NAME }} or another name in double braces")
        except jinja2.TemplateError as error:
            unknown = sorted(jinja2.meta.find_undeclared_variables(sandbox.parse(value)) - set(names))
            known = ", ".join(sorted((set(names) - {"env"}) | {"env.NAME"}))
            hint = "".join(f"; known: {known}; others come from --set {name}=..." for name in unknown[:1])
            self.blame(key, f"template: {error}{hint}")
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            self.blame(key, f"the template fails with {type(error).__name__}")
        return value

    def values(self) -> dict[str, Any]:
        """Every key whose value has no problem: as in the file, else its default."""
        values = {}
        for key, place in self.places.items():
            section = self.value
            for part in key[:-1]:
                section = section.get(part, {}) if isinstance(section, dict) else None
            value = section.get(key[-1], place.get("default", ...)) if key and isinstance(section, dict) else ...
            if value is not ... and not any(key[: len(bad)] == bad[: len(key)] for bad in self.bad):
                values[dotted(key)] = value
        return values

    def _at(self, key: Key) -> dict[str, Any]:
        return self.places.get(key, {})

    def _found(self, key: Key) -> str:
        """The value in a few words: templates as they are written, and nothing write-only, as either may be secret."""
        value = self.value
        for part in key:
            value = value[part]
        value = self.templates.get(key, value)
        if isinstance(value, dict | list):
            return ("a " if value else "an empty ") + ("mapping" if isinstance(value, dict) else "list")
        if any(self._at(key[:depth]).get("writeOnly") for depth in range(1, len(key) + 1)):
            return "something else"
        text = {None: "nothing", "": "empty text"}.get(value) or json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:56]} ..."

    def _unknown(self, key: Key) -> str:
        """That there is no such key, and where it most likely belongs."""
        if key in self.not_offered:
            return self.not_offered[key]
        name, known = str(key[-1]), [other for other in self.places if other and isinstance(other[-1], str)]
        homes = [other[:-1] for other in known if other[-1] == name]
        if homes:
            shortest = [home for home in homes if len(home) == min(map(len, homes))]
            where = " or ".join(dotted(home) or "the top level" for home in shortest)
            return f"unknown key; {name} belongs under {where}"
        here = [other for other in known if other[:-1] == key[:-1]]
        for choice in ({str(other[-1]): other for other in others} for others in (here, known)):
            for match in difflib.get_close_matches(name, choice, n=1):
                return f"unknown key; did you mean {dotted(choice[match])}?"
        return "unknown key; valid: " + ", ".join(
            str(other[-1]) for other in here or known if other[:-1] in ((), key[:-1])
        )


def dotted(key: Key) -> str:
    """`key` as people write it: `sampling.stop[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def places(schema: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Every place of a (not recursive) JSON schema with what may be there; item 0 of a list stands for all items."""

    def walk(node: dict[str, Any], key: Key) -> Iterator[tuple[Key, dict[str, Any]]]:
        node = resolved(node)
        yield key, node
        for choice in map(resolved, _choices(node)):
            for name, child in choice.get("properties", {}).items():
                yield from walk(child, (*key, name))
            for name in choice.get("propertyNames", {}).get("enum", ()):
                yield (*key, name), choice["additionalProperties"]
            if "items" in choice:
                yield from walk(choice["items"], (*key, 0))

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        node = {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node} if "$ref" in node else node
        return node | {name: list(map(resolved, node[name])) for name in ("oneOf", "anyOf") if name in node}

    return walk(schema, ())


def _choices(node: dict[str, Any]) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = node.get("oneOf") or node.get("anyOf") or [node]
    return choices


def expected(node: dict[str, Any]) -> str:
    """What a place of a JSON schema allows, in words."""
    *most, last = (word for choice in _choices(node) for word in _words(choice))
    return f"{', '.join(most)} or {last}" if most else last


def _words(node: dict[str, Any]) -> list[str]:
    if "enum" in node or "const" in node:
        return [str(value) for value in node.get("enum", [node.get("const")])]
    if node.get("minItems"):
        return ["a list that is not empty"]
    if node["type"] not in {"integer", "number"}:
        words = {"boolean": "true or false", "string": "text", "array": "a list", "object": "a mapping", "null": "null"}
        return [" of ".join(filter(None, (words[node["type"]], ", ".join(node.get("properties", ())))))]
    noun = "a whole number" if node["type"] == "integer" else "a number"
    low, above, high = node.get("minimum"), node.get("exclusiveMinimum"), node.get("maximum")
    if low is not None and high is not None:
        return [f"{noun} from {low} to {high}" if low < high else str(low)]
    bounds = {"of at least": low, "above": above, "up to": high}
    return [f"{noun} " + " and ".join(f"{text} {bound}" for text, bound in bounds.items() if bound is not None)]


def _compose(text: str) -> yaml.Node | None:
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            mark = cast("yaml.Mark", event.start_mark)
            raise yaml.MarkedYAMLError(problem="aliases and tags (*name, !name) are not supported", problem_mark=mark)
    return yaml.compose(text, Loader=_Loader)


def _reason(error: yaml.YAMLError) -> str:
    told = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    return ", ".join(filter(None, told)) or str(error)


def _error_line(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    return int(min(line, text.count("\n"))) + 1

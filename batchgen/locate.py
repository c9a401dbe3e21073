"""A job file as it is written: plain values, the line of every key, overrides, templates, and what is wrong where.

Scalars follow YAML 1.2, because YAML 1.1 reads `tree: off` as `tree: false`: only true and false are booleans, dates
stay text, `1e-3` is a number. Aliases, tags and keys given twice are refused: a line of the file means what it says.
Templates are rendered on string values after parsing, never on the text, so that what they insert cannot become YAML.
Nothing here knows which keys a job has: that is `batchgen.spec`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, cast

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Key = tuple[str | int, ...]

_QUOTES = "a value that begins with {{ needs quotes around it"
_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:str": str,
}


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalars of YAML 1.2's core schema; nothing is ever constructed from a tag."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as PyYAML declares it


for _tag, _pattern in (
    ("null", r"(~|null|Null|NULL|)$"),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$"),
    ("int", r"[-+]?[0-9]{1,999}$"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


class _Env(dict[str, str]):
    """Environment variables for templates: `env.NAME`, or `env.get("NAME", "fallback")`."""

    def __missing__(self, name: str) -> str:
        raise jinja2.UndefinedError(f"environment variable {name} is not set")


@dataclasses.dataclass
class Document:
    """The file at `path`; `lines` has None for what an override brought, `templates` the text of rendered values."""

    path: str
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
        self._add(line, (f"{self.path}:{line}: " if line else "--set ") + ": ".join(filter(None, (dotted(key), text))))

    def blame_override(self, override: str, text: str) -> None:
        """Record a problem with the command line's `--set` itself."""
        self._add(None, f"--set {override}: {text}")

    def _add(self, line: int | None, text: str) -> None:
        self._problems.append((line or float("inf"), " ".join(text.split())))

    def parse(self, text: str) -> None:
        """Fill `value` and `lines`; broken YAML is recorded as a problem and leaves `value` None."""
        try:
            node = _compose(text)
        except yaml.YAMLError as error:
            line = _error_line(error, text)
            hint = f" ({_QUOTES})" if re.search(r"[:\-]\s+\{\{", text.split("\n")[line - 1]) else ""
            self.blame((), f"not valid YAML: {_reason(error)}{hint}", line=line)
        else:
            self.value = None if node is None else self._build(node, ())

    def _build(self, node: yaml.Node, key: Key) -> Any:
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    self.blame(key, f"found a mapping or list where a key belongs; {_QUOTES}", line=line)
                elif key_node.value in mapping:
                    child = (*key, key_node.value)
                    self.blame(child, f"given twice, first in line {self.lines[child]}", line=line)
                else:
                    child = (*key, key_node.value)
                    self.lines[child] = line
                    mapping[key_node.value] = self._build(value_node, child)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*key, index)) for index, item in enumerate(node.value)]
        return _SCALARS[node.tag](node.value)

    def override(self, key: Key, value: Any) -> None:
        """Put `value` in the place of whatever the file has at `key`."""
        parent = self.value
        for part in key[:-1]:
            if parent.get(part) in (None, "auto", "off"):
                parent[part] = {}
            if not isinstance(parent[part], dict):
                return  # a problem of its own, reported where the file has it
            parent = parent[part]
        parent[key[-1]] = value
        self.lines = {known: line for known, line in self.lines.items() if known[: len(key)] != key} | {key: None}

    def render(self, names: Mapping[str, str], env: Mapping[str, str]) -> None:
        """Render every string value that has a `{{`; unknown names and unset variables are recorded as problems."""
        sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        sandbox.globals.clear()
        self.value = self._rendered(self.value, (), sandbox, dict(names) | {"env": _Env(env)})

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
            hint = "".join(f"; known are {known}, and {name} by --set {name}=..." for name in unknown[:1])
            self.blame(key, f"template: {error}{hint}")
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            self.blame(key, f"the template fails with {type(error).__name__}")
        return value


def dotted(key: Key) -> str:
    """`key` as people write it: `sampling.stop[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _compose(text: str) -> yaml.Node | None:
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            mark = cast("yaml.Mark", event.start_mark)
            raise yaml.MarkedYAMLError(problem="aliases and tags (*name, !name) are not supported", problem_mark=mark)
    return yaml.compose(text, Loader=_Loader)


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def _error_line(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    return int(min(line, text.count("\n"))) + 1

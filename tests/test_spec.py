from __future__ import annotations

import json
import re
import string
import tempfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchgen import spec
from batchgen.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/spec_errors.txt"
BASE = {
    "input": "input: {path: in/*.parquet, messages: m}\n",
    "model": "model: {target: t}\n",
    "output": "output: {path: out}\n",
}
quick = settings(max_examples=60)


def load(text: str, *overrides: str, env: dict[str, str] | None = None, now: datetime | None = None) -> spec.Spec:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(text, encoding="utf-8", newline="")
        try:
            return spec.load(str(path), overrides, env=env or {}, now=now)
        except SpecError as error:
            raise SpecError(*(problem.replace(str(path), "job.yaml") for problem in error.problems)) from None


def problems(text: str, *overrides: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides, env=env)
    return list(caught.value.problems)


def filled(text: str) -> str:
    """`text` with input, model and output below it where it has none."""
    return text + "".join(line for key, line in BASE.items() if not re.search(rf"^{key}:", text, re.MULTILINE))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not key):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}".removeprefix("."))
    else:
        yield key, value


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


# --- what is said of mistakes


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.split("\n")[0]) for case in GOLDEN.read_text().split("\n## ")[1:]]
)
def test_a_mistake_gets_the_message_in_the_golden_file(case: str) -> None:
    lines = case.strip("\n").split("\n")[1:]
    job = "".join(f"{line}\n" for line in lines if not line.startswith(("--set ", "=> ", "without ")))
    if not any(line.startswith("without ") for line in lines):
        job = filled(job)
    said = problems(job, *(line.removeprefix("--set ") for line in lines if line.startswith("--set ")))
    assert said == [line.removeprefix("=> ") for line in lines if line.startswith("=> ")]


def test_all_problems_are_reported_at_once_by_line() -> None:
    said = problems(
        'name: "{{ nope }}"\ninput: {path: "in", message: m}\nmodel: {target: t, draft: 3}\n'
        "sampling:\n  n: 4\n  top_p: 2\n  n: 5\noutput: {path: in}\n",
        "workers.gpus=1",
        "engin.kind=torch",
    )
    assert [": ".join(line.split(": ")[:2]) for line in said] == [
        "job.yaml:1: name",
        "job.yaml:2: input.message",
        "job.yaml:2: input",
        "job.yaml:3: model.draft",
        "job.yaml:5: sampling.n",
        "job.yaml:6: sampling.top_p",
        "job.yaml:7: sampling.n",
        "job.yaml:8: output.path",
        "--set engin.kind: unknown key; kind belongs under engine",
        f"--set workers.gpus: {said[-1].split(': ')[1]}",
    ]


SECTIONS = {
    "input": ["path: in/*.parquet", "messages: m"],
    "input.sampling": ["seed: seed"],
    "screen": ["max_prompt_tokens: 5"],
    "model": ["target: t", "draft: d"],
    "engine": ["kind: torch"],
    "speculation": ["below_min: warn"],
    "speculation.tree": ["depth: 2"],
    "sampling": ["seed: 1"],
    "workers": ["count: 1"],
    "checkpoint": ["journal_rows: 3"],
    "output": ["path: out"],
}


def whole_job(extra: str, place: str) -> tuple[str, int]:
    """A valid job in block style but for `extra` at the end of section `place`, and the line where that is."""
    lines: list[str] = []
    if not place:
        lines.append(f"{extra}: 1")
    for section, keys in SECTIONS.items():
        indent = "  " * section.count(".")
        lines += [f"{indent}{section.split('.')[-1]}:", *(f"{indent}  {key}" for key in keys)]
        if section == place:
            lines.append(f"{indent}  {extra}: 1")
    return "\n".join(lines), next(n for n, line in enumerate(lines, 1) if line.strip() == f"{extra}: 1")


@quick
@example("on", "engine")
@example("null", "")
@given(st.text(string.ascii_lowercase + "_", min_size=1, max_size=12), st.sampled_from(["", *SECTIONS]))
def test_one_unknown_key_anywhere_is_exactly_one_problem_with_its_line(name: str, place: str) -> None:
    key = f"{place}.{name}".removeprefix(".")
    assume(key not in KEYS | {"input.sampling.n"})
    job, line = whole_job(name, place)
    (said,) = problems(job)
    assert said.startswith(f"job.yaml:{line}: {key}: unknown key; ")


@quick
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_gets_problems_of_one_line_each(text: str) -> None:
    assert all(len(line.splitlines()) == 1 for line in problems(text))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "off", "a", "{{ date }}", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "tree", "pii", "depth", "nodes", "n", "sampling", "keep"]), inner)
    ),
    max_leaves=8,
)


@quick
@given(st.dictionaries(st.sampled_from(list(spec.Spec.model_fields)), plain))
def test_any_values_get_problems_and_no_traceback(job: dict[str, Any]) -> None:
    assert problems(json.dumps(job | {"beams": 1}))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for name, why in {"none.yaml": "No such file or directory", "latin.yaml": "not UTF-8 text"}.items():
        with pytest.raises(SpecError) as caught:
            spec.load(str(tmp_path / name))
        assert caught.value.problems == (f"{tmp_path / name}: cannot be read: {why}",)


# --- what YAML means


def test_only_true_and_false_are_truth_values() -> None:
    job = load(filled("name: on\nspeculation: {tree: off}\nscreen: {dedupe: off, pii: off}\n"))
    assert (job.name, job.speculation.tree, job.screen.dedupe, job.screen.pii) == ("on", "off", "off", "off")
    assert load(filled("name: 2026-01-31\n")).name == "2026-01-31"
    assert load(filled("input: {path: in/*.parquet, prompt: no}\n")).input.prompt == "no"


def test_numbers_are_read_as_people_write_them() -> None:
    job = load(filled("sampling: {temperature: 1e-1, top_p: .5, seed: 010}\ncheckpoint: {journal_seconds: 20}\n"))
    assert (job.sampling.temperature, job.sampling.top_p, job.sampling.seed) == (0.1, 0.5, 10)
    assert isinstance(job.checkpoint.journal_seconds, float)


# --- overrides

text = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(lambda text: "{{" not in text)
SETTABLE: dict[str, st.SearchStrategy[Any]] = {
    "name": text,
    "input.id": st.none() | text,
    "input.keep": st.lists(text, unique=True),
    "input.sampling": st.dictionaries(st.sampled_from(["temperature", "top_k", "stop"]), text),
    "input.sampling.seed": text,
    "output.storage_options.deep.er": st.integers() | text | st.lists(text),
    "output.token_ids": st.booleans(),
    "model.dtype": st.sampled_from(["auto", "bfloat16", "float32", "float16"]),
    "screen.max_prompt_tokens": st.none() | st.integers(1),
    "speculation.tree": st.sampled_from(["auto", "off", {"depth": 2, "width": 2, "nodes": 5}]),
    "sampling.temperature": st.floats(0, allow_infinity=False),
    "sampling.stop": st.lists(text),
    "batch_size": st.integers(1, 1024),
}


@quick
@given(st.data(), st.sampled_from(list(SETTABLE)))
def test_any_override_comes_back_as_it_was_set(data: st.DataObject, key: str) -> None:
    value = data.draw(SETTABLE[key])
    job = load(filled("model: {target: t, draft: d}\n"), f"{key}={json.dumps(value, ensure_ascii=False)}")
    back = at(job.model_dump(), key)
    assert (list(back) if isinstance(back, tuple) else back) == value


def test_overrides_reach_what_the_file_has_not_and_replace_what_it_has() -> None:
    job = load(
        filled("sampling: {n: 2, temperature: 1}\nmodel: {target: t, draft: d}\n"),
        "sampling.n=3",
        "sampling.n=4",
        "speculation.tree=off",
        "speculation.tree.depth=5",
        "checkpoint={journal_rows: 7}",
        "model.dtype=float32",
    )
    assert (job.sampling.n, job.checkpoint.journal_rows, job.model.dtype) == (4, 7, "float32")
    assert job.speculation.tree == spec.Tree(depth=5, width=1, nodes=5)
    assert load(filled("model: {target: t, draft: d}\n"), "model.draft=null").model.draft is None


def test_an_override_repairs_a_wrong_value() -> None:
    assert load(filled("batch_size: many\n"), "batch_size=3").batch_size == 3


# --- templates


def test_templates_have_dates_variables_and_names() -> None:
    job = load(
        filled('name: "{{ env.TEAM }}-{{ run }}"\noutput: {path: "out/{{ date }}/{{ yesterday }}"}\n'),
        "run=7: x",
        env={"TEAM": "a"},
        now=datetime(2026, 3, 1, 0, 30, tzinfo=timezone(timedelta(hours=9))),
    )
    assert (job.name, job.output.path) == ("a-7: x", "out/2026-03-01/2026-02-28")


def test_a_template_without_a_clock_or_variables_takes_the_machines(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("BATCHGEN_TEST", "here")
    path = tmp_path / "job.yaml"
    path.write_text(filled('name: "{{ env.BATCHGEN_TEST }} {{ date }}"\n'))
    before = datetime.now().astimezone()
    name = spec.load(str(path)).name
    assert name in {f"here {day:%Y-%m-%d}" for day in (before, datetime.now().astimezone())}


def test_a_name_may_replace_the_date() -> None:
    job = load(filled('name: "{{ date }}"\n'), "date=2020-01-01", now=datetime(2026, 3, 1, tzinfo=UTC))
    assert job.name == "2020-01-01"


def test_what_a_template_inserts_stays_one_text() -> None:
    inserted = 'x", keep: [a]}\noutput: {path: elsewhere'
    job = load(filled('name: "{{ env.X }}"\nsampling: {stop: ["{{ env.X }}\\n"]}\n'), env={"X": inserted})
    assert (job.name, job.sampling.stop, job.output.path) == (inserted, (f"{inserted}\n",), "out")
    assert load(filled('name: "{{ env.X }}"\n'), env={"X": "{{ 1 }}"}).name == "{{ 1 }}"


def test_a_template_may_name_a_fallback() -> None:
    assert load(filled("name: a-{{ env.get('NOT_SET', 'b') }}\n")).name == "a-b"


def test_braces_that_are_no_template_stay() -> None:
    assert load(filled('sampling: {stop: ["{%", "{#", "}}"]}\n')).sampling.stop == ("{%", "{#", "}}")


# --- combinations


def test_a_slash_at_the_end_of_the_output_is_left_out() -> None:
    """A job would not find its own parts under another spelling."""
    assert [load(filled(f'output: {{path: "{path}"}}\n')).output.path for path in ("gs://b/out//", "/")] == [
        "gs://b/out",
        "/",
    ]


@pytest.mark.parametrize(
    ("path", "output", "refused"),
    [
        ("in", "in", True),
        ("in/", "in/done", True),  # folders are read whole
        ("in/*.parquet", "in", True),
        ("in/*.parquet", "./in/../in/", True),
        ("in/*.parquet", "in/done", False),  # * does not cross folders
        ("in/*/*.parquet", "in/done", True),
        ("in/**/*.parquet", "in/a/b", True),
        ("in/**/*.parquet", "in", True),
        ("in/dt=[0-9]*/*.parquet", "in/dt=1", True),
        ("in/dt=[0-9]*/*.parquet", "in/dt=out", False),
        ("in/[!o]*/*.parquet", "in/out", False),
        ("in/[z-a]/*.parquet", "in/a", False),  # matches nothing, and is no reason to stop
        ("in/prompts-*.parquet", "in", False),  # parts have another name
        ("in/prompts.parquet", "in", False),
        ("in.parquet", ".", False),
        ("in.parquet", "in.parquet/out", True),  # a folder, as Spark names them
        ("*.parquet", ".", True),
        ("gs://b/in/*.parquet", "gcs://b/in", True),
        ("gs://b/in/*.parquet", "gs://c/in", False),
        ("in/*.parquet", "gs://b/in", False),
        ("file:///data/in", "/data/in/out", True),
    ],
)
def test_an_output_that_the_input_would_find_is_refused(path: str, output: str, refused: bool) -> None:
    job = filled(f'input: {{path: "{path}", messages: m}}\noutput: {{path: "{output}"}}\n')
    if refused:
        assert [line.split(": ")[1] for line in problems(job)] == ["output.path"]
    else:
        assert load(job).output.path == output


def test_samples_may_differ_where_rows_bring_a_temperature() -> None:
    assert load(filled("sampling: {n: 4, temperature: 0.7}\n")).sampling.n == 4
    columns = "input: {path: in/*.parquet, messages: m, sampling: {temperature: t}}\n"
    assert load(filled(f"sampling: {{n: 4}}\n{columns}")).input.sampling == {"temperature": "t"}


def test_prompts_may_have_system_messages() -> None:
    job = load(filled("input: {path: in/*.parquet, prompt: p, system: s}\n"))
    assert (job.input.messages, job.input.prompt, job.input.system) == (None, "p", "s")


def test_the_rehearsal_engine_takes_options() -> None:
    assert load(filled("engine: {kind: rehearsal, options: {step_s: 1}}\n")).engine.options == {"step_s": 1}


@given(st.integers(1, 16), st.integers(1, 16))
def test_a_tree_without_nodes_gets_as_many_as_fit(depth: int, width: int) -> None:
    if (depth - 1) * width > 63:
        with pytest.raises(ValueError, match="at most 63"):
            spec.Tree(depth=depth, width=width)
        return
    nodes = spec.Tree(depth=depth, width=width).nodes
    assert nodes == min(63, depth * width)
    assert nodes == depth or width > 1


# --- the spec as an object


def test_storage_options_are_in_no_record() -> None:
    job = load(filled("output: {path: out, storage_options: {token: hunter2, a: {b: hunter2}}}\n"))
    assert job.output.storage_options == {"token": "hunter2", "a": {"b": "hunter2"}}
    assert job.model_dump(mode="json")["output"]["storage_options"] == {"token": "***", "a": "***"}
    assert "hunter2" not in job.model_dump_json() + repr(job)


def test_a_spec_cannot_be_changed() -> None:
    job = load(filled(""))
    with pytest.raises(pydantic.ValidationError):
        job.sampling.n = 2  # type: ignore[misc]


def test_what_is_recorded_is_a_valid_job_again() -> None:
    job = load(filled("speculation: {tree: {depth: 2}}\nmodel: {target: t, draft: d}\nsampling: {stop: [a]}\n"))
    assert load(json.dumps(job.model_dump(mode="json"))) == job


SCHEMA = spec.json_schema()


def test_the_schema_describes_every_key_and_closes_every_section() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"] == "batchgen job"
    for section in (SCHEMA, *SCHEMA["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, key in section["properties"].items():
            target = SCHEMA["$defs"].get(key.get("$ref", "").rpartition("/")[2], {})
            assert {**target, **key}.get("description"), name


def schema_keys(section: dict[str, Any], place: str = "") -> Iterator[str]:
    for name, key in section["properties"].items():
        yield f"{place}{name}"
        for choice in (key, *key.get("oneOf", ())):
            if "$ref" in choice:
                yield from schema_keys(SCHEMA["$defs"][choice["$ref"].rpartition("/")[2]], f"{place}{name}.")
        for column in key.get("propertyNames", {}).get("enum", ()):
            yield f"{place}{name}.{column}"


KEYS = set(schema_keys(SCHEMA))


# --- the job files that ship


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_job_file_that_ships_is_valid(path: Path) -> None:
    job = spec.load(str(path), env={"BATCHGEN_BUCKET": "bucket"}, now=datetime(2026, 3, 1, tzinfo=UTC))
    if path.name == "gcs.yaml":
        assert job.input.path == "gs://bucket/prompts/dt=2026-03-01/*.parquet"
        assert job.output.path == "gs://bucket/completions/dt=2026-03-01"


def test_the_tour_shows_every_key() -> None:
    tour = (ROOT / "jobs/spec.yaml").read_text()
    assert [key for key in KEYS if not re.search(rf"\b{key.split('.')[-1]}\b", tour)] == []
    shown = dict(leaves(load(tour).model_dump()))
    commented = {"input.prompt", "input.turns", "input.system"}
    for key in shown.keys() - commented:
        assert re.search(rf"^ *{key.split('.')[-1]}: ", tour, re.MULTILINE), key


def test_the_tour_shows_defaults() -> None:
    shown = dict(leaves(load((ROOT / "jobs/spec.yaml").read_text()).model_dump()))
    defaults = dict(leaves(load(filled("")).model_dump()))
    chosen = {key for key, value in shown.items() if value != defaults[key]}
    assert chosen == {
        *("name", "input.path", "input.messages", "input.id", "input.keep"),
        *("model.target", "model.draft", "output.path"),
    }

"""vLLM as an engine: exact counts, its own tokens, and a process that may be killed. All on real vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import polars as pl
import psutil
import pytest

from batchgen import engines, spec
from batchgen.engines.vllm import VllmEngine
from batchgen.errors import ModelError, SpecError
from batchgen.record import Sampling, Stretch
from batchgen.speculation.chain import LONGEST, ChainLengths

from .conftest import ROOT, run

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = Sampling(max_tokens=24)
HOT = Sampling(max_tokens=24, temperature=0.8, n=2, seed=3)
COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")


def counters(engine) -> list[int]:
    """vLLM's own, of drafts, drafted and accepted tokens, and of preemptions."""
    metrics = {m.name: m for m in engine._engine.get_metrics()}
    return [int(metrics[f"vllm:{name}"].value) for name in (*COUNTERS, "num_preemptions")]


def test_each_rows_counts_sum_to_vllms_own(vllm, demo):
    """Greedy and sampled, two samples a row, stop tokens and strings, chunked prompts, preemption, changing lengths.

    Sampled rows count right on a CPU, though a job that asks for them is refused.
    """
    stops = Sampling(max_tokens=40, stop=(".", "the"), stop_token_ids=(28,))
    before = counters(vllm)
    done = [*run(vllm, demo.prompts(16), GREEDY, HOT, stops).values()]
    longest = sorted(demo.prompts(80, "eagle_humaneval"), key=len)[-8:]
    done += run(vllm, longest, Sampling(max_tokens=160)).values()
    after = counters(vllm)
    rows = [c.acceptance for c in done]
    sums = [sum(getattr(row, name) for row in rows) for name in ("draft_steps", "draft_tokens", "accepted_tokens")]
    *counted, num_preempted = (b - a for a, b in zip(before, after, strict=True))
    assert sums == counted
    assert sums[2] > 50
    assert num_preempted > 0
    for c in done:
        assert c.acceptance.target_steps >= c.acceptance.draft_steps
        if stretches := c.acceptance.by_position:
            total = sum(stretches, Stretch())
            assert total[1:] == (c.acceptance.draft_steps, c.acceptance.draft_tokens, c.acceptance.accepted_tokens, 0)
        assert len(c.token_ids) <= 1 + c.acceptance.target_steps + c.acceptance.accepted_tokens


def test_stop_strings_end_a_row_where_they_end_it_on_the_torch_engine(vllm, demo):
    stops = Sampling(max_tokens=40, stop=(".", "the"))
    asked = demo.prompts(12)
    torch_engine = demo.engine("torch", "speculation.tree=off", "batch_size=8", head=False)
    expected, found = (run(engine, asked, stops) for engine in (torch_engine, vllm))
    same = [key for key in expected if expected[key].token_ids == found[key].token_ids]
    assert len(same) >= 11, "greedy in float32, up to ties"
    for key in same:
        assert found[key].text == expected[key].text
        assert found[key].finish_reason == expected[key].finish_reason
        assert not any(stop in found[key].text for stop in stops.stop)


def test_greedy_tokens_are_the_torch_engines(vllm, demo):
    asked = demo.prompts(16, "mt_bench")
    torch_engine = demo.engine("torch", "speculation.tree=off", "batch_size=8", head=False)
    expected, found = (run(engine, asked, GREEDY) for engine in (torch_engine, vllm))
    same = sum(expected[key].token_ids == found[key].token_ids for key in expected)
    assert same >= 15, f"{same} of {len(expected)}"


def test_what_pays_is_reported(vllm, demo):
    run(vllm, demo.prompts(16), Sampling(max_tokens=64))
    report = vllm.report()
    assert report["lengths"][0][0] == 1
    assert all(0 <= length <= 5 for _, _, length in report["lengths"])
    assert 0 < report["acceptance"][0] < 1
    assert report["head"]


def test_where_drafts_hardly_pay_vllm_runs_without_its_head_and_learns_on(demo, tmp_path):
    known, lengths = ChainLengths(LONGEST), tmp_path / "lengths.json"
    for length in range(LONGEST + 1):
        known.seen(4, length, 1.0 + length)
    lengths.write_text(known.as_json())
    engine = VllmEngine(
        demo.model.path,
        demo.head.path,
        decode=demo.decode,
        end_token_ids=frozenset(),
        batch_size=4,
        dtype="float32",
        device="cpu",
        options={"max_model_len": 1024},
        length=None,
        lengths=lengths,
    )
    done = run(engine, demo.prompts(4), GREEDY)
    engine.close()
    assert engine.report()["head"] is False
    assert {c.acceptance.target_steps for c in done.values()} == {23}
    assert 0 < json.loads(lengths.read_text())["sizes"]["2"]["without"] < 1.0


def test_a_prompt_that_does_not_fit_is_an_error_and_the_next_one_runs(vllm, demo):
    [prompt] = demo.prompts(1)
    done = run(vllm, [prompt * 40, prompt], GREEDY)
    assert done[0, 0, 0].finish_reason == "error"
    assert "1024" in done[0, 0, 0].error
    assert len(done[0, 1, 0].token_ids) == 24


def computing(pid: int) -> list[psutil.Process]:
    """vLLM's processes that compute, below a process; one that an earlier engine left as a zombie is passed over."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("VLLM::EngineCor") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill() -> None:
    killed = computing(os.getpid())
    for process in killed:
        process.kill()
    assert killed, "no process of vLLM's to kill"


def test_a_killed_engine_loses_no_row(vllm, demo):
    asked = demo.prompts(8)
    expected = run(vllm, asked, GREEDY)
    steps, killed, step = 0, False, vllm.step

    def watched():
        nonlocal steps, killed
        steps += 1
        if steps == 6:
            kill()
            killed = True
        return step()

    vllm.step = watched
    try:
        done = run(vllm, asked, GREEDY)
    finally:
        del vllm.step
    assert killed
    assert {c.finish_reason for c in done.values()} <= {"stop", "length"}
    assert max(c.attempts for c in done.values()) == 2
    assert sum(expected[key].token_ids == done[key].token_ids for key in done) >= len(done) - 1


@pytest.mark.slow
def test_the_row_that_kills_the_engine_is_found(demo):
    """Two rows, one of which kills vLLM's process whenever it has begun."""
    engine = demo.engine(
        "vllm", "batch_size=4", "speculation.tree=off", "engine.options.max_model_len=1024", head=False
    )
    add = engine._add

    def deadly(row):
        add(row)
        if row.request.key == (0, 1, 0):
            kill()

    engine._add = deadly
    try:
        done = run(engine, demo.prompts(2), GREEDY)
    finally:
        engine.close()
    assert [done[0, i, 0].finish_reason for i in range(2)] == ["length", "error"]
    assert done[0, 1, 0].error_type == "engine_died"
    assert done[0, 1, 0].attempts >= 3, "among others, alone, and alone again"


def test_sampling_beside_drafts_is_refused_where_vllm_samples_wrong_tokens(demo):
    """On a CPU vLLM 0.32 loses a greedy text at temperature 0.01, where the torch engine keeps it."""
    with pytest.raises(ModelError, match="less likely token"):
        demo.engine("vllm", "sampling.temperature=0.5")
    with pytest.raises(ModelError, match="less likely token"):
        demo.engine("vllm", "input.sampling.temperature=heat")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (["engine.options.tensor_paralel_size=2"], "did you mean tensor_parallel_size"),
        (["engine.options.max_num_seqs=2"], "say it as batch_size"),
        (["engine.options.trust_remote_code=true"], "batchgen sets it itself"),
        (["engine.options.block_size=many"], "engine.options.block_size"),
        (["engine.options.speculative_config.method=medusa"], "expected eagle3"),
        (["engine.options.speculative_config=ngram"], "expected a mapping"),
        (["engine.options.speculative_config.model=head"], "say it as model.draft"),
    ],
    ids=["a slip", "elsewhere", "ours", "a wrong type", "a method", "a word", "a head"],
)
def test_options_that_vllm_does_not_take_are_refused_by_name(demo, settings, found):
    with pytest.raises(SpecError, match=found):
        demo.engine("vllm", *settings)


def test_hidden_states_are_those_of_the_torch_engine(demo):
    """Which are transformers' (tests/test_features.py); prompts of up to 200 tokens, read 64 at a time."""
    asked = [ids + ids[:9] for ids in demo.prompts(10, "mt_bench")]
    found = {}
    for kind, options in {"torch": [], "vllm": ["engine.options.max_num_batched_tokens=64"]}.items():
        job = spec.load(str(ROOT / "jobs/quickstart.yaml"), [f"engine.kind={kind}", "model.dtype=float32", *options])
        capture = engines.capture(job, demo.model, (0, 2, 15, 30), "float32")
        found[kind] = capture.states(asked)
        capture.close()
    for ids, ours, theirs in zip(asked, found["torch"], found["vllm"], strict=True):
        assert ours.shape == theirs.shape == (len(ids), 4, 576)
        for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True):
            assert float((a - b).norm() / a.norm()) < 1e-3


def submit(out: Path, *settings: str) -> tuple[dict, pl.DataFrame]:
    """The quickstart with 12 tokens a row, by the command line: its summary and its table."""
    asked = [f"output.path={out}", "model.dtype=float32", "sampling.max_tokens=12", *settings]
    command = [sys.executable, "-m", "batchgen", "submit", "jobs/quickstart.yaml", "--json"]
    command += [part for setting in asked for part in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), pl.read_parquet(f"{out}/*.parquet")


def test_a_signal_while_vllm_starts_is_a_drain(tmp_path):
    asked = ["--set", f"output.path={tmp_path}", "--set", "engine.kind=vllm"]
    command = [sys.executable, "-m", "batchgen", "submit", "jobs/quickstart.yaml", *asked]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as driver:
        while not computing(driver.pid):
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.1)
        driver.terminate()
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == 75, said


@pytest.mark.slow
def test_a_job_on_vllm_ends_as_it_does_on_torch(tmp_path):
    ngrams = "engine.options.speculative_config"
    _, expected = submit(tmp_path / "torch", "speculation.tree=off")
    for name, settings in {
        "eagle3": ["speculation.tree.depth=3"],
        "ngram": [
            "model.draft=null",
            f"{ngrams}.method=ngram",
            f"{ngrams}.prompt_lookup_max=4",
            f"{ngrams}.num_speculative_tokens=3",
        ],
    }.items():
        summary, table = submit(tmp_path / name, "engine.kind=vllm", *settings)
        assert summary["ok"] == 64
        assert table.schema == expected.schema
        both = table.join(expected, on=["row_id", "sample"], suffix="_torch")
        assert len(both) == len(table) == len(expected) == 64
        same = both["completion_token_ids"].to_list(), both["completion_token_ids_torch"].to_list()
        assert sum(a == b for a, b in zip(*same, strict=True)) >= 62, "greedy in float32, up to ties"
        assert table["accepted_tokens"].sum() > 0
        assert set(table["engine"]) == {"vllm"}


def test_a_job_file_is_checked_without_vllm():
    code = "import sys; from batchgen import spec; spec.load('jobs/quickstart.yaml', ['engine.kind=vllm']); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('vllm' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"

"""Real vLLM, started once for nearly all tests; `nox -s vllm` installs it in an environment of its own."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from batchgen import engines, models, spec
from batchgen.record import Request

ROOT = Path(__file__).parents[3]
HEAD = ROOT / "examples/smollm2"
HERE = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HERE else ["test_*.py"]


class Demo:
    """The demo model, its tokenizer and real prompts; engines as a job file would have them."""

    def __init__(self) -> None:
        self.model = models.fetch("demo:smollm2-135m")
        self.head = models.fetch(str(HEAD))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model.path)
        self.folder = Path(tempfile.mkdtemp())
        torch.set_num_threads(2)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompts(self, num: int, name: str = "eagle_gsm8k") -> list[list[int]]:
        chats = pq.read_table(ROOT / f"examples/prompts/{name}.parquet")["messages"].to_pylist()[:num]
        return [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]

    def engine(self, kind: str, *settings: str, head: bool = True) -> Any:
        draft = [f"model.draft={HEAD}"] if head else ["model.draft=null"]
        asked = [f"engine.kind={kind}", "model.dtype=float32", *draft, *settings]
        job = spec.load(str(ROOT / "jobs/quickstart.yaml"), asked)
        return engines.build(job, self.model, self.head if head else None, self.decode, self.folder)


def run(engine: Any, prompts: list[list[int]], *samplings: Any) -> dict[tuple[int, int, int], Any]:
    """Completions by (sampling, prompt, sample)."""
    for s, sampling in enumerate(samplings):
        for i, prompt in enumerate(prompts):
            for sample in range(sampling.n):
                engine.submit(Request((s, i, sample), f"row {i}", sample, prompt, sampling))
    done: dict[tuple[int, int, int], Any] = {}
    while engine.unfinished:
        for completion in engine.step():
            assert completion.key not in done
            done[completion.key] = completion
    assert len(done) == sum(len(prompts) * sampling.n for sampling in samplings)
    return done


@pytest.fixture(scope="session")
def demo() -> Demo:
    return Demo()


@pytest.fixture(scope="session")
def vllm(demo: Demo) -> Any:
    """vLLM with the demo's head, free to choose its draft lengths; prompts are read 64 tokens at a time.

    Its KV cache holds little more than one row of the longest kind, so that of eight long ones some are preempted.
    """
    # Of half of what is free, as by default, two that start at once find less than they have counted on.
    options = (
        "gpu_memory_utilization=0.2",
        "max_num_batched_tokens=64",
        "max_model_len=1024",
        "num_gpu_blocks_override=1150",
    )
    engine = demo.engine("vllm", "batch_size=8", *(f"engine.options.{option}" for option in options))
    yield engine
    engine.close()

"""The demo model, the demo's head and real prompts, loaded once."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from batchgen import models
from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.target import Target
from batchgen.record import Completion, Request, Sampling

if TYPE_CHECKING:
    from batchgen.engines.torch.forest import Shape

ROOT = Path(__file__).parents[3]
HEAD = ROOT / "examples/smollm2"
SETS = ("mt_bench", "eagle_gsm8k", "eagle_humaneval")
GREEDY = Sampling(max_tokens=14)
SAMPLED = Sampling(temperature=0.8, top_p=0.95, max_tokens=14, seed=3)


class Bench:
    """Runs requests on fresh engines over the demo model in float32."""

    def __init__(self) -> None:
        self.path = models.fetch("demo:smollm2-135m").path
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def prompts(self, name: str, num: int) -> list[list[int]]:
        messages = pq.read_table(ROOT / f"examples/prompts/{name}.parquet")["messages"].to_pylist()[:num]
        return [self.encode(m) for m in messages]

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    @functools.cache  # noqa: B019  # lives as long as the session
    def target(self, dtype: torch.dtype) -> Target:
        return Target(self.path, dtype, torch.device("cpu"))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def engine(
        self,
        tree: Shape | None,
        batch_size: int = 64,
        head: Path = HEAD,
        kind: type = TorchEngine,
        dtype: torch.dtype = torch.float32,
        **options: int,
    ) -> TorchEngine:
        target = self.target(dtype)
        draft = Draft(head, target) if tree else None
        return kind(target, draft, decode=self.decode, batch_size=batch_size, width=tree, **options)

    def run(self, engine: TorchEngine, prompts: list[list[int]], *samplings: Sampling) -> list[Completion]:
        """Completions of every prompt under every sampling, prompts first, in order."""
        for s, sampling in enumerate(samplings):
            for i, prompt in enumerate(prompts):
                for sample in range(sampling.n):
                    engine.submit(Request((s, i, sample), str(i), sample, prompt, sampling))
        done = []
        while engine.unfinished:
            done += engine.step()
        return sorted(done, key=lambda completion: completion.key)


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="session")
def prompts(bench):
    """The 64 shortest prompts of all sets: many rows for little time."""
    everything = [prompt for name in SETS for prompt in bench.prompts(name, 80)]
    return sorted(everything, key=len)[:64]


@pytest.fixture(scope="session")
def plain(bench, prompts):
    """What plain decoding gives for every prompt, greedy and sampled."""
    return bench.run(bench.engine(None), prompts, GREEDY, SAMPLED)

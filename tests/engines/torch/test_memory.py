"""When room runs out rows wait, resume or run in smaller batches, and get the same tokens: real weights, float32."""

from __future__ import annotations

import torch

from batchgen.engines.torch.forest import Shape
from batchgen.record import Request, Sampling

from .conftest import GREEDY


def test_rows_that_gave_their_slot_up_resume_to_the_same_tokens(bench):
    """Room for 16 slots of 256 tokens, a tree's margin included, or for 8 of 512: growing, some of ten must go."""
    samplings = [Sampling(max_tokens=100), Sampling(max_tokens=100, temperature=0.8, top_p=0.95, seed=3)]
    asked = sorted((p for p in bench.prompts("eagle_gsm8k", 80) if len(p) <= 128), key=len)[-5:]
    expected = [c.token_ids for c in bench.run(bench.engine(None), asked, *samplings)]
    bound = 3 * bench.engine(Shape(3, 2, 5), 10)._slots.num_bytes(8, 150)
    engine = bench.engine(Shape(3, 2, 5), 10, memory_bytes=bound)
    done = bench.run(engine, asked, *samplings)
    assert engine._slots.num_preempted > 0
    assert [c.token_ids for c in done] == expected


def test_out_of_memory_means_smaller_batches_not_a_dead_job(bench, prompts, monkeypatch):
    engine = bench.engine(Shape(2, 1, 2), 8)
    forward = engine._target.forward

    def small(token_ids, layout, pool):
        if layout.tiles is not None and layout.tiles.blocks[-1].stop > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(token_ids, layout, pool)

    monkeypatch.setattr(engine._target, "forward", small)
    done = bench.run(engine, prompts[:8], GREEDY)
    monkeypatch.undo()
    assert [c.token_ids for c in done] == [c.token_ids for c in bench.run(bench.engine(None), prompts[:8], GREEDY)]


def test_a_row_that_no_memory_holds_is_an_error_and_the_next_one_runs(bench, prompts, monkeypatch):
    engine = bench.engine(None, 4)
    forward, size = engine._target.forward, len(prompts[0])

    def fails(token_ids, layout, pool):
        if len(token_ids) > 2 * size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(token_ids, layout, pool)

    monkeypatch.setattr(engine._target, "forward", fails)
    done = bench.run(engine, [prompts[0] * 3, prompts[0]], GREEDY)
    assert done[0].error_type == "out_of_memory"
    assert len(done[1].token_ids) > 0


def test_rows_go_on_while_a_long_prompt_is_read(bench, prompts):
    engine = bench.engine(Shape(2, 1, 2), 4, prefill_tokens=64)
    engine.submit(Request(0, "0", 0, prompts[0], Sampling(max_tokens=60)))
    while engine.reading:
        engine.step()
    engine.submit(Request(1, "1", 0, prompts[1] * 6, Sampling(max_tokens=4)))
    reading = 0
    while engine.unfinished == 2 and not engine.step() and engine.reading:
        reading += 1
    assert reading >= 5, "16 tokens of the prompt a step"
    assert engine._rows[0].num_output > reading

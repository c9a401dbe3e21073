"""Speculation, tree shape and batch size change nothing about the tokens: float32, real weights, 64 real prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchgen.engines.torch.forest import Shape
from batchgen.record import Request, Sampling, Stretch

from .conftest import GREEDY, SAMPLED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "batch_size"),
    [
        (Shape(4, 1, 4), 64),  # a chain
        (Shape(3, 3, 8), 64),  # pruned: 3 + 9 + 9 candidates, 8 kept
        (Shape(2, 4, 16), 7),  # wide, in batches that the 64 prompts do not divide into
        (Shape(3, 1, 3), 1),  # row by row
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_speculation_or_batch(bench, prompts, plain, tree, batch_size):
    engine = bench.engine(tree, batch_size)
    # A full batch has every prompt both ways of sampling; the slower small ones have half of them, in turn.
    for s, sampling in enumerate((GREEDY, SAMPLED)):
        for i, prompt in enumerate(prompts):
            if batch_size == 64 or i % 4 == s:
                engine.submit(Request((s, i, 0), str(i), 0, prompt, sampling))
    expected = {c.key: c for c in plain}
    done = []
    while engine.unfinished:
        done += engine.step()
    assert len(done) == (128 if batch_size == 64 else 32)
    assert not [c.key for c in done if c.token_ids != expected[c.key].token_ids]
    assert all(c.finish_reason == expected[c.key].finish_reason for c in done)
    assert sum(c.acceptance.accepted_tokens for c in done) > 100, "speculation did take part"


def test_greedy_tokens_are_those_of_transformers(bench, prompts, plain):
    model = AutoModelForCausalLM.from_pretrained(bench.path, dtype=torch.float32)
    for prompt, completion in list(zip(prompts, plain, strict=False))[:8]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        assert out[0, len(prompt) :].tolist() == completion.token_ids


def test_samples_of_a_row_differ_and_are_repeatable(bench, prompts):
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=16, n=2, seed=3)
    done = bench.run(bench.engine(Shape(3, 1, 3)), prompts[:8], sampling)
    first, second = done[0::2], done[1::2]
    assert sum(a.token_ids != b.token_ids for a, b in zip(first, second, strict=True)) >= 7
    again = bench.run(bench.engine(None), prompts[:8], sampling)
    assert [c.token_ids for c in again] == [c.token_ids for c in done]
    other_seed = Sampling(temperature=0.8, top_p=0.95, max_tokens=16, n=1, seed=4)
    assert [c.token_ids for c in bench.run(bench.engine(None), prompts[:8], other_seed)] != [c.token_ids for c in first]


def test_a_prompt_is_prefilled_in_chunks_to_the_same_end(bench):
    """Several passes a prompt, ending anywhere: the border of a chunk must not show in target or draft."""
    prompts = bench.prompts("eagle_gsm8k", 3)
    assert max(len(p) for p in prompts) > 3 * 37
    sampling = Sampling(max_tokens=16)
    whole = bench.run(bench.engine(Shape(3, 1, 3)), prompts, sampling)
    chunked = bench.run(bench.engine(Shape(3, 1, 3), prefill_tokens=37), prompts, sampling)
    assert [c.token_ids for c in chunked] == [c.token_ids for c in whole]
    assert [c.acceptance for c in chunked] == [c.acceptance for c in whole], "the draft saw the same features"


@pytest.mark.parametrize("tree", [None, Shape(4, 2, 8)], ids=str)
def test_counts_add_up(bench, prompts, tree):
    for c in bench.run(bench.engine(tree, 5), prompts[:6], GREEDY, SAMPLED):
        a = c.acceptance
        assert a.accepted_tokens == sum(a.accepted_per_depth)
        assert a.draft_steps <= a.target_steps
        assert sum(a.by_position, Stretch()) == (a.target_steps, a.draft_steps, a.draft_tokens, a.accepted_tokens, 0)
        assert len(a.by_position) <= (len(c.token_ids) // 32).bit_length() + 1
        # A step emits its accepted tokens and one more, unless the row ended inside the accepted path.
        assert len(c.token_ids) - 1 - a.accepted_tokens in (a.target_steps, a.target_steps - 1)
        if tree is None:
            assert (a.draft_steps, a.draft_tokens, a.accepted_per_depth) == (0, 0, [])
            assert len(c.token_ids) - 1 == a.target_steps
        else:
            assert a.accepted_per_depth == sorted(a.accepted_per_depth, reverse=True), "depth 2 implies depth 1"
            assert a.drafted_per_depth == sorted(a.drafted_per_depth, reverse=True), "depth 2 implies depth 1"
            assert all(kept <= of for kept, of in zip(a.accepted_per_depth, a.drafted_per_depth, strict=True))


def test_stop_strings_and_stop_ids_end_a_row_where_plain_decoding_meets_them(bench, prompts):
    whole = bench.run(bench.engine(None), prompts[:3], Sampling(max_tokens=30))
    for plain in whole:
        words = plain.text.split()
        stop = " ".join(words[3:5])
        for tree in (None, Shape(4, 1, 4)):
            [c] = bench.run(bench.engine(tree, 1), [prompts[plain.key[1]]], Sampling(max_tokens=30, stop=(stop, "zzz")))
            assert c.finish_reason == "stop"
            assert c.text == plain.text[: plain.text.index(stop)]
            assert c.token_ids == plain.token_ids[: len(c.token_ids)]
            shorter = bench.decode(c.token_ids[:-1])
            assert stop not in shorter, "the token that completes the stop string is the last one"
        token = plain.token_ids[5]
        [c] = bench.run(
            bench.engine(Shape(4, 1, 4), 1), [prompts[plain.key[1]]], Sampling(max_tokens=30, stop_token_ids=(token,))
        )
        assert c.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
        assert c.text == bench.decode(c.token_ids[:-1])
        assert c.finish_reason == "stop"


def test_end_of_sequence_inside_an_accepted_path_ends_the_row(bench):
    """A one-word answer: the end token is often drafted together with the word before it."""
    asked = [
        bench.encode([{"role": "user", "content": f"Answer with one word. What colour is {thing}?"}])
        for thing in ("the sky", "grass", "snow", "blood", "coal", "the sun")
    ]
    sampling = Sampling(max_tokens=64)
    plain = bench.run(bench.engine(None), asked, sampling)
    tree = bench.run(bench.engine(Shape(4, 4, 24)), asked, sampling)
    assert [c.token_ids for c in tree] == [c.token_ids for c in plain]
    ended = [c for c in tree if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids[-1] == 2 and 2 not in c.token_ids[:-1] for c in ended)
    assert not any("<|im_end|>" in c.text for c in ended)
    inside = [c for c in ended if len(c.token_ids) - 1 - c.acceptance.accepted_tokens == c.acceptance.target_steps - 1]
    assert inside, "some end token was a draft, and no bonus token followed it"


def test_max_tokens_is_never_passed_nor_drafted_past(bench, prompts):
    for num in (1, 2, 3):
        for c in bench.run(bench.engine(Shape(5, 1, 5)), prompts[:4], Sampling(max_tokens=num)):
            assert len(c.token_ids) <= num
            assert c.acceptance.draft_tokens <= max(0, num - 2)

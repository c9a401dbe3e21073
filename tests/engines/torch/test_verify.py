"""Verification is lossless: exactly, over all small trees, and statistically, through the real sampler."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from batchgen.engines.torch import verify
from batchgen.engines.torch.forest import Forest
from batchgen.record import Sampling
from batchgen_kernels.gumbel import gumbel_noise, position_words


def tree_of(parents: list[int], tokens: list[int], rows: int = 1) -> Forest:
    """Rows with one tree of the given parents (of nodes 1, 2, ...) and tokens; a root's own token never matters."""
    depths, bits = [0], [1]
    for i, parent in enumerate(parents, 1):
        depths.append(depths[parent] + 1)
        bits.append(bits[parent] | 1 << i)
    size = len(depths)
    start, row = size * np.arange(rows), np.repeat(np.arange(rows), size)
    parent = np.where(np.tile(depths, rows) == 0, -1, np.tile([0, *parents], rows) + start[row])
    token, depth, place = (np.tile(each, rows) for each in ([0, *tokens], depths, [-1, *range(size - 1)]))
    return Forest(start, row, token, depth, parent, place, np.tile(np.array(bits, np.uint64), rows))


def small_trees(vocabulary: int, nodes: int):
    """Every tree with `nodes` draft nodes whose siblings carry distinct tokens."""
    for parents in itertools.product(*(range(i + 1) for i in range(nodes))):
        for tokens in itertools.product(range(vocabulary), repeat=nodes):
            if len(set(zip(parents, tokens, strict=True))) == nodes:
                yield tree_of(list(parents), list(tokens))


def target(context: tuple[int, ...], vocabulary: int) -> list[Fraction]:
    """Some distribution that depends on the whole context, zeros included."""
    weights = [(7 * sum((i + 2) * t for i, t in enumerate(context)) + 3 * v * v + v) % 5 for v in range(vocabulary)]
    total = sum(weights)
    return [Fraction(w, total) for w in weights] if total else [Fraction(1, vocabulary)] * vocabulary


def path_to(tree: Forest, node: int) -> tuple[int, ...]:
    path: tuple[int, ...] = ()
    while node:
        path, node = (int(tree.token_N[node]), *path), int(tree.parent_N[node])
    return path


def emitted(tree: Forest, vocabulary: int) -> dict[tuple[int, ...], Fraction]:
    """The exact distribution of a step's tokens: `verify.walk` run on every sequence of draws."""
    found: dict[tuple[int, ...], Fraction] = {}
    scripts: list[tuple[list[int], Fraction]] = [([], Fraction(1))]
    while scripts:
        script, p = scripts.pop()
        asked: list[int] = []

        def pick(nodes: np.ndarray, script=script, asked=asked) -> np.ndarray:
            asked.append(int(nodes[0]))
            return np.array([script[len(asked) - 1] if len(asked) <= len(script) else -1])

        walked = verify.walk(tree, pick)
        if len(asked) > len(script):
            weights = target(path_to(tree, asked[-1]), vocabulary)
            scripts += [([*script, v], p * w) for v, w in enumerate(weights) if w]
        else:
            tokens = tuple(walked.token_RD[0, : walked.lengths()[0]].tolist())
            found[tokens] = found.get(tokens, Fraction(0)) + p
    return found


@pytest.mark.parametrize(("vocabulary", "nodes"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_a_step_emits_exactly_the_targets_own_distribution(vocabulary, nodes):
    for tree in small_trees(vocabulary, nodes):
        step = emitted(tree, vocabulary)
        assert sum(step.values()) == 1
        for tokens, p in step.items():
            plain = Fraction(1)
            for i, token in enumerate(tokens):
                plain *= target(tokens[:i], vocabulary)[token]
            assert p == plain


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=0.9, top_p=0.8),
    ],
    ids=["t1", "t0.5", "topk", "topp"],
)
def test_sampled_trees_follow_the_targets_distribution(seed, sampling):
    """Chi-square over the first two tokens of many rows. 24 tests at 1e-4 each: one false alarm in 400 suites."""
    rng = np.random.default_rng(seed)
    vocabulary, rows = 6, 4000
    table = torch.from_numpy(rng.normal(scale=1.5, size=(vocabulary + 1, vocabulary))).float()
    children = rng.permutation(vocabulary)[:3].tolist()
    trees = tree_of([0, 0, 0, 1, 1, 2], [*children, *rng.permutation(vocabulary)[:2].tolist(), 4], rows)
    context = np.where(trees.depth_N == 0, vocabulary, trees.token_N)  # a node's distribution depends on it alone
    keys = np.array([verify.noise_key(f"{seed} {row}") for row in range(rows)], np.uint64)

    def draw(at: np.ndarray, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
        draws = verify.Draws([sampling] * rows, keys, np.zeros(rows, np.int64), row, depth)
        return verify.draw(table[torch.from_numpy(at)], draws)

    walks = verify.walk(trees, lambda nodes: draw(context[nodes], trees.row_N[nodes], trees.depth_N[nodes]))
    first, second = walks.token_RD[:, 0], walks.token_RD[:, 1]
    short = np.flatnonzero(walks.lengths() < 2)
    second[short] = draw(first[short], short, np.ones_like(short))
    pairs = zip(first.tolist(), second.tolist(), strict=True)

    def p_of(logits: torch.Tensor) -> np.ndarray:
        """Temperature, top-k and top-p written out by sorting; no ties in these logits."""
        p = torch.softmax(logits.double() / sampling.temperature, 0).numpy()
        order = np.argsort(-p)[: sampling.top_k]
        before = np.cumsum(p[order] / p[order].sum()) - p[order] / p[order].sum()
        order = order[before < sampling.top_p]
        kept = np.zeros(vocabulary)
        kept[order] = p[order] / p[order].sum()
        return kept

    expected = np.outer(p_of(table[vocabulary]), np.ones(vocabulary)) * np.stack([p_of(table[v]) for v in range(6)])
    observed = np.zeros((vocabulary, vocabulary))
    for pair in pairs:
        observed[pair] += 1
    assert observed[expected == 0].sum() == 0
    cells = expected.ravel() * rows >= 5
    rest = max(1e-9, (1 - expected.ravel()[cells].sum()) * rows)
    f_obs = [*observed.ravel()[cells], rows - observed.ravel()[cells].sum()]
    f_exp = np.array([*(expected.ravel()[cells] * rows), rest])
    assert chisquare(f_obs, f_exp * (rows / f_exp.sum())).pvalue > 1e-4


def test_noise_is_standard_gumbel_and_independent_over_keys_positions_and_tokens():
    ids = torch.arange(20000)
    noise = gumbel_noise(12345, 7, ids)
    assert kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    across = torch.stack([gumbel_noise(12345, position, ids[:200]) for position in range(400)])
    assert kstest(across[:, 17].numpy(), "gumbel_r").pvalue > 1e-3
    keys = torch.stack([gumbel_noise(verify.noise_key(str(k)), 0, ids[:200]) for k in range(400)])
    assert kstest(keys[:, 3].numpy(), "gumbel_r").pvalue > 1e-3
    correlation = np.corrcoef(np.stack([noise[:-1], noise[1:]]))[0, 1]
    assert abs(correlation) < 0.03


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 300_000), min_size=1, max_size=20))
def test_noise_is_finite_and_a_function_of_its_key_alone(key, position, tokens):
    each = position_words(np.array([key, 0], np.uint64), np.array([position, 1], np.uint64))
    one_by_one = zip(position_words(key, position), position_words(0, 1), strict=True)
    assert [word.tolist() for word in each] == [list(words) for words in one_by_one]
    noise = gumbel_noise(key, position, torch.tensor(tokens))
    assert noise.isfinite().all()
    one_by_one = torch.cat([gumbel_noise(key, position, torch.tensor([token])) for token in tokens])
    assert torch.equal(noise, one_by_one)


@settings(max_examples=200)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40),
    st.floats(0.1, 3),
    st.one_of(st.none(), st.integers(1, 50)),
    st.floats(0.01, 1.0),
)
def test_survivors_are_the_smallest_likeliest_set(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    row = torch.tensor(logits)
    scaled = row[None] / temperature
    ids = (scaled[0] >= verify.thresholds(scaled, [sampling])).nonzero()[:, 0]
    outside = [i for i in range(len(logits)) if i not in ids.tolist()]
    assert not outside or row[outside].max() < row[ids].min(), "no survivor is less likely than one that fell"
    whole = torch.softmax(torch.sort(row.double() / temperature, descending=True).values[:top_k], 0)
    if top_k is None or row.unique().numel() == len(logits):  # ties at the k-th change what top-p is taken of
        kept = whole[: len(ids)]
        assert kept.sum() >= min(top_p, 1.0) - 1e-5, "what survives reaches top_p"
        above = kept[kept > kept[-1] * (1 + 1e-5)].sum()
        assert top_p == 1.0 or above < top_p + 1e-5, "and nothing less would"
    if top_k is not None:
        ties = sum(float(x) == float(row[ids].min()) for x in row[ids])
        assert len(ids) <= top_k - 1 + ties
    if top_p == 1.0 and top_k is None:
        assert len(ids) == len(logits)


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    keys, row = np.arange(50, dtype=np.uint64), np.arange(50)
    draws = verify.Draws([Sampling()] * 50, keys, 0 * row, row, 0 * row)
    assert verify.draw(logits, draws).tolist() == logits.argmax(-1).tolist()


def test_a_flat_distribution_keeps_more_than_the_first_guess():
    logits = torch.zeros(5000).index_fill_(0, torch.arange(0, 5000, 2), 0.1)
    least = verify.thresholds(logits[None], [Sampling(temperature=1.0, top_p=0.5)])
    ids = (logits >= least).nonzero()[:, 0]
    p = torch.softmax(logits.double(), 0)
    assert (ids % 2 == 0).all()
    assert len(ids) == 2500
    assert p[ids].sum() > 0.5

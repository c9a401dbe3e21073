"""Tables stay monotone whatever they are told, learn what is true, and survive a restart."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.speculation import costs
from batchgen.speculation.costs import Cost, Costs, Table


@st.composite
def tables(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 2000), min_size=1, max_size=8)))
    seconds = draw(st.lists(st.floats(1e-6, 1), min_size=len(tokens), max_size=len(tokens)))
    return Table(tokens, seconds, draw(st.sampled_from([0.0, 1e-7])))


timed = st.tuples(st.integers(0, 4000), st.integers(0, 10_000), st.floats(0, 10))


def rises(table: Table) -> bool:
    # Slopes times distances round: one part in 1e12 is no fall.
    seconds = table(np.arange(4200), 100)
    return bool((np.diff(seconds) >= -1e-12 * seconds[1:]).all()) and table(64, 200) >= table(64, 100)


@given(tables(), st.lists(timed, max_size=40))
def test_tables_rise_whatever_they_learn(table, passes):
    assert rises(table)
    for tokens, context, seconds in passes:
        table.refine(tokens, context, seconds)
    assert rises(table)
    assert table(1) > 0


@given(tables(), st.lists(timed, max_size=5), st.integers(1, 4000), st.floats(1e-6, 10))
def test_a_measurement_moves_its_prediction_toward_it(table, passes, tokens, seconds):
    for earlier in passes:
        table.refine(*earlier)
    before = table(tokens)
    table.refine(tokens, 0, seconds)
    # Never past it; a tenth of the way in log seconds at a point, less between two that are far apart in seconds.
    low, high = sorted((before, seconds))
    assert low * (1 - 1e-9) <= table(tokens) <= high * (1 + 1e-9)
    if not 0.9 < seconds / before < 1.1:
        assert abs(np.log(table(tokens) / before)) > 0.01 * min(abs(np.log(seconds / before)), np.log(3))


def test_beyond_the_last_point_the_slope_is_learned():
    table = Table([100, 200], [2.0, 3.0])
    for _ in range(200):
        table.refine(400, 0, 10.0)  # predicted 5
    assert table(400) == pytest.approx(10.0, rel=1e-3)
    assert table(200) == pytest.approx(6.0, rel=1e-3)


def test_a_table_is_linear_between_points_and_beyond_the_last():
    table = Table([2, 4, 8], [1.0, 3.0, 2.0], per_context_token=0.5)  # 2.0 is noise: the pass over 4 took 3.0
    assert table(np.array([0, 1, 2, 3, 4, 8, 9]), 4).tolist() == [0.0, 3.0, 3.0, 4.0, 5.0, 5.0, 5.0]
    assert Table([2, 4], [1.0, 3.0])(10) == 9.0
    assert Table([4], [1.0])(8) == 2.0
    assert isinstance(table(3), float)


@pytest.mark.parametrize(
    "facts",
    [([], []), ([1, 2], [1.0]), ([2, 2], [1.0, 1.0]), ([0], [1.0]), ([1], [float("nan")]), ([1], [1.0], -1.0)],
    ids=["no point", "unequal lengths", "not rising", "no tokens", "not a number", "context for free"],
)
def test_a_table_refuses_what_cannot_be(facts):
    with pytest.raises(ValueError):
        Table(*facts)


@pytest.mark.parametrize("wrong", [0.2, 5.0], ids=["measured too fast", "measured too slow"])
def test_a_table_converges_to_the_true_cost_under_noise(wrong):
    def true(num):
        return 0.01 + 0.00005 * num

    rng = np.random.default_rng(0)
    grid = [1, 64, 128, 256, 512]
    table = Table(grid, [wrong * true(num) for num in grid], 1e-9)
    for _ in range(3000):
        num = int(rng.integers(1, 700))
        hiccup = 50.0 if rng.random() < 0.01 else 1.0
        table.refine(num, 1000, true(num) * rng.lognormal(0, 0.1) * hiccup)
    num = np.arange(1, 700)
    # The median may be off by what 1 % of hiccups, each capped at 3, pull (1 %) and by leftover noise (3 %).
    assert np.abs(table(num, 1000) / true(num) - 1).max() < 0.12
    assert np.abs(table(num, 1000) / true(num) - 1).mean() < 0.04


def test_context_that_was_measured_far_too_dear_is_corrected_with_the_rest():
    """It kept promising that plain passes take ten times as long as they do."""
    table = Table([64, 128], [0.05, 0.1], per_context_token=1e-4)
    for _ in range(30):
        table.refine(64, 10_000, 0.1)
    assert table(64, 10_000) == pytest.approx(0.1, rel=0.05)
    table.scale(2.0)
    assert table(64, 10_000) == pytest.approx(0.2, rel=0.05)


def test_even_passes_that_were_slow_for_a_while_are_found_to_be_faster_again():
    """At 1 they would not be made any more, and nothing would be learned of them."""
    passes = Costs(Table([1, 8], [0.1, 0.2]), Table([1], [0.01]), Table([1], [0.01]), even=0.9)
    for _ in range(200):
        passes.refine_verify(8, 0, 1.5 * passes.verify(8), even=True)
    assert passes.even < 1.0
    for _ in range(200):
        passes.refine_verify(8, 0, 0.9 * passes.verify(8), even=True)
    assert passes.even == pytest.approx(0.9, rel=0.02)


PASSES = Costs(Table([1, 8], [0.1, 0.2], 1e-7), Table([1], [0.01]), Table([1, 2], [0.01, 0.02]))


def test_costs_come_back_as_saved_beside_those_of_whole_runs(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert costs.load_costs(folder, "key") is None
    costs.save(folder, "key", Cost(1.0, 2.0, 3))
    costs.save_costs(folder, "key", dataclasses.replace(PASSES, even=0.9))
    found = costs.load_costs(folder, "key")
    for name in ("verify", "level", "extend"):
        assert getattr(found, name)(5, 1000) == getattr(PASSES, name)(5, 1000)
    assert found.even == 0.9
    assert costs.load(folder, "key") == Cost(1.0, 2.0, 3)
    assert len(list(folder.iterdir())) == 2, "nothing temporary is left"


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", "null", '{"verify": 3}', '{"verify": {"tokens": "x", "seconds": []}}', "NaN"],
)
def test_a_damaged_file_is_no_file(tmp_path, damage):
    costs.save_costs(tmp_path, "key", PASSES)
    [file] = tmp_path.iterdir()
    file.write_text(damage)
    assert costs.load_costs(tmp_path, "key") is None
    file.write_text(json.dumps({name: {"tokens": [1], "seconds": [1]} for name in ("verify", "level", "extend")}))
    assert costs.load_costs(tmp_path, "key") is None, "even is missing"


def test_even_passes_teach_what_share_of_uneven_ones_they_take():
    """With plain passes among them that say how fast the machine is: it became 1.5 times as fast."""
    passes = Costs(Table([4, 8], [1.5, 3.0]), Table([8], [0.1]), Table([8], [0.1]), even=0.9)
    for _ in range(400):
        passes.refine_verify(4, 0, 1.0)
        passes.refine_verify(8, 0, 1.4, even=True)
    assert passes.verify(4) == pytest.approx(1.0, rel=0.02)
    assert passes.even * passes.verify(8) == pytest.approx(1.4, rel=0.02)
    assert passes.verify(8) > 1.4 / 0.9 * 1.1, "what even passes gained is not taken for uneven ones' gain"

"""What passes cost is measured, and measured again where others took the cores."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from batchgen import engines
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.measure import Clock, measure
from batchgen.speculation.costs import Costs, Table, load_costs


def test_costs_measured_here_rise_with_tokens(bench):
    target = bench.target(torch.bfloat16)
    measured, _ = measure(target, bench.engine(Shape(1, 1, 1), dtype=torch.bfloat16)._draft, 2)
    assert 0 < measured.level(1) < measured.verify(1) < measured.verify(64)
    assert measured.verify(8, context=4000) >= measured.verify(8)


@pytest.mark.parametrize(("clean", "undisturbed"), [(2 / 3, True), (0, False)], ids=["now and then", "always"])
def test_passes_that_another_process_disturbed_do_not_count(monkeypatch, clean, undisturbed):
    waited, dice = [0.0], random.Random(0)

    def run(num_ms):
        time.sleep(num_ms / 1000)
        if dice.random() >= clean:
            time.sleep(0.01)
            waited[0] += 0.01

    monkeypatch.setattr("batchgen.engines.torch.measure.waited_s", lambda: waited[0])
    clock = Clock()
    seconds = clock.seconds(run, [(1,), (2,), (3,)], lambda: None)
    assert clock.undisturbed is undisturbed
    assert (max(seconds) < 0.01) is undisturbed


def test_a_process_that_wants_the_same_core_is_noticed():
    def run():
        ends = time.process_time() + 0.03
        while time.process_time() < ends:
            pass

    cores, clock = os.sched_getaffinity(0), Clock()
    os.sched_setaffinity(0, {min(cores)})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same core
    try:
        clock.seconds(run, [()], lambda: None)
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, cores)
    assert not clock.undisturbed


@pytest.mark.parametrize("undisturbed", [True, False])
def test_costs_are_kept_if_nothing_disturbed_their_measurement(tmp_path, monkeypatch, undisturbed):
    found = Costs(*(Table([1, 9], [0.01, 0.02]) for _ in range(3)))
    monkeypatch.setattr("batchgen.engines.torch.measure.measure", lambda *_: (found, undisturbed))
    assert engines._costs(tmp_path, "key", None, None, 8) is found
    assert (load_costs(tmp_path, "key") is not None) is undisturbed


def test_measured_passes_are_like_those_of_steps(bench, monkeypatch):
    """No tree is far wider than the others, and all rows catch up on their prompts together."""
    target, draft, counts, read = bench.target(torch.float32), bench.engine(Shape(1, 1, 1))._draft, [], set()
    layout, extend = target.layout, draft.extend
    monkeypatch.setattr(target, "layout", lambda tiles, spans: counts.append(tiles.count_R) or layout(tiles, spans))

    def extending(token_ids, *rest):
        out = extend(token_ids, *rest)
        read.add((len(token_ids), len(out)))
        return out

    monkeypatch.setattr(draft, "extend", extending)
    measure(target, draft, 8)
    assert {(512, 8), (1024, 8)} <= read
    assert max(len(set(each.tolist())) for each in counts) > 2, "uneven ones are measured"
    assert all(each.max() < 2 * math.ceil(each.mean()) for each in counts)

"""Acceptance is learned from what the target said, and what is reported about it is honest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.speculation.calibration import MAX_DEPTH, Calibration

DRAFT, RANK = 0.8, -0.4
BIAS = np.array([0.3, 0.1, -0.1, -0.3, -0.5, -0.6])


def true_acceptance(logq, rank, depth):
    return 1 / (1 + np.exp(-(DRAFT * (logq - np.log(-np.expm1(logq))) + RANK * np.log1p(rank) + BIAS[depth - 1])))


def steps(num, seed=0, nodes=200, soft=False):
    """Drafted nodes of `num` steps and what a target with the true acceptance said of them."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        logq = np.log(rng.beta(1, 1, nodes).clip(1e-4, 1 - 1e-4))
        rank, depth = rng.integers(0, 4, nodes), rng.integers(1, 7, nodes)
        p = true_acceptance(logq, rank, depth)
        # Soft labels: a target probability that scatters around its mean.
        label = rng.beta(4 * p, 4 * (1 - p)) if soft else rng.random(nodes) < p
        yield logq, rank.astype(float), depth.astype(float), label.astype(float)


@pytest.mark.parametrize("soft", [False, True], ids=["accepted or not", "target probabilities"])
def test_a_logistic_model_is_recovered_from_its_samples(soft):
    calibration = Calibration()
    for step in steps(300, soft=soft):
        calibration.learn(*step)
    q, rank, depth = np.meshgrid(np.linspace(0.02, 0.98, 20), np.arange(4.0), np.arange(1, 7))
    error = calibration.acceptance(np.log(q), rank, depth) - true_acceptance(np.log(q), rank, depth)
    # Standard error at the edge of the data: sqrt(features / nodes remembered) * slope = sqrt(9 / 42000) / 4 * 2.
    assert np.abs(error).max() < 0.025
    assert np.abs(error).mean() < 0.008


def test_what_few_steps_tell_is_made_use_of_among_many_that_tell_nothing():
    """A head that was useless for long is tried now and then: that it has become right must not take for ever."""
    calibration, node = Calibration(), (np.full(8, np.log(0.8)), np.zeros(8), np.ones(8))
    for _ in range(2000):
        calibration.learn(*node, np.zeros(8))
    assert calibration.acceptance(*node)[0] < 0.05
    for step in range(3200):
        if step % 32:
            calibration.waits()
        else:
            calibration.learn(*node, np.ones(8))
    # 100 steps of 8 among what is remembered of 2,000.
    assert calibration.acceptance(*node)[0] == pytest.approx(100 / 2100, rel=0.3)


def test_the_reported_error_shrinks_and_means_meet():
    calibration = Calibration()
    errors = []
    for i, step in enumerate(steps(300)):
        calibration.learn(*step)
        if i in (0, 30, 299):
            errors.append(calibration.report()["error"])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01
    report = calibration.report()
    assert report["nodes"] == 300 * 200
    assert report["expected"] == pytest.approx(report["realised"], abs=0.01)


def test_the_report_judges_predictions_made_before_the_labels_were_seen():
    calibration, prior = Calibration(), Calibration()
    [step] = steps(1)
    calibration.learn(*step)
    predicted = prior.acceptance(*step[:3])
    assert calibration.report()["expected"] == pytest.approx(predicted.mean(), rel=1e-5)
    assert calibration.report()["realised"] == pytest.approx(step[3].mean())


def test_nothing_learned_is_nothing_reported():
    calibration = Calibration()
    calibration.learn(*np.zeros((4, 0)))
    assert calibration.report() == {"nodes": 0, "expected": 0.0, "realised": 0.0, "error": 0.0}


def test_what_changed_is_followed():
    calibration = Calibration()
    for logq, rank, depth, label in steps(200):
        calibration.learn(logq, rank, depth, label)
    before = calibration.acceptance(np.log([0.5]), np.zeros(1), np.ones(1))
    for logq, rank, depth, _ in steps(600):
        calibration.learn(logq, rank, depth, np.zeros(len(logq)))
    assert (
        calibration.acceptance(np.log([0.5]), np.zeros(1), np.ones(1)) < 0.15 * before
    )  # 0.3 if nothing were forgotten


@given(st.data())
def test_better_ranked_and_likelier_tokens_are_never_worse_whatever_was_learned(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    calibration = Calibration()
    for _ in range(data.draw(st.integers(0, 4))):
        logq = -rng.exponential(3, 50)
        perverse = data.draw(st.sampled_from([logq < -1, logq > -1, rng.random(50) < 0.5, np.ones(50), np.zeros(50)]))
        calibration.learn(logq, rng.integers(0, 20, 50) * 1.0, rng.integers(1, 12, 50) * 1.0, perverse * 1.0)
    logq, one = np.linspace(-20, 0, 50), np.ones(50)
    for depth in (1, 3, MAX_DEPTH, 20):
        a = calibration.acceptance(logq, 0 * one, depth * one)
        assert a.dtype == np.float32
        assert ((a > 0) & (a < 1)).all()
        assert (np.diff(a) >= 0).all()
        assert (np.diff(calibration.acceptance(-one, np.arange(50.0), depth * one)) <= 0).all()


def test_a_few_nodes_move_the_prior_a_little():
    calibration = Calibration()
    at = np.log([0.5]), np.zeros(1), np.ones(1)
    before = calibration.acceptance(*at)
    calibration.learn(*at, np.zeros(1))
    assert 0.9 * before < calibration.acceptance(*at) < before

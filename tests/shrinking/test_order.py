"""What the proof is asked, and in what order: by validation data alone, from the safest to the smallest."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.shrinking.order import evidence, foreseen, ordered
from steelyard.shrinking.promise import Promise

SIZES = [8 * 0.93**i for i in range(48)]
BYTES = [1000 * bits for bits in SIZES]


def test_evidence_of_right_or_wrong_never_holds_a_change_for_impossible() -> None:
    assert evidence(np.zeros(100)) == (0.0, 0.01)
    assert evidence(np.array([1.0, 0.0, 0.0, -1.0])) == (0.0, 0.75)
    assert evidence(np.array([0.5, 0.1])) == pytest.approx((0.3, 0.08))


def test_what_a_size_loses_lies_between_those_that_were_measured_and_never_falls() -> None:
    found = foreseen(SIZES, {10: (0.001, 0.01), 20: (0.02, 0.03), 15: (0.0, 0.02)})
    means = [mean for mean, _ in found]
    assert means == sorted(means)
    assert means[10] == means[15] == 0.001
    assert means[20] == 0.02
    assert 0.001 < means[17] < 0.02
    assert means[0] < 0.0001
    assert means[24] == pytest.approx(0.02 * 2 ** (SIZES[20] - SIZES[24]))


def test_steps_go_from_sure_to_hopeless_and_are_close_where_it_is_uncertain() -> None:
    promise = Promise(0.02)
    means = foreseen(SIZES, {18: (0.004, 0.012), 22: (0.012, 0.03)})
    chances = [promise.chance(*found, 1000, 1000, shares=True) for found in means]
    steps = ordered(chances, BYTES, [], [18, 22])
    assert [step.bytes for step in steps] == sorted((step.bytes for step in steps), reverse=True)
    assert steps[0].chance > 0.99
    assert steps[-1].chance < 0.2
    assert len([step for step in steps if 0.1 < step.chance < 0.95]) >= 3


def test_the_first_step_was_measured_or_is_the_largest() -> None:
    """Where every size that was measured is without loss, nobody knows of another one."""
    assert ordered([1.0] * 20 + [0.0] * 28, BYTES, [], [23])[0].index == 0
    steps = ordered([1.0] * 48, BYTES, [], [23, 30])
    assert steps[0].index == 30
    assert [step.index for step in steps] == [30, (30 + 47) // 2, 47], "a wide gap is halved"


def test_what_was_trained_stands_among_the_sizes_and_beats_those_that_risk_more_for_more_bytes() -> None:
    chances = [1.0] * 20 + [0.4] * 28
    steps = ordered(chances, BYTES, [(200.0, 0.8), (100.0, 0.005)], [19])
    assert [(step.index, step.trained) for step in steps] == [(19, False), (0, True)]


def test_the_chance_of_a_proof_is_about_how_often_it_holds() -> None:
    rng = np.random.default_rng(0)
    promise, held, foretold = Promise(0.02), [], []
    for rate in rng.uniform(0.002, 0.02, 400):
        valid, test = ((rng.random(1000) < rate).astype(float) for _ in range(2))
        foretold.append(promise.chance(*evidence(valid), 1000, 1000, shares=True))
        held.append(promise.kept(test))
    assert np.mean(held) == pytest.approx(np.mean(foretold), abs=0.06)
    low, high = np.array(foretold) < 0.2, np.array(foretold) > 0.8
    assert np.mean(np.array(held)[low]) < 0.25
    assert np.mean(np.array(held)[high]) > 0.75

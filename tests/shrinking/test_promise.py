"""A promise is broken no more often than it says, and says how many examples it would need."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from steelyard.errors import ModelError
from steelyard.shrinking.promise import Promise

RATES = [(0.001, 0), (0.006, 0), (0.02, 0), (0.05, 0), (0.01, 0.005), (0.03, 0.02), (0.06, 0.04), (0.06, 0.055)]


@pytest.mark.parametrize("examples", [50, 450, 3000])
@pytest.mark.parametrize(("lost", "gained"), RATES)
@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_the_true_loss_is_above_the_bound_no_more_often_than_said(
    examples: int, lost: float, gained: float, confidence: float
) -> None:
    draws = np.random.default_rng(0).multinomial(examples, [lost, gained, 1 - lost - gained], size=6000)
    promise = Promise(0.01, confidence)
    bound = cache(lambda a, b: promise.bound(np.repeat([1.0, -1.0, 0.0], [a, b, examples - a - b])))
    broken = np.mean([bound(int(a), int(b)) < lost - gained - 1e-12 for a, b, _ in draws])
    assert broken <= (1 - confidence) + 3 * math.sqrt(0.05 * 0.95 / 6000)


def test_the_bound_is_not_much_wider_than_need_be() -> None:
    worse = np.repeat([1.0, -1.0, 0.0], [50, 40, 9910])
    normal = 0.001 + 1.645 * math.sqrt(90) / 10_000
    assert normal < Promise(0.01).bound(worse) < normal + 0.0004
    assert Promise(0.01).bound(np.zeros(1000)) == pytest.approx(1 - 0.05 ** (1 / 1000))


def test_a_mean_of_numbers_has_the_bound_of_student() -> None:
    worse = np.array([0.1, 0.2, 0.4, 0.1])
    assert Promise(1.0).bound(worse) == pytest.approx(worse.mean() + 2.353363 * worse.std(ddof=1) / 2)


def test_the_least_tolerance_is_what_no_change_at_all_would_prove() -> None:
    for examples in (10, 450, 5000):
        least = Promise(0.5).least(examples)
        assert Promise(least * 1.0001).kept(np.zeros(examples))
        assert not Promise(least * 0.999).kept(np.zeros(examples))
    assert Promise(0.5).least(0) == math.inf


@pytest.mark.parametrize("worse", [np.zeros(100), np.repeat([1.0, -1.0, 0.0], [3, 1, 396])])
def test_needed_is_the_fewest_examples_that_would_do(worse: np.ndarray) -> None:
    promise = Promise(0.012)
    needed = promise.needed(worse)
    assert needed is not None
    assert promise.would(worse, needed)
    assert not promise.would(worse, needed - 1)


def test_no_number_of_examples_proves_what_is_not_so() -> None:
    assert Promise(0.01).needed(np.repeat([1.0, 0.0], [2, 98])) is None
    assert not Promise(0.01).would(np.zeros(1), 10**6)
    assert Promise(0.01).bound(np.zeros(0)) == math.inf


@pytest.mark.parametrize(("tolerance", "confidence"), [(0, 0.95), (-1, 0.95), (math.nan, 0.95), (0.1, 1), (0.1, 0.4)])
def test_what_is_no_promise_is_refused(tolerance: float, confidence: float) -> None:
    with pytest.raises(ModelError, match="expected"):
        Promise(tolerance, confidence)

"""Levels of a line that make up for each other: along a trellis what a search without feedback finds where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.trellis import prices_of
from steelyard.kernels import feedback, trellis


def cost(line: np.ndarray, whole: np.ndarray, mix: np.ndarray) -> float:
    """The sum of squared errors, each element as those before it moved it."""
    line, total = line.copy(), 0.0
    for i, x in enumerate(whole):
        lost = line[i] - x
        total += lost * lost
        line[i + 1 :] -= mix[i, i + 1 :] * lost
    return total


def found(line: np.ndarray, mix: np.ndarray, states: int, lagrangian: float) -> tuple[np.ndarray, float]:
    """Whole numbers of steps, and what they cost."""
    kinds, prices = prices_of(line[None], states)
    levels, given = np.empty(line.size, np.int32), (kinds[0], prices, lagrangian)
    if states == 1:
        feedback.rounded(line.copy(), mix, *given, levels)
        return levels, cost(line, levels, mix)
    path, whole = trellis.tables(states), np.empty(line.size, np.int32)
    end = feedback.survived(line.copy(), mix, *given, *path, 0, levels)
    assert trellis.placed(levels, *path, 0, whole) == end
    return whole, cost(line, whole, mix)


@pytest.mark.parametrize("states", [4, 8, 32])
def test_without_feedback_it_is_the_search_of_the_trellis(states: int) -> None:
    line = np.random.default_rng(states).normal(size=feedback.RANGE) * 4
    whole, _ = found(line, np.zeros((line.size, line.size), np.float32), states, 0.4)
    levels, other = np.empty(line.size, np.int32), np.empty(line.size, np.int32)
    kinds, prices = prices_of(line[None], states)
    path = trellis.tables(states)
    trellis.choose(line, np.ones(1), kinds[0], prices, 0.4, *path, 0, levels)
    trellis.placed(levels, *path, 0, other)
    assert whole.tolist() == other.tolist()


@pytest.mark.parametrize("size", [40, 3 * feedback.RANGE + 7])
def test_with_feedback_it_loses_a_sixth_less_than_one_state_at_as_fine_a_grid(size: int) -> None:
    random = np.random.default_rng(1)
    mix = np.triu(random.normal(size=(size, size)) * 0.7 / size**0.5, 1).astype(np.float32)
    ones, many = [], []
    for _ in range(2000 // size + 4):
        line = random.normal(size=size) * 12
        ones.append(found(line, mix, 1, 0.0)[1] / size)
        many.append(found(2 * line, mix, 8, 0.0)[1] / size / 4)  # quantizers of twice the distance, of a union as fine
    assert np.mean(ones) == pytest.approx(1 / 12, rel=0.1)
    assert np.mean(many) < 0.84 / 12


def test_all_states_at_once_find_what_each_finds_alone() -> None:
    random, states = np.random.default_rng(0), 8
    prices = np.cumsum(random.exponential(size=(2, trellis.KNOWN)), axis=1)[None]
    _, second = trellis.tables(states)
    best, least, errors = (np.empty((2, states)) for _ in range(3))
    near = [0.0, 0.5, 1 - 1e-9, 1.0, 1.5, 2.0, 3.0, feedback.FAR - 1e-9]
    for sizes in [np.full(states, x) for x in near] + list(random.random((200, states)) ** 4 * feedback.FAR):
        feedback.options(sizes, second, prices[0].reshape(-1), 0.4, best, least, errors)
        for state in range(states):
            for odd in range(2):
                alone = feedback.option(sizes[state], second[state], odd, 0, prices, 0.4)
                assert alone == (best[odd, state], least[odd, state], errors[odd, state])


def test_far_from_zero_it_goes_on_as_near_it() -> None:
    line = np.random.default_rng(1).normal(size=40) * 4
    line[::5] *= 90
    assert (np.abs(line) > feedback.FAR).sum() > 3
    mix = np.zeros((line.size, line.size), np.float32)
    whole, _ = found(line, mix, 8, 0.4)
    levels, other = np.empty(line.size, np.int32), np.empty(line.size, np.int32)
    kinds, prices = prices_of(line[None], 8)
    trellis.choose(line.astype(np.float32).astype(np.float64), np.ones(1), kinds[0], prices, 0.4, *trellis.tables(8), 0, levels)  # fmt: skip
    trellis.placed(levels, *trellis.tables(8), 0, other)
    assert whole.tolist() == other.tolist()

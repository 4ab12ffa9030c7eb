"""Which sizes are looked at, what the proof is asked, and in what order: by validation data alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from steelyard.shrinking.order import (
    Chain,
    Step,
    accepted,
    chances,
    evidence,
    foreseen,
    middle,
    ordered,
    planned,
    scaled,
)
from steelyard.shrinking.promise import Promise

SIZES = [8 * 0.93**i for i in range(48)]
BYTES = [1000 * bits for bits in SIZES]


def test_evidence_of_right_or_wrong_never_holds_a_change_for_impossible() -> None:
    assert evidence(np.zeros(100), shares=True) == (0.0, 0.01)
    assert evidence(np.array([1.0, 0.0, 0.0, -1.0]), shares=True) == (0.0, 0.75)
    assert evidence(np.array([0.5, 0.1]), shares=False) == pytest.approx((0.3, 0.08))
    assert evidence(np.array([1.0, 0.0, 0.0, 0.0]), shares=False) == (0.25, 0.25)  # graded, though none of these is


def test_no_more_is_lost_or_gained_than_changes_in_what_is_foreseen() -> None:
    """Of right or wrong: also between a size that gained and one that lost, and beyond the largest."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        at = sorted(rng.choice(48, 3, replace=False).tolist())
        changed = np.sort(rng.uniform(0.001, 0.2, 3))
        measured = {i: (share * rng.uniform(-1, 1), share) for i, share in zip(at, changed, strict=True)}
        for found in foreseen(SIZES, measured):
            for times in (0.5, 1.0, 2.0):
                mean, variance = scaled(found, times)
                assert abs(mean) <= variance * (1 + 1e-9)


def test_what_a_size_loses_lies_between_those_that_were_measured_and_never_falls() -> None:
    found = foreseen(SIZES, {10: (0.001, 0.01), 20: (0.02, 0.03), 15: (0.0, 0.02)})
    means = [mean for mean, _ in found]
    assert means == sorted(means)
    assert means[10] == means[15] == pytest.approx(0.001)
    assert means[20] == 0.02
    assert 0.001 < means[17] < 0.02
    assert means[0] < 0.0001
    assert means[24] == pytest.approx(0.02 * 4 ** (SIZES[20] - SIZES[24]))


def test_halving_looks_where_it_is_as_likely_on_both_sides_and_finds_every_size() -> None:
    assert middle(-1, 48) == 22
    for smallest in range(-1, 48):
        low, high, looks = -1, 48, 0
        while high - low > 1:
            at = middle(low, high)
            assert low < at < high
            low, high, looks = (at, high, looks + 1) if at <= smallest else (low, at, looks + 1)
        assert (low, high) == (smallest, smallest + 1)
        assert looks <= (5 if 14 < smallest < 28 else 8)


def steps_of(held: list[float], sizes: list[float]) -> list[Step]:
    return [Step(size, chance, i, False) for i, (size, chance) in enumerate(zip(sizes, held, strict=True))]


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_the_steps_are_those_that_save_most(most: int) -> None:
    """Against all subsets, each valued by what is left where each step but the first of those before holds."""
    rng = np.random.default_rng(most)
    for _ in range(20):
        falling = sorted(rng.uniform(size=7).tolist(), reverse=True)
        steps = steps_of(falling, sorted(rng.uniform(10, 900, 7).tolist(), reverse=True))

        def left(chain: list[Step]) -> float:
            ends = [1.0, *(step.chance for step in chain), 0.0]
            sizes = [1000.0, *(step.bytes for step in chain)]
            return sum((a - b) * math.log(size) for a, b, size in zip(ends, ends[1:], sizes, strict=False))

        found = ordered(steps, steps[:3], most, 1000.0)
        every = [c for n in range(1, most + 1) for c in combinations(steps, n) if c[0] in steps[:3]]
        assert left(found) <= min(left(list(c)) for c in every) + 1e-3
        assert [step.bytes for step in found] == sorted((step.bytes for step in found), reverse=True)


def test_steps_go_from_sure_to_doubtful_and_are_close_where_it_is_uncertain() -> None:
    promise = Promise(0.02)
    means = foreseen(SIZES, {18: (0.004, 0.012), 22: (0.012, 0.03)})
    every = steps_of([promise.chance(*found, 1000, 1000, shares=True) for found in means], BYTES)
    steps = ordered(every, [every[0], every[18]], 6, 32000.0)
    assert len(steps) == 6
    assert steps[0].chance > 0.99
    assert steps[-1].chance < 0.3
    assert len([step for step in steps if 0.1 < step.chance < 0.95]) >= 3


def test_no_proof_is_spent_on_what_saves_nothing() -> None:
    steps = steps_of([1.0, 1.0, 1.0, 1.0, 1e-9], [100.0, 80.0, 60.0, 40.0, 39.0])
    assert [step.index for step in ordered(steps, steps, 5, 200.0)] == [3]
    assert [step.index for step in ordered(steps, steps[:2], 5, 200.0)] in ([0, 3], [1, 3])


def test_what_is_foreseen_is_as_unsure_as_it_is_far_from_what_was_measured() -> None:
    promise, measured = Promise(0.02), {18: (0.004, 1e-8), 24: (0.04, 1e-8)}
    means = foreseen(SIZES, measured)
    plain = [promise.chance(*found, 1000, 1000, shares=False) for found in means]
    found = chances(SIZES, measured, lambda mean, variance: promise.chance(mean, variance, 1000, 1000, shares=False))
    assert set(np.round(plain, 6)) == {0.0, 1.0}
    assert found[18] == 1.0
    assert found[24] == 0.0
    assert any(0.05 < chance < 0.95 for chance in found[19:24])


def test_a_proof_begins_where_it_may_and_never_comes_back_to_what_is_surer() -> None:
    steps = steps_of([1.0, 0.3, 0.9, 0.6], [100.0, 80.0, 60.0, 40.0])
    assert [step.index for step in ordered(steps, steps[:1], 4, 200.0)] == [0, 2, 3]
    assert [step.index for step in ordered(steps, [steps[2]], 4, 200.0)] == [2, 3]


@pytest.mark.parametrize(("balance", "most", "off"), [(0.15, 0.1, 0.06), (0.4, 0.04, 0.12), (1.0, 0.02, 0.12)])
def test_the_chance_of_a_proof_is_about_how_often_it_holds(balance: float, most: float, off: float) -> None:
    """balance: of losses and gains among the changes; where that is not the usual one it errs more."""
    rng = np.random.default_rng(0)
    promise, held, foretold = Promise(0.02), [], []
    for rate in rng.uniform(0.002, most, 400):
        valid, test = (
            (rng.random(1000) < rate) * np.where(rng.random(1000) < (1 + balance) / 2, 1.0, -1.0) for _ in range(2)
        )
        foretold.append(promise.chance(*evidence(valid, shares=True), 1000, 1000, shares=True))
        held.append(promise.kept(test))
    assert np.mean(held) == pytest.approx(np.mean(foretold), abs=off)
    low, high = np.array(foretold) < 0.2, np.array(foretold) > 0.8
    assert np.mean(np.array(held)[low]) < 0.25
    assert np.mean(np.array(held)[high]) > 0.75


def test_changes_of_which_none_is_a_gain_are_held_for_losses() -> None:
    """Twelve losses and no gain say more than what is usual of few changes."""
    worse = np.zeros(1000)
    worse[:12] = 1
    both = worse.copy()
    both[:5] = -1
    promise = Promise(0.02)
    assert promise.chance(*evidence(worse, shares=True), 1000, 1000, shares=True) < 0.7
    assert promise.chance(*evidence(both, shares=True), 1000, 1000, shares=True) > 0.95


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_two_kinds_of_steps_hold_or_fail_apart(most: int) -> None:
    """Against all chains: a step saves by the chance of its own kind's last and of the other's."""
    rng = np.random.default_rng(most)
    for _ in range(10):
        falling = [sorted(rng.uniform(size=4).tolist(), reverse=True) for _ in range(2)]
        sizes = [sorted(rng.uniform(10, 900, 4).tolist(), reverse=True) for _ in range(2)]
        steps = [
            Step(size, chance, i, bool(kind))
            for kind in range(2)
            for i, (size, chance) in enumerate(zip(sizes[kind], falling[kind], strict=True))
        ]
        steps.sort(key=lambda step: -step.bytes)

        def saved(chain: tuple[Step, ...]) -> float:
            last, size, whole = [1.0, 1.0], 1000.0, 0.0
            for step in chain:
                last[step.trained] = step.chance
                whole += last[0] * last[1] * math.log(size / step.bytes)
                size = step.bytes
            return whole

        every = [c for n in range(1, most + 1) for c in combinations(steps, n) if c[0] in steps[:3]]
        assert saved(tuple(ordered(steps, steps[:3], most, 1000.0))) >= max(map(saved, every)) - 1e-3


def test_a_large_rounded_step_is_left_out_where_a_trained_one_is_smaller_and_as_sure() -> None:
    rounded = Step(800.0, 0.9, 10, False)
    trained = [Step(500.0, 0.95, 0, True), Step(300.0, 0.6, 1, True)]
    whole = Step(2000.0, 1.0, 0, False)
    assert ordered([whole, rounded, *trained], [whole], 4, 4000.0) == (whole, *trained)


def trained(chance: float, size: float, index: int) -> Step:
    return Step(size, chance, index, True)


WHOLE = [Step(800.0, 1.0, 0, False, False), Step(500.0, 0.9, 9, False), Step(200.0, 0.0, 40, False, False)]


def test_with_something_trained_the_proof_may_begin_with_what_is_not_sure() -> None:
    steps = [*WHOLE, trained(0.9, 150.0, 0), trained(0.4, 90.0, 1)]
    asked: list[float] = []

    def told(share: float) -> list[Step]:
        asked.append(share)
        return steps

    first, second = planned(told, 3, 3200.0)
    assert [step.bytes for step in first.steps] == [150.0, 90.0]
    assert [step.bytes for step in second.steps] == [800.0, 500.0]
    assert first.share + second.share == pytest.approx(1)
    assert set(asked) == {1.0, first.share, second.share}
    assert planned(told, 1, 3200.0) == [Chain((WHOLE[0],), 1.0)]


@pytest.mark.parametrize(
    "steps",
    [
        WHOLE,
        [replace(WHOLE[0], chance=0.9), *WHOLE[1:], trained(0.9, 150.0, 0)],
        [WHOLE[0], trained(0.9, 850.0, 0)],
    ],
    ids=["nothing trained", "the largest not sure", "nothing smaller"],
)
def test_otherwise_the_proof_begins_with_what_is_sure(steps: list[Step]) -> None:
    (chain,) = planned(lambda _share: steps, 3, 3200.0)
    assert chain.share == 1
    assert chain.steps[0] == steps[0]


def test_the_second_chain_is_asked_only_if_the_first_begins_with_a_failure() -> None:
    steps = [*WHOLE, trained(0.9, 150.0, 0), trained(0.4, 90.0, 1)]
    chains = planned(lambda _share: steps, 3, 3200.0)
    for failing, found, most in ((90.0, [150.0], 2), (150.0, [800.0, 500.0], 3), (800.0, [150.0, 90.0], 2)):
        asked: list[float] = []

        def holds(step: Step, _share: float, failing: float = failing, asked: list[float] = asked) -> bool:
            asked.append(step.bytes)
            return step.bytes != failing

        assert [step.bytes for step in accepted(chains, holds)] == found
        assert len(asked) == most
    assert accepted(chains, lambda _step, _share: False) == []


def test_two_chains_break_the_promise_no_more_often_than_it_says() -> None:
    """Every candidate loses as much as the tolerance, or a little more, and each apart from the others: the worst."""
    steps = [*WHOLE, trained(0.9, 150.0, 0), trained(0.4, 90.0, 1)]
    chains = planned(lambda _share: steps, 3, 3200.0)
    rng, promise, times = np.random.default_rng(0), Promise(0.02), 4000
    outcomes = rng.multinomial(1000, [0.0251, 0.005, 0.9699], (times, len(steps)))
    bounds: dict[tuple[int, int, float], bool] = {}

    def kept(lost: int, gained: int, share: float) -> bool:
        worse = np.repeat([1.0, -1.0, 0.0], [lost, gained, 1000 - lost - gained])
        key = lost, gained, share
        if key not in bounds:
            bounds[key] = replace(promise, share=share).kept(worse)
        return bounds[key]

    def broken(shares: list[float]) -> float:
        given = [replace(chain, share=share) for chain, share in zip(chains, shares, strict=True)]
        count = 0
        for drawn in outcomes:
            count += bool(accepted(given, lambda step, share: kept(*drawn[steps.index(step)][:2].tolist(), share)))  # noqa: B023
        return count / times

    assert broken([chain.share for chain in chains]) <= 0.05
    assert broken([1.0, 1.0]) > 0.07

"""Which sizes are looked at, and which candidates the proof is asked about: by validation data alone.

Decides where a look says most, and the steps of the proof: from the largest to the smallest, as far apart as saves most
in the mean, because the first that fails ends a sequence; and which part of the error a second sequence keeps, so that
the first may begin with what is not sure. What sizes that were not measured would lose lies between those that were.

Source: sequences that share the error are section 3.2 of A. N. Angelopoulos et al., Learn then Test, 2021 (arXiv
2110.01052).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

USUAL = NormalDist(21, 8)  # the index of the smallest size that a tolerance of points bears: most nets lie around there
ANYWHERE = 0.01  # and as much of a chance at each other one
SURE = 0.98  # of a proof at which it may begin
LEAST = 0.003  # below that a proof is not tried
RESERVE = 0.05  # of the error that the proof may spend: kept for the safest, if the first step fails
OFF = 0.25  # by how much the logarithm of what is foreseen is off, for each bit from the nearest that was measured
NEGLIGIBLE = 1e-3  # of log bytes: a step that saves less is not worth a proof

Ends = tuple[int, int]  # the last step among sizes, and among what was trained
NONE: Ends = (-1, -1)
Evidence = tuple[float, float]  # mean and variance of how much worse an example came out; of shares what changes
Chance = Callable[[float, float], float]  # of a proof, by these two
QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 7) for i in range(7)])


@dataclass(frozen=True)
class Step:
    """A candidate as the proof will meet it."""

    bytes: float  # foreseen, where it was not made yet
    chance: float
    index: int  # of the size, or of the one that was trained; the size 0 is the largest
    trained: bool
    measured: bool = True  # on validation data


@dataclass(frozen=True)
class Chain:
    """Steps of the proof in their order, of which the first that fails ends it."""

    steps: tuple[Step, ...]
    share: float  # of the error that may be spent, at each of the steps


def evidence(worse: np.ndarray, *, shares: bool) -> Evidence:
    """Mean and variance; of right or wrong (shares) what changes, as if one more had: none of n does not mean never."""
    if shares:
        return float(worse.mean()), (float(np.abs(worse).sum()) + 1) / len(worse)
    return float(worse.mean()), float(worse.var(ddof=1)) if len(worse) > 1 else 0.0


def middle(low: int, high: int) -> int:
    """The size between two to look at next: the smallest that is borne is as likely on both sides of it."""
    between = range(low, high)  # where the last that is borne may be
    weights = np.array([USUAL.cdf(i + 0.5) - USUAL.cdf(i - 0.5) + ANYWHERE for i in between])
    below = np.cumsum(weights)[:-1] / weights.sum()
    return low + 1 + int(np.abs(below - 0.5).argmin())


def foreseen(sizes: Sequence[float], measured: Mapping[int, Evidence]) -> list[Evidence]:
    """What each size loses, never less than a larger one. Between those that were measured a bit less multiplies it, as
    it does beyond them: there it quadruples, as squared errors do."""  # fmt: skip
    known = sorted(measured)
    means = np.maximum.accumulate([measured[i][0] for i in known])
    variances = np.maximum.accumulate([measured[i][1] for i in known])
    found = []
    for i, bits in enumerate(sizes):
        nearest = min(max(i, known[0]), known[-1])
        times = 4.0 ** (sizes[nearest] - bits)
        places = [sizes[k] for k in known][::-1]
        found.append(scaled(_between(sizes[nearest], places, means[::-1], variances[::-1]), times))
    return found


def scaled(found: Evidence, times: float) -> Evidence:
    """Where all that comes out otherwise is so many times as much: a gain goes with it, and does not grow."""
    mean, variance = found
    return mean * (times if mean > 0 else min(times, 1.0)), variance * times


def chances(sizes: Sequence[float], measured: Mapping[int, Evidence], chance: Chance) -> list[float]:
    """That of a proof for each size, in the mean of what it may lose where that is foreseen."""
    found = []
    for bits, there in zip(sizes, foreseen(sizes, measured), strict=True):
        off = OFF * min(abs(bits - sizes[i]) for i in measured)
        times = np.exp(off * QUANTILES) if off else np.ones(1)
        found.append(float(np.mean([chance(*scaled(there, t)) for t in times])))
    return found


def _between(place: float, places: Sequence[float], means: np.ndarray, variances: np.ndarray) -> Evidence:
    """Geometric where that is possible, otherwise linear: the same of both, so that no more is lost than changes."""
    both = np.stack([means, variances])
    if (both > 0).all():
        mean, variance = (math.exp(np.interp(place, places, row)) for row in np.log(both))
    else:
        mean, variance = (float(np.interp(place, places, row)) for row in both)
    return mean, variance


def planned(steps: Callable[[float], Sequence[Step]], most: int, whole: float) -> list[Chain]:
    """What the proof is asked, in at most so many steps: the second chain only if not one step of the first holds.

    The first spends nearly all of the error, and begins with whatever saves most in the mean. The second starts with
    the largest size, which holds nearly always, also by the little that it may spend. Fixed sequences whose shares add
    up to one err no more often than one test (Bonferroni). There is one chain, which starts with what is sure, where
    the largest size is not sure to hold by so little; where nothing saves more; and where nothing was trained, because
    then there are steps enough for a sure one, and two chains save nothing (bench/shrink_peers).

    steps: every candidate, with its chance where a chain may spend that share of the error. whole: the bytes of the
    original.
    """
    every = _worth(steps(1.0))
    single = Chain(ordered(every, [step for step in every if _sure(step)], most, whole), 1.0)
    rounded = [step for step in _worth(steps(RESERVE)) if not step.trained]
    safest = next(step for step in rounded if not step.index)
    if most < 2 or safest.chance < SURE or not any(step.trained for step in every):
        return [single]
    left = _left(ordered(rounded, [safest], most - 1, whole), whole)
    bold = [step for step in _worth(steps(1 - RESERVE)) if step.bytes < left]
    if not bold:
        return [single]
    chain = ordered(bold, bold, most, left)
    if _left(chain, left) >= _left(single.steps, whole):
        return [single]
    larger = [step for step in rounded if step.bytes > chain[0].bytes or step is safest]
    return [Chain(chain, 1 - RESERVE), Chain(ordered(larger, [safest], most - 1, whole), RESERVE)]


def accepted(chains: Sequence[Chain], holds: Callable[[Step, float], bool]) -> list[Step]:
    """The steps that hold: those of the first chain of which one does, before the first that fails.

    holds: asks the proof of a step, which may spend a share of the error.
    """
    for chain in chains:
        found: list[Step] = []
        for step in chain.steps:
            if not holds(step, chain.share):
                break
            found.append(step)
        if found:
            return found
    return []


def _worth(steps: Sequence[Step]) -> list[Step]:
    """Of rounded ones those that may hold, and the largest."""
    return [step for step in steps if step.trained or step.chance >= LEAST or not step.index]


def _sure(step: Step) -> bool:
    """What was not measured may lose all at once, and would then end the proof before anything is proven."""
    return (not step.trained and not step.index) or (step.measured and step.chance >= SURE)


def _left(chain: Sequence[Step], whole: float) -> float:
    """The bytes that a proof leaves, as the mean of their logarithm."""
    sizes = [whole, *(step.bytes for step in chain)]
    return whole * math.exp(sum(s.chance * math.log(b / a) for a, b, s in zip(sizes, sizes[1:], chain, strict=False)))


def ordered(steps: Sequence[Step], first: Collection[Step], most: int, whole: float) -> tuple[Step, ...]:
    """At most so many of the steps, the largest first: those that save most, as the mean of log bytes.

    Two kinds of steps, those of sizes and those that were trained, hold or fail apart from each other; of one kind it
    is assumed that where the proof of a step holds, those of all before it do. So each step saves its distance from the
    one before with its own chance and that of the last one of the other kind. Of chains that save as much the shortest
    is taken. first: of which the proof may begin with; whole: the bytes of the original, with which a proof leaves off
    whose first step fails.
    """
    steps = sorted(steps, key=lambda step: -step.bytes)
    # the best chains by the last steps of both kinds: for each number of steps what it saves, and the ends before
    best: dict[Ends, dict[int, tuple[float, Ends | None]]] = {}
    for k, step in enumerate(steps):
        found: dict[Ends, dict[int, tuple[float, Ends | None]]] = {}
        if step in first:
            found[_after(NONE, step, k)] = {1: (step.chance * math.log(whole / step.bytes), None)}
        for ends, chains in best.items():
            if ends[step.trained] >= 0 and steps[ends[step.trained]].chance < step.chance:
                continue
            other = ends[not step.trained]
            chance = step.chance * (steps[other].chance if other >= 0 else 1.0)
            more = chance * math.log(steps[max(ends)].bytes / step.bytes)
            longer = found.setdefault(_after(ends, step, k), {})
            for count, (saved, _) in chains.items():
                if count < most and saved + more > longer.get(count + 1, (-math.inf, None))[0]:
                    longer[count + 1] = saved + more, ends
        best |= found
    every = [(count, -saved, ends) for ends, chains in best.items() for count, (saved, _) in chains.items()]
    least = min(lost for _, lost, _ in every) + NEGLIGIBLE
    count, _, at = min(end for end in every if end[1] <= least)
    chain: list[Step] = []
    last: Ends | None = at
    while last is not None:
        chain.append(steps[max(last)])
        last, count = best[last][count][1], count - 1
    return tuple(chain[::-1])


def _after(ends: Ends, step: Step, place: int) -> Ends:
    """The last steps of both kinds when this one has followed."""
    return (ends[0], place) if step.trained else (place, ends[1])

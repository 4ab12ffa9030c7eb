"""Which sizes are looked at, and which candidates the proof is asked about: by validation data alone.

Decides where a look says most, and the steps of the proof: from the safest to the smallest, as far apart as saves most
in the mean, because the first that fails ends it. What sizes that were not measured would lose lies between those that
were.
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
    index: int  # of the size, or of the one that was trained
    trained: bool


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


def ordered(steps: Sequence[Step], first: Collection[Step], most: int, whole: float) -> list[Step]:
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
    return chain[::-1]


def _after(ends: Ends, step: Step, place: int) -> Ends:
    """The last steps of both kinds when this one has followed."""
    return (ends[0], place) if step.trained else (place, ends[1])

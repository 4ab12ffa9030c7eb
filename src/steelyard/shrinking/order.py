"""Which candidates go into the proof, and in what order: from the safest to the smallest, by validation data alone.

Decides how far apart they are: close together where it is uncertain whether the proof holds, and on beyond that,
because the first that fails ends it and costs nothing. What sizes that were not measured would lose lies between those
that were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LADDER = (0.999, 0.98, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01)  # chances of the proof; a size for each
WIDEST = 6  # sizes between two of them: a loss can rise faster than it was foreseen
SURE = 0.9  # above that a candidate is a step on the way even where a smaller one promises as much
MARGIN = 0.2  # a chance that is better by more than chance
LEAST = 0.01  # below that a proof is not tried

Evidence = tuple[float, float]  # mean and variance of how much worse an example came out


@dataclass(frozen=True)
class Step:
    """A candidate as the proof will meet it."""

    bytes: float  # foreseen, where it was not made yet
    chance: float
    index: int  # of the size, or of the one that was trained
    trained: bool


def evidence(worse: np.ndarray) -> Evidence:
    """Mean and variance; of right or wrong as if one more had changed, because none of n does not mean never."""
    if bool(np.isin(worse, (-1.0, 0.0, 1.0)).all()):
        return float(worse.mean()), (float(np.abs(worse).sum()) + 1) / len(worse)
    return float(worse.mean()), float(worse.var(ddof=1)) if len(worse) > 1 else 0.0


def foreseen(sizes: Sequence[float], measured: Mapping[int, Evidence]) -> list[Evidence]:
    """What each size loses: linear between those that were measured, never less than a larger one; beyond them a bit
    less doubles it."""  # fmt: skip
    known = sorted(measured)
    means = np.maximum.accumulate([measured[i][0] for i in known])
    variances = np.maximum.accumulate([measured[i][1] for i in known])
    found = []
    for i, bits in enumerate(sizes):
        nearest = min(max(i, known[0]), known[-1])
        times = 2.0 ** (sizes[nearest] - bits)
        places = [sizes[k] for k in known][::-1]
        mean, variance = (float(np.interp(sizes[nearest], places, v[::-1])) for v in (means, variances))
        found.append((mean * times if mean > 0 else mean, variance * times))
    return found


def ordered(
    chances: Sequence[float], bytes_of: Sequence[float], trained: Sequence[tuple[float, float]], measured: Iterable[int]
) -> list[Step]:
    """The steps of the proof, the largest first.

    chances, bytes_of: of each size, the largest first; trained: bytes and chance of each that was trained;
    measured: indices of sizes. The proof begins at one of them, or at the largest of all: what was not measured may
    lose all at once, and would then end it before anything is proven.
    """
    rungs = [max((i for i, chance in enumerate(chances) if chance >= bar), default=0) for bar in LADDER]
    first = max((i for i in measured if i <= rungs[0] and chances[i] >= LADDER[1]), default=0)
    chosen = sorted({first, *rungs})
    chosen += [(a + b) // 2 for a, b in pairwise(chosen) if b - a > WIDEST]
    steps = [Step(bytes_of[i], chances[i], i, False) for i in sorted(chosen)]
    steps += [Step(size, chance, i, True) for i, (size, chance) in enumerate(trained) if chance >= LEAST]
    kept = [step for step in steps if step is steps[0] or step.chance >= SURE or not _beaten(step, steps)]
    return sorted(kept, key=lambda step: -step.bytes)


def _beaten(step: Step, steps: Sequence[Step]) -> bool:
    return any(other.bytes < step.bytes and other.chance > step.chance + MARGIN for other in steps)

"""How the learning rate goes over a run: functions from the fraction done, in [0, 1], to a factor of the rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Schedule = Callable[[float], float]


def constant(done: float) -> float:  # noqa: ARG001 - a schedule is a function of the fraction done
    """1 throughout."""
    return 1.0


def cosine(done: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017).

    >>> [round(cosine(x), 2) for x in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(done: float) -> float:
    """From 1/25 up to 1 in the first quarter, then down to 0, both as half a cosine (Smith 2018).

    >>> [round(one_cycle(x), 2) for x in (0, 0.25, 1)]
    [0.04, 1.0, 0.0]
    """
    if done < 0.25:
        return 1 - 0.96 * cosine(4 * done)
    return cosine((done - 0.25) / 0.75)


SCHEDULES: Mapping[str, Schedule] = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}

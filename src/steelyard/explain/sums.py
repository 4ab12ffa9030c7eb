"""What is known of a tensor after all of it was looked at: counts, and sums that are whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, isqrt

import numpy as np


@dataclass(frozen=True)
class Sums:
    """Sums over the finite values as whole numbers: of x and |x| in units of 2^base, of x² in units of 4^base."""

    total: int
    absolute: int
    squares: int
    base: int


@dataclass(frozen=True)
class Tally:
    """What is known of the values of one tensor."""

    size: int  # numbers: elements, or twice as many for a complex tensor
    finite: int
    zeros: int
    negative_zeros: int
    positive: int  # finite values above zero
    subnormal: int
    nan: int
    infinite: tuple[int, int]  # +Inf, -Inf
    sums: Sums
    counts: np.ndarray  # how often each (leading) pattern occurs, those that do not included
    distinct: int | None  # different bit patterns; None: more than DISTINCT of a wide dtype
    ordered: Callable[[Sequence[int]], list[float]]  # the finite values with these ranks, 0 the least
    bins: Callable[[float, float, int], tuple[list[float], list[int]]]  # edges, counts
    rows: np.ndarray | None  # L2 norm of each slice along the first axis; None: fewer than two axes, or too many
    columns: np.ndarray | None  # and of each place in such a slice


def exact_mean_and_spread(sums: Sums, count: int) -> tuple[float, float, float, float]:
    """Mean, standard deviation (of the population), L1 and L2 norm, each rounded once.

    >>> exact_mean_and_spread(Sums(total=4, absolute=4, squares=10, base=0), 2)
    (2.0, 1.0, 4.0, 3.1622776601683795)
    """
    up = max(sums.base, 0), max(-sums.base, 0)
    mean = _ratio(sums.total << up[0], count << up[1])
    spread = _root((count * sums.squares - sums.total**2) << 2 * up[0], count**2 << 2 * up[1])
    return mean, spread, _ratio(sums.absolute << up[0], 1 << up[1]), _root(sums.squares << 2 * up[0], 1 << 2 * up[1])


def _ratio(numerator: int, denominator: int) -> float:
    try:
        return numerator / denominator
    except OverflowError:
        return float("inf") if numerator > 0 else float("-inf")


def _root(numerator: int, denominator: int) -> float:
    """The square root of a fraction: the whole root of it times a power of four that leaves 64 bits and more."""
    if numerator <= 0:
        return 0.0
    lift = max(0, 130 - numerator.bit_length() + denominator.bit_length() + 1) // 2
    return _ratio(isqrt((numerator << 2 * lift) // denominator), 1 << lift)


def median(values: np.ndarray) -> float:
    """The median of numbers that are not negative: infinite only where a middle one is.

    >>> median(np.array([1.5e308, 1.5e308])), median(np.array([1.0, 2.0, np.inf, np.inf]))
    (1.5e+308, inf)
    """
    with np.errstate(over="ignore"):  # numpy adds the middle two before it halves
        middle = float(np.median(values))
    return middle if np.isfinite(middle) else 2.0 * float(np.median(values / 2))


def entropy(counts: np.ndarray) -> float:
    """Shannon's entropy of a count, in bits.

    >>> entropy(np.array([1, 1, 0, 2]))
    1.5
    """
    present = counts[counts > 0].astype(np.float64)
    if not present.size:
        return 0.0
    share = present / present.sum()
    return abs(fsum(-share * np.log2(share)))

"""The same values in another place: grown, reshaped, transposed, or with rows, columns or elements in another order.

Decides by one number for each row and each column, which two tensors that hold the same rows share. A few blocks and
these numbers are in memory. Knows nothing of magnitudes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.bothaxes import on_both_axes
from steelyard.explain.diff.marks import sums, unsigned
from steelyard.explain.diff.tally import BLOCK, Tally, same_bits


@dataclass(frozen=True)
class Arrangement:
    """How the values of one tensor lie in another: a verdict and what there is to say."""

    verdict: str
    text: str


def rearranged(a: Weight, b: Weight) -> Arrangement | None:
    """How `b` holds the values of `a` in another arrangement; None where it does not, or where both are the same.

    >>> x = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> rearranged(Weight.of("w", x), Weight.of("w", x[::-1].copy())).text
    '2 of 2 rows moved'
    """
    if a.spec.dtype != b.spec.dtype or a.spec.size != b.spec.size or not a.spec.size:
        return None
    flipped = len(a.spec.shape) == 2 and a.spec.shape == b.spec.shape[::-1] and 1 not in a.spec.shape
    if a.spec.shape != b.spec.shape and same_bits(a, b):
        return Arrangement("reshaped", f"the same values as {_by(a)}, now {_by(b)}")
    if a.spec.shape != b.spec.shape and not flipped:
        return None
    x, y = sums(a), sums(b)
    if x.elements != y.elements:
        return None
    if flipped and np.array_equal(x.rows, y.columns) and np.array_equal(x.columns, y.rows):
        return Arrangement("transposed", f"the transpose: {_by(a)} became {_by(b)}")
    if a.spec.shape != b.spec.shape:
        return None
    second = "columns" if len(a.spec.shape) > 1 else "elements"
    for name, left, right in (("rows", x.rows, y.rows), (second, x.columns, y.columns)):
        if left.size > 1 and np.array_equal(np.sort(left), np.sort(right)):
            return Arrangement(f"permuted {name}", f"{np.count_nonzero(left != right)} of {left.size} {name} moved")
    if len(a.spec.shape) > 1 and (moves := on_both_axes(a, b, x)) is not None:
        return Arrangement("permuted rows and columns", moves)
    return Arrangement("permuted elements", "the same values in another order")


def _by(weight: Weight) -> str:
    return "×".join(map(str, weight.spec.shape)) or "a scalar"


def may_be_permuted(tally: Tally) -> bool:
    """Whether both sides can hold the same values in another order: their sums of squares agree."""
    x, y = tally.total(2), tally.total(3)
    if tally.nan_appeared or tally.nan_vanished or tally.inf_appeared or tally.inf_vanished:
        return tally.nan_appeared == tally.nan_vanished and tally.inf_appeared == tally.inf_vanished
    moved = tally.changed >= 2 and tally.negated < tally.changed  # else a sign changed, and nothing moved
    return moved and (x == y or abs(x - y) <= 1e-9 * max(x, y))


def grown(a: Weight, b: Weight) -> Arrangement:
    """What two tensors of different shapes share: all of the smaller one where a single axis grew or shrank."""
    old, new = a.spec.shape, b.spec.shape
    axes = [i for i, (m, n) in enumerate(zip(old, new, strict=False)) if m != n]
    told = f"{_by(a)} became {_by(b)}"
    if len(old) != len(new) or len(axes) != 1 or a.spec.dtype != b.spec.dtype or not a.spec.size * b.spec.size:
        return Arrangement("shape", told)
    axis = axes[0]
    what = {0: "rows", 1: "columns"}.get(axis, f"slices of axis {axis}") if len(old) > 1 else "elements"
    differing, rest = _beyond(a, b, axis)
    few, many = sorted((old[axis], new[axis]))
    verdict = "grown" if new[axis] > old[axis] else "cut"
    first = (
        f"the first {few} {what} are the same bits" if not differing else f"{differing} of the first elements differ"
    )
    return Arrangement(verdict, f"{told}: {first}; {many - few} {what} more in the {_larger(verdict)}, {rest}")


def _larger(verdict: str) -> str:
    return "second" if verdict == "grown" else "first"


def _beyond(a: Weight, b: Weight, axis: int) -> tuple[int, str]:
    """How many elements of the common part differ, and what the larger one holds beyond it."""
    inner = math.prod(a.spec.shape[axis + 1 :])
    wide_a, wide_b = a.spec.shape[axis] * inner, b.spec.shape[axis] * inner
    outer, common = a.spec.size // wide_a, min(wide_a, wide_b)
    count = max(1, BLOCK // max(wide_a, wide_b))
    sizes = (BLOCK, BLOCK) if outer == 1 else (count * wide_a, count * wide_b)
    differing = others = 0
    for x, y in zip_longest(a.blocks(sizes[0]), b.blocks(sizes[1])):
        if outer == 1:  # the one that is shorter ends where the common part ends
            both = 0 if x is None or y is None else min(x.size, y.size)
            tails = [side[both:] for side in (x, y) if side is not None]
        else:
            x, y, both = x.reshape(-1, wide_a), y.reshape(-1, wide_b), common
            tails = [x[:, both:], y[:, both:]]
        if both:
            differing += int(np.count_nonzero(unsigned(_flat(x, both)) != unsigned(_flat(y, both))))
        others += sum(int(np.count_nonzero(tail)) for tail in tails)
    return differing, "not all zero" if others else "all zero"


def _flat(values: np.ndarray, count: int) -> np.ndarray:
    """The first `count` elements of each line, as one flat array."""
    return np.ascontiguousarray(values[..., :count]).reshape(-1)

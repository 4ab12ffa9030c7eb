"""The same values in another place: grown, reshaped, transposed, or with rows, columns or elements in another order.

Decides by sums of the stored bits times random numbers (mod 2^64), one for each row and each column, which two tensors
that hold the same rows share; the numbers are drawn anew in each process, so that no file can be made to collide.
A few blocks and one number for each row and column are in memory. Knows nothing of magnitudes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.tally import BLOCK, Tally, same_bits


@dataclass(frozen=True)
class Sums:
    """One number for each row (first axis) and each column (second axis), and one for the multiset of all elements."""

    rows: np.ndarray
    columns: np.ndarray
    elements: int


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


def sums(weight: Weight) -> Sums:
    """The numbers of a tensor; one of rank 0 or 1 is a single row."""
    shape = weight.spec.shape if len(weight.spec.shape) > 1 else (1, weight.spec.size)
    rest = math.prod(shape[2:])
    width = shape[1] * rest
    rows, columns = np.zeros(shape[0], np.uint64), np.zeros(shape[1], np.uint64)
    elements = np.zeros(1, np.uint64)
    for first, at, values in _pieces(weight, width):  # (rows, part of the width)
        bits = values.astype(np.uint64)
        elements += _mixed(bits).sum(dtype=np.uint64)
        count, part = bits.shape
        rows[first : first + count] += (bits * _factors(at, part)).sum(axis=1, dtype=np.uint64)
        lines = _factors(first * rest, count * rest).reshape(count, 1, rest)
        if part == width:
            columns += (bits.reshape(count, shape[1], rest) * lines).sum(axis=(0, 2), dtype=np.uint64)
        else:  # one row, in parts
            where = np.arange(at, at + part)
            np.add.at(columns, where // rest, bits[0] * lines[0, 0, where % rest])
    return Sums(rows, columns, int(elements[0]))


def _pieces(weight: Weight, width: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The bits as (first row, first element in it, (rows, elements)): some whole rows, or a part of one."""
    if width <= BLOCK:
        many = BLOCK // width * width
        for i, block in enumerate(weight.blocks(many)):
            yield i * (many // width), 0, _unsigned(block).reshape(-1, width)
        return
    at = 0
    for block in weight.blocks(BLOCK):
        flat = _unsigned(block)
        while flat.size:
            row, start = divmod(at, width)
            part = flat[: width - start]
            yield row, start, part[None]
            flat, at = flat[part.size :], at + part.size


def _unsigned(block: np.ndarray) -> np.ndarray:
    """The bits of flat values, one unsigned number each; of a wide complex number, both halves mixed into one."""
    if block.dtype.itemsize == 16:
        halves = block.view(np.uint64).reshape(-1, 2)
        mixed: np.ndarray = _mixed(halves[:, 0]) + halves[:, 1]
        return mixed
    return block.view(f"u{block.dtype.itemsize}")


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Each number scattered over 64 bits (splitmix64), so that a sum tells multisets apart."""
    with np.errstate(over="ignore"):
        z = bits + _seed()
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def _factors(first: int, count: int) -> np.ndarray:
    """The random odd numbers for the places from `first` on; they are the same for rows and for columns."""
    with np.errstate(over="ignore"):
        places = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mixed(places) | np.uint64(1)


@cache
def _seed() -> np.uint64:
    return np.uint64(secrets.randbits(64))


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
            differing += int(np.count_nonzero(_unsigned(_flat(x, both)) != _unsigned(_flat(y, both))))
        others += sum(int(np.count_nonzero(tail)) for tail in tails)
    return differing, "not all zero" if others else "all zero"


def _flat(values: np.ndarray, count: int) -> np.ndarray:
    """The first `count` elements of each line, as one flat array."""
    return np.ascontiguousarray(values[..., :count]).reshape(-1)

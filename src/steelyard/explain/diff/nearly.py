"""Rows or columns in another order, and changed a little besides: what is left of a renumbering after further training.

Decides by the cosines of samples of the rows, the mean row taken away: in `b` each row must have one nearest of `a`, no
two the same one, and in that order the whole must be alike. A row is a filter, with all that it holds; so is a column.
Bounded: matrices beyond some size are left alone, a few rows are tried before all are, and some hundred thousand
products for each row are all that it costs. Knows nothing of permutations that are exact, or of both axes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.tally import BLOCK, Tally, wide

LARGEST = 1 << 24  # elements of a tensor
MOST = 8192  # rows or columns
ALIKE = 0.9  # cosine from which two rows, and in the end both tensors, are taken for each other
SAMPLE = 64  # elements of each row that are compared
_TRIED = 24  # rows that are looked at before all are
_FEWEST = 16  # elements of a row, below which chance finds likenesses
_CHUNK = 256  # rows whose cosines with all others are in memory


@dataclass(frozen=True)
class Order:
    """Which row or column of the first each one of the second is."""

    axis: int
    places: np.ndarray
    relative: float  # ||b - a|| / ||a|| in that order
    cosine: float

    @property
    def text(self) -> str:
        """What there is to say, in a few words."""
        moved = int(np.count_nonzero(self.places != np.arange(len(self.places))))
        what = "columns" if self.axis else "rows"
        told = f"in that order ||b - a|| is {self.relative:.2g} of ||a||"
        return f"{moved} of {len(self.places)} {what} moved, and all changed besides: {told}"


def nearly_permuted(a: Weight, b: Weight, tally: Tally) -> Order | None:
    """The order of the rows, or else of the columns, in which `b` is nearly `a`; None where there is none.

    `tally` is that of both as they are. Not looked for where they are alike already, or not finite throughout.

    >>> from steelyard.explain.diff.tally import tally
    >>> x = np.random.default_rng(0).standard_normal((20, 30))
    >>> a, b = Weight.of("w", x), Weight.of("w", x[::-1] + 0.01)
    >>> nearly_permuted(a, b, tally(a, b, False)).text
    '20 of 20 rows moved, and all changed besides: in that order ||b - a|| is 0.01 of ||a||'
    """
    shape, kinds = a.spec.shape, {a.spec.dtype.kind, b.spec.dtype.kind}
    if kinds != {"float"} or len(shape) < 2 or not tally.all_finite or not _FEWEST**2 <= a.spec.size <= LARGEST:
        return None
    cosine = tally.cosine
    if cosine is None or not math.isfinite(cosine) or cosine >= ALIKE or not 0.5 <= _ratio(tally) <= 2.0:
        return None
    a, b = _by_parts(a), _by_parts(b)
    for axis in (0, 1):
        if 1 < shape[axis] <= MOST and a.spec.size // shape[axis] >= _FEWEST:
            places = _places(a, b, axis)
            order = None if places is None else _judged(a, b, axis, places)
            if order is not None and order.cosine >= ALIKE:
                return order
    return None


def _by_parts(weight: Weight) -> Weight:
    """A weight of which rows can be had without the whole being decoded for each."""
    return weight if weight.fill is not None else Weight.of(weight.name, weight.array(), weight.origin)


def _ratio(tally: Tally) -> float:
    """||b||^2 / ||a||^2, which no order changes."""
    base = tally.total(2)
    return tally.total(3) / base if base else math.inf


def _places(a: Weight, b: Weight, axis: int) -> np.ndarray | None:
    """For each row of `b` that of `a`; None unless nearly all have one that no other has, and some moved."""
    count = a.spec.shape[axis]
    old = _sample(a, axis)
    mean = old.mean(axis=0)  # of both, where one is the other in another order
    directions = _directions(old - mean)
    tried = np.unique(np.linspace(0, count - 1, min(_TRIED, count)).astype(np.intp))
    some = _directions(_sample(b, axis, tried) - mean)
    if np.count_nonzero((some @ directions.T).max(axis=1) >= ALIKE) < len(tried) // 2:
        return None
    new = _directions(_sample(b, axis) - mean)
    nearest, cosines = np.empty(count, np.intp), np.empty(count)
    for first in range(0, count, _CHUNK):
        found = new[first : first + _CHUNK] @ directions.T
        nearest[first : first + _CHUNK] = found.argmax(axis=1)
        cosines[first : first + _CHUNK] = found.max(axis=1)
    times = np.bincount(nearest, minlength=count)
    sure = (cosines >= ALIKE) & (times[nearest] == 1)
    if np.count_nonzero(sure) < 0.9 * count or np.array_equal(nearest[sure], np.flatnonzero(sure)):
        return None
    nearest[~sure] = np.setdiff1d(np.arange(count), nearest[sure])  # such as dead rows: in the order that is left
    return nearest


def _sample(weight: Weight, axis: int, which: np.ndarray | None = None) -> np.ndarray:
    """Some elements of each row, or of those at `which`: (rows, sample) in float64."""
    shape = weight.spec.shape
    if axis == 0:
        width = weight.spec.size // shape[0]
        chosen = np.unique(np.linspace(0, width - 1, min(SAMPLE, width)).astype(np.intp))
        if which is None:
            blocks = (x.reshape(-1, width) for x in weight.blocks(max(BLOCK // width, 1) * width))
        else:
            blocks = (weight[int(i)].reshape(1, width) for i in which)
        return np.concatenate([_float64(block[:, chosen]) for block in blocks])
    chosen = np.unique(np.linspace(0, shape[0] - 1, min(SAMPLE, shape[0])).astype(np.intp))
    lines = np.stack([_float64(weight[int(i)].reshape(shape[1], -1)) for i in chosen])  # (sample, columns, kernel)
    columns = lines if which is None else lines[:, which]
    return columns.swapaxes(0, 1).reshape(columns.shape[1], -1)


def _float64(values: np.ndarray) -> np.ndarray:
    return wide(values.reshape(-1)).astype(np.float64).reshape(values.shape)


def _directions(rows: np.ndarray) -> np.ndarray:
    """Each row with length 1, or 0."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: np.ndarray = rows / np.where(lengths > 0, lengths, 1)
    return directions


def _rows(weight: Weight, places: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Some whole rows at a time, each flat, in float64; in the order of `places` where that is given."""
    width = weight.spec.size // weight.spec.shape[0]
    count = max(BLOCK // width, 1)
    if places is None:
        yield from (_float64(block).reshape(-1, width) for block in weight.blocks(count * width))
        return
    for at in range(0, len(places), count):
        yield _float64(np.stack([weight[int(i)].reshape(-1) for i in places[at : at + count]]))


def _judged(a: Weight, b: Weight, axis: int, places: np.ndarray) -> Order:
    """How far all of `b` is from `a` in that order."""
    change = base = other = product = 0.0
    for x, y in zip(_rows(a, places) if axis == 0 else _rows(a), _rows(b), strict=True):
        if axis == 1:
            x = x.reshape(len(x), len(places), -1)[:, places].reshape(y.shape)
        d = y - x
        change, base = change + float(np.vdot(d, d)), base + float(np.vdot(x, x))
        other, product = other + float(np.vdot(y, y)), product + float(np.vdot(x, y))
    return Order(axis, places, math.sqrt(change / base), product / (math.sqrt(base) * math.sqrt(other)))

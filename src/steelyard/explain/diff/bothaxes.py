"""Rows and columns in other orders at once: b[i, j] = a[p(i), q(j)], as where the units of two layers were renumbered.

Decides by numbers that a row keeps whatever the order of its columns, and the other way round; where rows share such a
number, it is refined by those of the columns, as in the colour refinement of graphs. The orders that follow are then
checked for every element. Bounded: a few passes over both tensors, one number for each row and column in memory.

Source: Weisfeiler and Leman, "The reduction of a graph to canonical form", 1968 (colour refinement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.marks import Sums, factors, mixed, pieces
from steelyard.explain.diff.tally import BLOCK

ROUNDS = 4  # passes in which numbers are refined


@dataclass(frozen=True)
class _Colours:
    """One number for each row and each column, whatever the order of the other axis."""

    rows: np.ndarray
    columns: np.ndarray

    @property
    def classes(self) -> int:
        return len(np.unique(self.rows)) + len(np.unique(self.columns))


def on_both_axes(a: Weight, b: Weight, sums: Sums) -> str | None:
    """What there is to say if `b`, of the shape of `a`, is `a` with rows and columns in other orders; else None.

    `sums` are those of `a`. None also where rows that are alike in all but their order leave the orders open, and for
    rows of more than 262,144 elements.

    >>> from steelyard.explain.diff.marks import sums
    >>> a = Weight.of("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    >>> b = Weight.of("w", a.array()[[1, 0, 2]][:, [3, 1, 2, 0]])
    >>> on_both_axes(a, b, sums(a))
    '2 of 3 rows and 2 of 4 columns moved'
    """
    shape = a.spec.shape
    if math.prod(shape[1:]) > BLOCK:
        return None
    x, y = (_Colours(np.zeros(shape[0], np.uint64), np.zeros(shape[1], np.uint64)) for _ in "ab")
    known = 0
    for _ in range(ROUNDS):
        x, y = _refined(a, x), _refined(b, y)
        if not (_same_set(x.rows, y.rows) and _same_set(x.columns, y.columns)):
            return None
        if x.classes in (known, shape[0] + shape[1]):
            break
        known = x.classes
    rows, columns = _order(x.rows, y.rows), _order(x.columns, y.columns)
    if not np.array_equal(_row_sums(b, columns), sums.rows[rows]):
        return None
    moved = [int(np.count_nonzero(order != np.arange(len(order)))) for order in (rows, columns)]
    return f"{moved[0]} of {shape[0]} rows and {moved[1]} of {shape[1]} columns moved"


def _same_set(left: np.ndarray, right: np.ndarray) -> bool:
    return np.array_equal(np.sort(left), np.sort(right))


def _order(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """For each of `new` the place of the same number in `old`; equal ones in the order of both."""
    places = np.empty(len(new), np.intp)
    places[np.argsort(new, kind="stable")] = np.argsort(old, kind="stable")
    return places


def _refined(weight: Weight, colours: _Colours) -> _Colours:
    """Each row's number anew, from its elements and the numbers of the columns in which they lie, and for columns."""
    shape = weight.spec.shape
    kernel = math.prod(shape[2:])
    rows, columns = np.zeros(shape[0], np.uint64), np.zeros(shape[1], np.uint64)
    of_columns, of_rows = mixed(colours.columns)[None], mixed(colours.rows)[:, None]
    for first, _, values in pieces(weight, shape[1] * kernel):
        bits = values.astype(np.uint64).reshape(len(values), shape[1], kernel)
        elements = (bits * factors(0, kernel)).sum(axis=2, dtype=np.uint64)  # (rows, columns)
        rows[first : first + len(values)] = mixed(elements + of_columns).sum(axis=1, dtype=np.uint64)
        columns += mixed(elements + of_rows[first : first + len(values)]).sum(axis=0, dtype=np.uint64)
    return _Colours(rows, columns)


def _row_sums(weight: Weight, columns: np.ndarray) -> np.ndarray:
    """The numbers of `marks.sums` that the rows had if column j stood at the place ``columns[j]``."""
    shape = weight.spec.shape
    kernel = math.prod(shape[2:])
    width = shape[1] * kernel
    there = factors(0, width).reshape(shape[1], kernel)[columns].reshape(-1)
    rows = np.zeros(shape[0], np.uint64)
    for first, _, values in pieces(weight, width):
        rows[first : first + len(values)] = (values.astype(np.uint64) * there).sum(axis=1, dtype=np.uint64)
    return rows

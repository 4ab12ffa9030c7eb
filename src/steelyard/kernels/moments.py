"""Sums of squares: of what a float32 has beyond its leading half, and of rows and columns.

A sum is added up in pieces that stay in the processor's cache, within each in whatever order is quickest. Arrays are
contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.kernels.native import Native

_LARGEST = np.float32(3.4028235e38)


def _rests(_numba: Any) -> Callable[..., None]:
    def squares(patterns, values, n, piece, totals):
        leading = np.uint32(0xFFFF0000)
        for start in range(0, n, piece):
            total = 0.0
            for i in range(start, min(start + piece, n)):
                head = np.uint32(patterns[i] & leading).view(np.float32)
                rest = np.float64(values[i] - head)
                total += rest * rest if rest == rest else 0.0
            totals[start // piece] = total

    return squares


def _rows(by_table: bool) -> Callable[[Any], Callable[..., None]]:
    """The loop over float32 values, or over patterns whose values are moved from a table to `values` first."""

    def build(_numba: Any) -> Callable[..., None]:
        def squares(patterns, table, values, n, piece, first, width, rows, columns, kept):
            for start in range(0, n, piece):
                end, base = min(start + piece, n), 0
                if by_table:
                    base = start
                    for i in range(end - start):
                        values[i] = table[np.int64(patterns[start + i])]
                at, row, column = start, (first + start) // width, (first + start) % width
                while at < end:
                    count = min(width - column, end - at)
                    total = 0.0
                    if kept:
                        for i in range(count):
                            x = values[at - base + i]
                            v = np.float64(x)
                            square = v * v if abs(x) <= _LARGEST else 0.0
                            total += square
                            columns[column + i] += square
                    else:
                        for i in range(count):
                            x = values[at - base + i]
                            v = np.float64(x)
                            total += v * v if abs(x) <= _LARGEST else 0.0
                    rows[row] += total
                    at += count
                    row, column = row + 1, 0

        return squares

    return build


_SOURCE = Path(__file__).read_text(encoding="utf-8")
_LINES = ("int64", "int64", "int64", "int64", "float64*", "float64*", "int64")
_RESTS = Native(
    "squares_of_rests", _rests, ("uint32*", "float32*", "int64", "int64", "float64*"), _SOURCE, reordered=True
)
_ROWS = {
    kind: Native(
        f"squares_of_rows_{kind}",
        _rows(kind != "float32"),
        (f"{kind}*", "float32*", "float32*", *_LINES),
        _SOURCE,
        reordered=True,
    )
    for kind in ("uint8", "uint16", "float32")
}


def squares_of_rests(patterns: np.ndarray, piece: int) -> np.ndarray:
    """The sums, (pieces,) float64, of the squares of what float32s have beyond their leading 16 bits.

    Args:
        patterns: their bits, (n,) uint32; what is not finite counts as 0.
        piece: how many are added up to each sum.

    >>> squares_of_rests(np.float32([1.0, 1 + 2**-10, np.inf]).view(np.uint32), 2).tolist() == [2.0**-20, 0.0]
    True
    """
    totals = np.empty(-(-patterns.size // piece))
    _RESTS(patterns, patterns, patterns.size, piece, totals)
    return totals


def squares_of_rows(
    values: np.ndarray, piece: int, first: int, width: int, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Add the squares of float32 `values`, elements from flat index `first` on, to their row and column.

    Rows are `width` elements wide; an empty `columns` is not filled; what is not finite counts as 0.

    >>> rows, columns = np.zeros(2), np.zeros(2)
    >>> squares_of_rows(np.float32([2, 3, np.inf]), 3, 1, 2, rows, columns)
    >>> rows.tolist(), columns.tolist()
    ([4.0, 9.0], [9.0, 4.0])
    """
    kept = int(columns.size > 0)
    _ROWS["float32"](values, values, values, values.size, piece, first, width, rows, columns, kept)


def squares_of_rows_by_table(
    patterns: np.ndarray,
    table: np.ndarray,
    scratch: np.ndarray,
    first: int,
    width: int,
    rows: np.ndarray,
    columns: np.ndarray,
) -> None:
    """`squares_of_rows` of ``table[patterns]``, as many at a time as `scratch` has room for.

    `patterns` are uint8 or uint16, `table` has a float32 for each of them.

    >>> rows, columns = np.zeros(1), np.zeros(2)
    >>> scratch = np.empty(2, np.float32)
    >>> squares_of_rows_by_table(np.uint8([0, 1]), np.float32([2, 3]), scratch, 0, 2, rows, columns)
    >>> rows.tolist(), columns.tolist()
    ([13.0], [4.0, 9.0])
    """
    loop, kept = _ROWS[patterns.dtype.name], int(columns.size > 0)
    loop(patterns, table, scratch, patterns.size, scratch.size, first, width, rows, columns, kept)

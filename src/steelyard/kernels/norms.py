"""Sums of squares of many float32 arrays in one call: of values, and of how far they moved, in one pass over memory.

The arrays are given by their addresses, in pieces; every square is taken and added up in float64, in whatever order is
quickest, so that nothing overflows, underflows or is rounded away. What moves memory is what such a loop costs: a piece
is read once. Whoever calls vouches for addresses and counts, and that the arrays live until the call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.kernels.native import Native


def _squares(_numba: Any) -> Callable[..., None]:
    def squares(arrays, counts, first, last, totals):
        for k in range(first, last):
            values, total = arrays[k], 0.0
            for i in range(counts[k]):
                x = np.float64(values[i])
                total += x * x
            totals[k] = total

    return squares


def _keep(_numba: Any) -> Callable[..., None]:
    def keep(arrays, copies, counts, first, last, totals):
        for k in range(first, last):
            values, copy, total = arrays[k], copies[k], 0.0
            for i in range(counts[k]):
                x = values[i]
                copy[i] = x
                total += np.float64(x) * np.float64(x)
            totals[k] = total

    return keep


def _moved(_numba: Any) -> Callable[..., None]:
    def moved(arrays, copies, counts, first, last, totals):
        for k in range(first, last):
            values, copy, total = arrays[k], copies[k], 0.0
            for i in range(counts[k]):
                d = np.float64(values[i]) - np.float64(copy[i])
                total += d * d
            totals[k] = total

    return moved


def _renew(_numba: Any) -> Callable[..., None]:
    def renew(arrays, copies, counts, first, last, totals):
        for k in range(first, last):
            values, copy, total = arrays[k], copies[k], 0.0
            for i in range(counts[k]):
                x = values[i]
                d = np.float64(x) - np.float64(copy[i])
                copy[i] = x
                total += d * d
            totals[k] = total

    return renew


_SOURCE = Path(__file__).read_text(encoding="utf-8")
_ENDING = ("int64*", "int64", "int64", "float64*")
_SQUARES = Native("squares_of_arrays", _squares, ("float32**", *_ENDING), _SOURCE, reordered=True)
_KEEP = Native("squares_and_copies", _keep, ("float32**", "float32**", *_ENDING), _SOURCE, reordered=True)
_MOVED = Native("squares_of_moves", _moved, ("float32**", "float32**", *_ENDING), _SOURCE, reordered=True)
_RENEW = Native("squares_of_moves_and_copies", _renew, ("float32**", "float32**", *_ENDING), _SOURCE, reordered=True)


def squares(arrays: np.ndarray, counts: np.ndarray, first: int, last: int, totals: np.ndarray) -> None:
    """Put into `totals`, float64, the sums of squares of the arrays `first` to `last` (without that one).

    Args:
        arrays: their addresses, uint64.
        counts: their elements, int64.

    >>> x = np.float32([3, 4])
    >>> totals = np.zeros(1)
    >>> squares(np.uint64([x.ctypes.data]), np.int64([2]), 0, 1, totals)
    >>> totals.tolist()
    [25.0]
    """
    _SQUARES(arrays, counts, first, last, totals)


def keep(arrays: np.ndarray, copies: np.ndarray, counts: np.ndarray, first: int, last: int, totals: np.ndarray) -> None:
    """`squares`, and each array copied to the address of the same index in `copies`."""
    _KEEP(arrays, copies, counts, first, last, totals)


def moved(
    arrays: np.ndarray, copies: np.ndarray, counts: np.ndarray, first: int, last: int, totals: np.ndarray
) -> None:
    """Put into `totals` the sums of squares of the differences of arrays and copies.

    >>> x, old, totals = np.float32([3, 4]), np.empty(2, np.float32), np.zeros(1)
    >>> given = np.uint64([x.ctypes.data]), np.uint64([old.ctypes.data]), np.int64([2]), 0, 1, totals
    >>> keep(*given)
    >>> x += 2
    >>> moved(*given)
    >>> old.tolist(), totals.tolist()
    ([3.0, 4.0], [8.0])
    """
    _MOVED(arrays, copies, counts, first, last, totals)


def renew(
    arrays: np.ndarray, copies: np.ndarray, counts: np.ndarray, first: int, last: int, totals: np.ndarray
) -> None:
    """`moved`, and each array copied to the address of the same index in `copies`."""
    _RENEW(arrays, copies, counts, first, last, totals)

"""How often each bit pattern occurs. From the counts of 65,536 patterns every statistic follows exactly.

Neighbours are counted in two tables in turn: a counter that was just written is slow to read again, and weights
that are all alike would wait for it at every element. Arrays are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.kernels.native import Native

COUNT = 40  # a packed entry of `count_32`: the count above this bit, the sum of the trailing halves below
PER_TABLE = 1 << 23  # elements that the two tables of `count_32` hold before they must be emptied


def _count_16(_numba: Any) -> Callable[..., None]:
    def count(patterns, n, tables):
        one, second = np.uint32(1), 65536
        for i in range(n // 2):
            tables[np.int64(patterns[2 * i])] += one
            tables[second + np.int64(patterns[2 * i + 1])] += one
        if n % 2:
            tables[np.int64(patterns[n - 1])] += one

    return count


def _count_32(_numba: Any) -> Callable[..., None]:
    def count(patterns, n, tables):
        half, low, one, second = np.uint32(16), np.uint32(65535), np.uint64(1 << COUNT), 65536
        for i in range(n // 2):
            a, b = patterns[2 * i], patterns[2 * i + 1]
            tables[np.int64(a >> half)] += np.uint64(a & low) + one
            tables[second + np.int64(b >> half)] += np.uint64(b & low) + one
        if n % 2:
            a = patterns[n - 1]
            tables[np.int64(a >> half)] += np.uint64(a & low) + one

    return count


def _count_exactly(_numba: Any) -> Callable[..., None]:
    def count(patterns, n, sought, many, found):
        for k in range(many):
            wanted = sought[k]
            occurs = 0
            for i in range(n):
                occurs += patterns[i] == wanted
            found[k] += occurs

    return count


def _count_trailing(_numba: Any) -> Callable[..., None]:
    def count(patterns, n, wanted, slots, gathered, piece, tables):
        half, low = np.uint32(16), np.uint32(65535)
        for start in range(0, n, piece):
            many = 0
            for i in range(start, min(start + piece, n)):
                pattern = patterns[i]
                gathered[many] = pattern
                many += np.int64(wanted[np.int64(pattern >> half)])
            for i in range(many):
                pattern = gathered[i]
                row = np.int64(slots[np.int64(pattern >> half)]) - 1
                tables[65536 * row + np.int64(pattern & low)] += 1

    return count


def _distinct(_numba: Any) -> Callable[..., None]:
    def distinct(patterns, n, limit, table, size, found, count):
        mask = np.uint32(size - 1)
        many = count[0]
        for i in range(n):
            pattern = patterns[i]
            slot = np.int64((pattern * np.uint32(2654435761) >> np.uint32(12)) & mask)
            while table[slot] >= 0 and found[np.int64(table[slot])] != pattern:
                slot = (slot + 1) & np.int64(mask)
            if table[slot] < 0:
                if many == limit:
                    many += 1
                    break
                found[many] = pattern
                table[slot] = many
                many += 1
        count[0] = many

    return distinct


_SOURCE = Path(__file__).read_text(encoding="utf-8")
_COUNT_16 = Native("count_16", _count_16, ("uint16*", "int64", "uint32*"), _SOURCE)
_COUNT_32 = Native("count_32", _count_32, ("uint32*", "int64", "uint64*"), _SOURCE)
_COUNT_EXACTLY = Native("count_exactly", _count_exactly, ("uint32*", "int64", "uint32*", "int64", "int64*"), _SOURCE)
_TRAILING = ("uint32*", "int64", "uint8*", "uint8*", "uint32*", "int64")
_COUNT_TRAILING = {
    kind: Native(f"count_trailing_{kind}", _count_trailing, (*_TRAILING, f"{kind}*"), _SOURCE)
    for kind in ("uint32", "int64")
}
_DISTINCT = Native(
    "distinct_up_to", _distinct, ("uint32*", "int64", "int64", "int32*", "int64", "uint32*", "int64*"), _SOURCE
)


def count_16(patterns: np.ndarray, tables: np.ndarray) -> None:
    """Add to `tables`, (2, 65536) uint32, how often each of the uint16 `patterns` occurs.

    >>> tables = np.zeros((2, 65536), np.uint32)
    >>> count_16(np.uint16([7, 65535, 7]), tables)
    >>> tables.sum(axis=0)[[7, 65535]].tolist()
    [2, 1]
    """
    _COUNT_16(patterns, patterns.size, tables)


def count_32(patterns: np.ndarray, tables: np.ndarray) -> None:
    """Add to `tables`, (2, 65536) uint64, by the leading half of uint32 `patterns`: 2^COUNT and the trailing half.

    >>> tables = np.zeros((2, 65536), np.uint64)
    >>> count_32(np.uint32([0x30005, 0x30006]), tables)
    >>> [divmod(int(entry), 1 << COUNT) for entry in tables[:, 3]]
    [(1, 5), (1, 6)]
    """
    _COUNT_32(patterns, patterns.size, tables)


def count_exactly(patterns: np.ndarray, sought: np.ndarray, found: np.ndarray) -> None:
    """Add to `found`, int64, how often each of the uint32 `sought` occurs: a handful, such as zero and infinity.

    >>> found = np.zeros(2, np.int64)
    >>> count_exactly(np.uint32([5, 0, 5]), np.uint32([0, 5]), found)
    >>> found.tolist()
    [1, 2]
    """
    _COUNT_EXACTLY(patterns, patterns.size, sought, sought.size, found)


def count_trailing(patterns: np.ndarray, slots: np.ndarray, gathered: np.ndarray, tables: np.ndarray) -> None:
    """Where `slots` has a row for the leading half of a uint32 pattern, count its trailing half in that row.

    `slots` is (65536,) uint8 with 0 for no row, `tables` (rows, 65536) uint32 or int64. Wanted patterns are moved to
    `gathered`, uint32, first, one fewer than it has room for at a time. Every pattern is written there, and the next
    one over it where it is not wanted: a store costs less than a wrong guess.

    >>> slots, tables = np.zeros(65536, np.uint8), np.zeros((1, 65536), np.uint32)
    >>> slots[3] = 1
    >>> count_trailing(np.uint32([0x30005, 0x40005, 0x30005]), slots, np.empty(3, np.uint32), tables)
    >>> int(tables[0, 5]), int(tables.sum())
    (2, 2)
    """
    wanted = np.minimum(slots, 1)
    loop = _COUNT_TRAILING[tables.dtype.name]
    loop(patterns, patterns.size, wanted, slots, gathered, gathered.size - 1, tables)


def distinct_up_to(patterns: np.ndarray, limit: int, table: np.ndarray, found: np.ndarray, count: np.ndarray) -> None:
    """Raise `count`, (1,) int64, by how many distinct uint32 `patterns` there are beside those in `found` already.

    `table`, int32, holds indices into `found` by hash, -1 for none; its size is a power of two above 2 x `limit`.
    Gives up with `limit` + 1.

    >>> count = np.zeros(1, np.int64)
    >>> distinct_up_to(np.uint32([5, 9, 5]), 3, np.full(8, -1, np.int32), np.empty(3, np.uint32), count)
    >>> count.tolist()
    [2]
    """
    _DISTINCT(patterns, patterns.size, limit, table, table.size, found, count)

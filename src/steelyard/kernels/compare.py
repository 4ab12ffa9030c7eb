"""Sums and counts over pairs of numbers, in 16 interleaved lanes so that the order of every sum is fixed.

The lanes make the result the same, bit for bit, on every machine and in plain numpy, and let the compiler use wide
registers. Numbers that are not finite spoil the sums: whoever finds a sum that is not finite adds anew with care.

Every loop adds to
    sums    (5, 16) float64: of |b - a|, (b - a)^2, a^2, b^2, and the largest |b - a|;
    counts  (6,) int64: of pairs whose bits differ, whose values differ, whose signs differ (neither is zero), where
            b = -a (not zero), where only b is zero, and where only a is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.kernels.native import Native

CHUNK = 1024  # pairs at a time: they stay in the first cache, and their counts fit into 16 bits


def _inner(numba: Any, bits: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two loops over a chunk: one over the numbers, one over their bits as unsigned numbers of `bits` bits."""
    unsigned = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    sign, zero = unsigned(1 << (bits - 1)), unsigned(0)
    magnitude = unsigned((1 << (bits - 1)) - 1)

    @numba.njit(error_model="numpy")
    def add(a, b, start, end, sums):
        whole = end - (end - start) % 16
        for i in range(start, whole, 16):
            for j in range(16):
                x = np.float64(a[i + j])
                y = np.float64(b[i + j])
                d = y - x
                size = abs(d)
                sums[j] += size
                sums[16 + j] += d * d
                sums[32 + j] += x * x
                sums[48 + j] += y * y
                sums[64 + j] = max(sums[64 + j], size)
        for j in range(end - whole):
            x = np.float64(a[whole + j])
            y = np.float64(b[whole + j])
            d = y - x
            sums[j] += abs(d)
            sums[16 + j] += d * d
            sums[32 + j] += x * x
            sums[48 + j] += y * y
            sums[64 + j] = max(sums[64 + j], abs(d))

    @numba.njit(error_model="numpy")
    def count(a, b, start, end, counts):
        differ = unsigned(0)
        signed_zeros = unsigned(0)
        flips = unsigned(0)
        negated = unsigned(0)
        zeroed = unsigned(0)
        filled = unsigned(0)
        for i in range(start, end):
            x = a[i]
            y = b[i]
            d = unsigned(x ^ y)
            no_x = (x & magnitude) == zero
            no_y = (y & magnitude) == zero
            differ = unsigned(differ + unsigned(d != zero))
            signed_zeros = unsigned(signed_zeros + unsigned((d == sign) & no_x))
            flips = unsigned(flips + unsigned((d >= sign) & (not no_x) & (not no_y)))
            negated = unsigned(negated + unsigned((d == sign) & (not no_x)))
            zeroed = unsigned(zeroed + unsigned(no_y & (not no_x)))
            filled = unsigned(filled + unsigned(no_x & (not no_y)))
        counts[0] += np.int64(differ)
        counts[1] += np.int64(differ) - np.int64(signed_zeros)
        counts[2] += np.int64(flips)
        counts[3] += np.int64(negated)
        counts[4] += np.int64(zeroed)
        counts[5] += np.int64(filled)

    return add, count


def _plain(bits: int) -> Callable[[Any], Callable[..., None]]:
    def build(numba: Any) -> Callable[..., None]:
        add, count = _inner(numba, bits)

        def compare(a, b, bits_a, bits_b, n, sums, counts):
            for start in range(0, n, CHUNK):
                end = min(start + CHUNK, n)
                add(a, b, start, end, sums)
                count(bits_a, bits_b, start, end, counts)

        return compare

    return build


def _half(numba: Any) -> Callable[..., None]:
    add, count = _inner(numba, 16)

    def compare(a, b, wide_a, wide_b, x, y, n, sums, counts):
        for start in range(0, n, CHUNK):
            end = min(start + CHUNK, n)
            for i in range(end - start):
                wide_a[i] = np.uint32(a[start + i]) << np.uint32(16)
                wide_b[i] = np.uint32(b[start + i]) << np.uint32(16)
            add(x, y, 0, end - start, sums)
            count(a, b, start, end, counts)

    return compare


_SOURCE = Path(__file__).read_text(encoding="utf-8")
_ENDS = ("int64", "float64*", "int64*")
_LOOPS = {
    width: Native(
        f"compare_{width}", _plain(width), (*(f"float{width}*",) * 2, *(f"uint{width}*",) * 2, *_ENDS), _SOURCE
    )
    for width in (32, 64)
}
_BFLOAT16 = Native(
    "compare_bfloat16", _half, (*("uint16*",) * 2, *("uint32*",) * 2, *("float32*",) * 2, *_ENDS), _SOURCE
)


def compare(a: np.ndarray, b: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Add up the pairs of two flat arrays of float32, or of float64, or of the bits of bfloat16 as uint16.

    >>> sums, counts = np.zeros((5, 16)), np.zeros(6, np.int64)
    >>> compare(np.float32([1, -2, 3]), np.float32([1, 2, 0]), sums, counts)
    >>> sums.sum(axis=1).tolist(), counts.tolist()
    ([7.0, 25.0, 14.0, 5.0, 7.0], [2, 2, 1, 1, 1, 0])
    """
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if a.dtype == np.uint16:
        wide = np.empty((2, CHUNK), np.uint32)  # each is handed over twice: to write bits, and to read numbers
        _BFLOAT16(a, b, wide[0], wide[1], wide[0], wide[1], a.size, sums, counts)
    else:
        _LOOPS[8 * a.itemsize](a, b, a, b, a.size, sums, counts)

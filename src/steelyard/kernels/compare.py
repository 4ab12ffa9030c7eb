"""Sums and counts over pairs of numbers, in 16 interleaved lanes so that the order of every sum is fixed.

The lanes make the result the same, bit for bit, on every machine and in plain numpy, and let the compiler use
wide registers. Numbers that are not finite spoil the sums: whoever finds a sum that is not finite adds anew with care.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel

WIDEN = 1024  # 16-bit numbers that are widened at a time: they stay in the first cache


@kernel
def compare(a, b, bits_a, bits_b, sums, counts):
    """Add up the pairs of two flat float arrays, of which `bits_a` and `bits_b` are the bits as unsigned numbers.

    sums: (6, 16), of |b - a|, (b - a)^2, a^2, b^2, ab, and the largest |b - a|;
    counts: (6,), of pairs whose bits differ, whose values differ, whose signs differ, and where b = -a, and of those
    where only b and where only a is zero.
    """
    found = np.zeros((6, 16), np.int64)
    whole = a.size - a.size % 16
    for i in range(0, whole, 16):
        for j in range(16):
            x = np.float64(a[i + j])
            y = np.float64(b[i + j])
            d = y - x
            size = abs(d)
            sums[0, j] += size
            sums[1, j] += d * d
            sums[2, j] += x * x
            sums[3, j] += y * y
            sums[4, j] += x * y
            sums[5, j] = max(sums[5, j], size)
            found[0, j] += bits_a[i + j] != bits_b[i + j]
            found[1, j] += x != y
            found[2, j] += ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))
            found[3, j] += (x == -y) & (x != 0)
            found[4, j] += (x != 0) & (y == 0)
            found[5, j] += (x == 0) & (y != 0)
    for j in range(a.size - whole):
        x = np.float64(a[whole + j])
        y = np.float64(b[whole + j])
        d = y - x
        sums[0, j] += abs(d)
        sums[1, j] += d * d
        sums[2, j] += x * x
        sums[3, j] += y * y
        sums[4, j] += x * y
        sums[5, j] = max(sums[5, j], abs(d))
        found[0, j] += bits_a[whole + j] != bits_b[whole + j]
        found[1, j] += x != y
        found[2, j] += ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))
        found[3, j] += (x == -y) & (x != 0)
        found[4, j] += (x != 0) & (y == 0)
        found[5, j] += (x == 0) & (y != 0)
    for k in range(6):
        for j in range(16):
            counts[k] += found[k, j]


@kernel
def compare_bfloat16(a, b, sums, counts):
    """`compare` of two flat arrays that hold the bits of bfloat16 numbers: the upper half of a float32 each."""
    wide_a = np.empty(WIDEN, np.uint32)
    wide_b = np.empty(WIDEN, np.uint32)
    x = wide_a.view(np.float32)
    y = wide_b.view(np.float32)
    for start in range(0, a.size, WIDEN):
        n = min(WIDEN, a.size - start)
        for i in range(n):
            wide_a[i] = np.uint32(a[start + i]) << np.uint32(16)
            wide_b[i] = np.uint32(b[start + i]) << np.uint32(16)
        compare(x[:n], y[:n], wide_a[:n], wide_b[:n], sums, counts)

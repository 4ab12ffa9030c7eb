"""The distinct values of an array, up to a limit, in one pass and without sorting."""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel


@kernel
def distinct(patterns, limit, codes):
    """The distinct values of unsigned `patterns` in order of appearance; `codes` receives the index of each.

    Gives up as soon as there are more than `limit`: the result then has `limit` + 1 entries and `codes` is
    not complete.
    """
    bits = 4
    while (1 << bits) < 2 * (limit + 1):
        bits += 1
    mask = np.uint64((1 << bits) - 1)
    shift = np.uint64(64 - bits)
    table = np.full(1 << bits, -1, np.int32)  # hash -> index into found
    found = np.empty(limit + 1, patterns.dtype)
    count = 0
    for i in range(patterns.size):
        pattern = patterns[i]
        slot = (np.uint64(pattern) * np.uint64(0x9E3779B97F4A7C15)) >> shift
        while table[slot] >= 0 and found[table[slot]] != pattern:
            slot = (slot + np.uint64(1)) & mask
        if table[slot] < 0:
            found[count] = pattern
            if count == limit:
                return found
            table[slot] = count
            count += 1
        codes[i] = table[slot]
    return found[:count]

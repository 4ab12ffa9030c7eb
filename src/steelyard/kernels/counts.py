"""How often each bit pattern occurs. From the counts of 65,536 patterns every statistic follows exactly.

Neighbours are counted in two tables in turn: a counter that was just written is slow to read again, and weights
that are all alike would wait for it at every element.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel

COUNT = 40  # a packed entry of `count_32`: the count above this bit, the sum of the trailing halves below
PER_TABLE = 1 << 23  # elements that the two tables of `count_32` hold before they must be emptied


@kernel
def count_16(patterns, tables):
    """Add to `tables`, (2, 65536) uint32, how often each of the uint16 `patterns` occurs."""
    n = patterns.size
    one = np.uint32(1)
    for i in range(n // 2):
        tables[0, patterns[2 * i]] += one
        tables[1, patterns[2 * i + 1]] += one
    if n % 2:
        tables[0, patterns[n - 1]] += one


@kernel
def count_32(patterns, tables):
    """Add to `tables`, (2, 65536) uint64, by the leading half of uint32 `patterns`: 2^COUNT and the trailing half."""
    n = patterns.size
    half, low, one = np.uint32(16), np.uint32(65535), np.uint64(1 << COUNT)
    for i in range(n // 2):
        a, b = patterns[2 * i], patterns[2 * i + 1]
        tables[0, a >> half] += np.uint64(a & low) + one
        tables[1, b >> half] += np.uint64(b & low) + one
    if n % 2:
        a = patterns[n - 1]
        tables[0, a >> half] += np.uint64(a & low) + one


@kernel
def count_exactly(patterns, sought, found):
    """Add to `found` how often each of the uint32 `sought` occurs: a handful, such as zero and infinity."""
    for k in range(sought.size):
        wanted = sought[k]
        count = 0
        for i in range(patterns.size):
            count += patterns[i] == wanted
        found[k] += count


@kernel
def gather(patterns, wanted, out):
    """Move the uint32 `patterns` whose leading half is `wanted`, (65536,) uint8 of 0 or 1, to `out`; how many they are.

    Every pattern is written, and the next one over it where it is not wanted: a store costs less than a wrong guess.
    """
    count = np.int64(0)
    half = np.uint32(16)
    for i in range(patterns.size):
        pattern = patterns[i]
        out[count] = pattern
        count += np.int64(wanted[np.int64(pattern >> half)])
    return count


@kernel
def count_trailing(patterns, slots, tables):
    """Where `slots` has a row for the leading half of a uint32 pattern, count its trailing half in that row.

    `slots` is (65536,) uint8 with 0 for no row, `tables` (rows, 65536).
    """
    half, low = np.uint32(16), np.uint32(65535)
    for i in range(patterns.size):
        slot = slots[patterns[i] >> half]
        if slot != 0:
            tables[slot - 1, patterns[i] & low] += 1


@kernel
def distinct_up_to(patterns, limit, table, found, count):
    """How many distinct uint32 `patterns` there are beside the `count` that are in `found` already.

    `table` holds indices into `found` by hash, -1 for none; its size is a power of two above 2 x `limit`. Gives up
    with `limit` + 1.
    """
    mask = np.uint32(table.size - 1)
    for i in range(patterns.size):
        pattern = patterns[i]
        slot = (pattern * np.uint32(2654435761) >> np.uint32(12)) & mask
        while table[slot] >= 0 and found[table[slot]] != pattern:
            slot = (slot + np.uint32(1)) & mask
        if table[slot] < 0:
            if count == limit:
                return limit + 1
            found[count] = pattern
            table[slot] = count
            count += 1
    return count

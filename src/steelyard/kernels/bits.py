"""Whole numbers of equal width, packed without gaps, the least significant bit first."""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel


@kernel
def pack_bits(values, width):
    """The low `width` (1 to 64) bits of unsigned `values`, packed into ceil(n * width / 8) bytes."""
    packed = np.zeros((values.size * width + 7) // 8, np.uint8)
    held = np.uint64(0)  # bits that wait for their byte
    count = 0
    at = 0
    for i in range(values.size):
        value = np.uint64(values[i])
        left = width
        while left > 0:
            take = min(left, 32)  # in two halves, so that at most 7 + 32 bits wait
            held |= (value & np.uint64((1 << take) - 1)) << np.uint64(count)
            value >>= np.uint64(take)
            count += take
            left -= take
            while count >= 8:
                packed[at] = np.uint8(held & np.uint64(255))
                at += 1
                held >>= np.uint64(8)
                count -= 8
    if count > 0:
        packed[at] = np.uint8(held & np.uint64(255))
    return packed


@kernel
def unpack_bits(packed, width, out):
    """Fill unsigned `out` from `packed`, the inverse of `pack_bits`; `packed` must be long enough."""
    held = np.uint64(0)
    count = 0
    at = 0
    for i in range(out.size):
        value = np.uint64(0)
        done = 0
        while done < width:
            take = min(width - done, 32)
            while count < take:
                held |= np.uint64(packed[at]) << np.uint64(count)
                at += 1
                count += 8
            value |= (held & np.uint64((1 << take) - 1)) << np.uint64(done)
            held >>= np.uint64(take)
            count -= take
            done += take
        out[i] = value

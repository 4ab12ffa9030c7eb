"""An adaptive binary range coder: what each symbol costs is learned from the symbols before it.

Decides how probabilities are kept, learned and mixed, and how bits become bytes. Integer arithmetic only, so
that every machine decodes what any other encoded. One loop codes and decodes, so that both directions learn
alike. Everything that one kernel calls is in this file: machine code is cached by file.
Sources: G. N. N. Martin, Range encoding, 1979; the carry and the 32-bit range as in LZMA; counted adaptation
and logistic mixing as in M. Mahoney, Adaptive weighing of context models (PAQ), 2005.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from steelyard.kernels import kernel

LOW, RANGE, AT, CODE = 0, 1, 2, 3  # what the state of a coder holds
TOP = 1 << 24  # the range is kept above this
HALF = 1 << 37  # probability 1/2 and count 0: 28 bits of probability above 10 bits of count
STRETCHED = 2816  # ln(p / (1 - p)) in 1/256, at most 11
SLOTS = 1 << 18  # the most entries of one table of contexts
INPUTS = 7


@cache
def tables():
    """Logistic function (16 bits) by its argument in 1/256, its inverse by 14 bits, and 2^16 / (n + 1.6)."""
    with localcontext() as context:
        context.prec = 30  # correctly rounded by definition, unlike the exponential of a maths library
        curve = [int(65536 / (1 + (Decimal(-i) / 256).exp()) + Decimal("0.5")) for i in range(STRETCHED + 1)]
    right = np.clip(np.array(curve, np.int64), 1, 65535)
    squash = np.concatenate([65536 - right[:0:-1], right])
    centres = np.arange(1 << 14, dtype=np.int64) * 4 + 2
    stretch = np.searchsorted(squash, centres).clip(0, 2 * STRETCHED) - STRETCHED
    return squash, stretch, (np.int64(655360) // (10 * np.arange(1024, dtype=np.int64) + 16))


@kernel
def start(coder, buffer, decoding):
    """Set a coder to the beginning of `buffer`."""
    coder[LOW], coder[RANGE], coder[AT], coder[CODE] = 0, (1 << 32) - 1, 0, 0
    if decoding:
        for _ in range(4):
            coder[CODE] = (coder[CODE] << 8) | (buffer[coder[AT]] if coder[AT] < buffer.size else 0)
            coder[AT] += 1


@kernel
def code_bit(coder, buffer, p, bit, decoding):
    """Code `bit`, or decode one, where 1 has the probability p / 2^16; beyond the buffer, zeros are read."""
    bound = (coder[RANGE] >> 16) * p
    if decoding:
        bit = 1 if coder[CODE] < bound else 0
    if bit:
        coder[RANGE] = bound
    else:
        coder[RANGE] -= bound
        if decoding:
            coder[CODE] -= bound
        else:
            coder[LOW] += bound
    while coder[RANGE] < TOP:
        coder[RANGE] <<= 8
        if decoding:
            byte = np.int64(buffer[coder[AT]]) if coder[AT] < buffer.size else np.int64(0)
            coder[CODE] = (coder[CODE] << 8) | byte
        else:
            if coder[LOW] >> 32:
                carry(coder, buffer)
            if coder[AT] < buffer.size:
                buffer[coder[AT]] = coder[LOW] >> 24
            coder[LOW] = (coder[LOW] & (TOP - 1)) << 8
        coder[AT] += 1
    return bit


@kernel
def carry(coder, buffer):
    """Add one to the bytes that have been written."""
    coder[LOW] &= (1 << 32) - 1
    at = min(coder[AT], buffer.size) - 1
    while at > 0 and buffer[at] == 255:
        buffer[at] = 0
        at -= 1
    if at >= 0:
        buffer[at] += 1


@kernel
def failed(coder, buffer, decoding):
    """Whether more was written than fits, or more read than there was."""
    return coder[AT] > buffer.size + (4 if decoding else 0)


@kernel
def finish(coder, buffer, decoding):
    """Bytes of the whole stream, or -1: too few for the symbols, too many, or more than the buffer holds.

    The fewest bytes are written that name a number within the last range; a reader has seen four more
    than were written before them.
    """
    if decoding:
        return buffer.size if coder[AT] - 4 <= buffer.size <= coder[AT] else -1
    if coder[LOW] >> 32:
        carry(coder, buffer)
    for count in range(5):
        rest = (1 << (32 - 8 * count)) - 1
        value = (coder[LOW] + rest) & ~rest
        if value < coder[LOW] + coder[RANGE]:
            coder[LOW] = value
            if value >> 32:
                carry(coder, buffer)
            for i in range(count):
                if coder[AT] < buffer.size:
                    buffer[coder[AT]] = (coder[LOW] >> (24 - 8 * i)) & 255
                coder[AT] += 1
            break
    return coder[AT] if coder[AT] <= buffer.size else -1


@kernel
def learned(state, bit, limit, rates):
    """A probability with its count, after `bit` was seen; from `limit` observations on, old ones fade."""
    p, n = state >> 10, state & 1023
    p += (((bit << 28) - p) * rates[n]) >> 16
    return (p << 10) | (n + 1 if n < limit else n)


@kernel
def code_adaptive(symbols, buffer, depth, slow, fast, rates, decoding):
    """Code `symbols` (uint8, below 2^depth) into `buffer`, or decode them from it: bytes, or -1.

    Each bit of a symbol, given those above it, has the mean of two probabilities, one that fades after
    `slow` observations and one that fades after `fast` (at most 1023).
    """
    coder = np.zeros(4, np.int64)
    start(coder, buffer, decoding)
    first = np.full(1 << depth, HALF, np.int64)
    second = np.full(1 << depth, HALF, np.int64)
    for i in range(symbols.size):
        if failed(coder, buffer, decoding):
            return -1
        symbol = np.int64(symbols[i])
        node = 1
        for place in range(depth - 1, -1, -1):
            p = ((first[node] >> 10) + (second[node] >> 10)) >> 13
            bit = code_bit(coder, buffer, min(max(p, 1), 65535), (symbol >> place) & 1, decoding)
            first[node] = learned(first[node], bit, slow, rates)
            second[node] = learned(second[node], bit, fast, rates)
            node = 2 * node + bit
        if decoding:
            symbols[i] = node - (1 << depth)
    return finish(coder, buffer, decoding)


@kernel
def octaves(count, of, steps):
    """1024 * count / of on a logarithmic scale, with `steps` (1 or 2) levels for each doubling; 0 below 2."""
    ratio = ((count << 10) + of // 2) // of
    level = 0
    while ratio >= 4:
        level += steps
        ratio >>= 1
    return level + (0 if ratio < 2 else steps if ratio == 2 else 2 * steps - 1)


@kernel
def contexts(symbols, i, width, depth, busy, in_row, found):
    """For symbol `i` of rows of `width`, what each model but the first looks at, as whole numbers.

    `busy` counts by column, and `in_row` in this row, how many symbols were not the usual one.
    """
    column, row = i % width, i // width
    left = np.int64(symbols[i - 1]) if column > 0 else 0
    left2 = np.int64(symbols[i - 2]) if column > 1 else 0
    above = np.int64(symbols[i - width]) if row > 0 else 0
    above2 = np.int64(symbols[i - 2 * width]) if row > 1 else 0
    found[0] = left
    found[1] = (left << depth) | left2
    found[2] = column if width < symbols.size else (left << 1) ^ (left2 << 9) ^ (i > 0)
    found[3] = (left << depth) | above
    found[4] = (above << depth) | above2
    if depth == 1:
        right = np.int64(symbols[i - width + 1]) if row > 0 and column + 1 < width else 0
        corner = np.int64(symbols[i - width - 1]) if row > 0 and column > 0 else 0
        found[3] |= (right << 2) | (corner << 3) | (left2 << 4)
        found[1] |= (np.int64(symbols[i - 3]) if column > 2 else 0) << 2
    near = 6 * busy[column + 2] + 2 * (busy[column + 1] + busy[column + 3]) + busy[column] + busy[column + 4]
    found[5] = octaves(near, 12 * row + 8, 2) * 16 + min(octaves(in_row, column + 4, 1), 15)


@kernel
def code_contexts(symbols, width, buffer, depth, usual, limit, rate, squash, stretch, rates, decoding):
    """Like `code_adaptive`, the symbols being rows of `width`: several models are mixed, weighted by success.

    The models know: nothing; the symbol before; the two before; the column; the neighbours before and
    above; the two above; how often symbols differ from the `usual` one in nearby columns and in this row.
    `limit` is the fading of each, `rate` the speed at which weights learn.
    """
    nodes = 1 << depth
    coder = np.zeros(4, np.int64)
    start(coder, buffer, decoding)
    entries = np.full(INPUTS, 1 << 2 * depth, np.int64)
    entries[0], entries[1] = 1, 1 << depth
    entries[INPUTS - 1] = 32 * 16
    if depth == 1:
        entries[2], entries[4] = 8, 32
    if width < symbols.size:
        entries[3] = width
    begins = np.zeros(INPUTS + 1, np.int64)
    for m in range(INPUTS):
        entries[m] = min(entries[m], SLOTS >> depth)
        begins[m + 1] = begins[m] + entries[m] * nodes
    states = np.full(begins[INPUTS], HALF, np.int64)
    weights = np.full((depth * 4, INPUTS), 1 << 13, np.int64)
    found = np.zeros(INPUTS - 1, np.int64)
    at = np.zeros(INPUTS, np.int64)
    inputs = np.zeros(INPUTS, np.int64)
    busy = np.zeros(width + 4, np.int64)
    in_row = seen = 0
    for i in range(symbols.size):
        if failed(coder, buffer, decoding):
            return -1
        if i % width == 0:
            in_row = 0
        symbol = np.int64(symbols[i])
        contexts(symbols, i, width, depth, busy, in_row, found)
        for m in range(1, INPUTS):
            at[m] = begins[m] + (found[m - 1] % entries[m]) * nodes
        node = 1
        for place in range(depth - 1, -1, -1):
            known = states[at[3] + node] & 1023
            chosen = place * 4 + (0 if known < 2 else 1 if known < 8 else 2 if known < 32 else 3)
            total = 0
            for m in range(INPUTS):
                inputs[m] = stretch[states[at[m] + node] >> 24]
                total += weights[chosen, m] * inputs[m]
            p = squash[min(max(total >> 16, -STRETCHED), STRETCHED) + STRETCHED]
            bit = code_bit(coder, buffer, p, (symbol >> place) & 1, decoding)
            seen += 1
            error = ((bit << 16) - p) * (rate + rate * 1024 // (seen + 64))
            for m in range(INPUTS):
                weights[chosen, m] += (inputs[m] * error + (1 << 19)) >> 20
                states[at[m] + node] = learned(states[at[m] + node], bit, limit, rates)
            node = 2 * node + bit
        if decoding:
            symbols[i] = node - nodes
        if node - nodes != usual:
            busy[i % width + 2] += 1
            in_row += 1
    return finish(coder, buffer, decoding)

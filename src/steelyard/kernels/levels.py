"""Whole numbers in rows, coded by adaptive binary contexts: what a quantizer leaves of a matrix.

Decides how a number becomes binary decisions, what each is expected to be, and how a trellis of quantizers is
followed. Integer arithmetic only, so that every machine decodes what any other encoded; one loop codes and decodes, so
that both directions learn alike. Everything that one kernel calls is in this file: machine code is cached by file.

The size of a number is foreseen from its column (a mean that forgets slowly) times how large its row has been so far.
Sources: range coding as in `coder`; the binary decisions as in DeepCABAC, S. Wiedemann et al., 2019 (arXiv 1907.11900);
the trellis: M. W. Marcellin and T. R. Fischer, Trellis Coded Quantization, 1990, with the union quantizers and the
sign-symmetric levels of H. Schwarz et al., Dependent Scalar Quantization, 2019.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel

CLASSES = 128  # sizes foreseen: quarters of octaves from 2^-7 on
STEPS = 14  # decisions "larger than this?" before the rest is written in plain bits
PLACES = 2 * STEPS + 16  # adaptive decisions of a class: the steps for both quantizers, and the bit below a step
FRACTION = 12  # bits below the point of a mean
PRIOR = 8  # elements that a row is thought to have had before it begins
TOP = 1 << 24  # the range is kept above this


@kernel
def logarithm(x):
    """log2(x) in eighths, roughly: exact at powers of two, straight between them; x >= 1."""
    place = 0
    y = x
    while y >= 1 << 16:
        y >>= 16
        place += 16
    if y >= 1 << 8:
        y >>= 8
        place += 8
    if y >= 1 << 4:
        y >>= 4
        place += 4
    if y >= 1 << 2:
        y >>= 2
        place += 2
    if y >= 2:
        place += 1
    return 8 * place + (((x << 3) >> place) & 7)


@kernel
def foreseen(column, row, of):
    """The class of the size of the next number: its column's mean, times `row` / `of`."""
    return min(max((logarithm(column) + logarithm(row) - logarithm(of)) // 2 - 4 * FRACTION + 28, 0), CLASSES - 1)


@kernel
def coarseness(size):
    """How many low bits of a number of a class are not told by steps: such that steps are at most some six."""
    return max((size - 28 - 2) // 4, 0)


@kernel
def shift(low, at, buffer):
    """Write the top byte of what is done, with its carry; the new `low` and `at`."""
    if low >> 32:
        low &= (1 << 32) - 1
        back = min(at, buffer.size) - 1
        while back >= 0 and buffer[back] == 255:
            buffer[back] = 0
            back -= 1
        if back >= 0:
            buffer[back] += 1
    if at < buffer.size:
        buffer[at] = low >> 24
    return (low & (TOP - 1)) << 8, at + 1


@kernel
def code_bit(low, size, at, buffer, p, bit, decoding):
    """Code `bit`, or decode one, where 1 has the probability p / 2^16: (bit, low, size, at).

    `low` is the low end of the range when coding, and the distance of the code from it when decoding.
    """
    bound = (size >> 16) * p
    if decoding:
        bit = np.int64(low < bound)
    if bit:
        size = bound
    else:
        size -= bound
        if decoding:
            low -= bound
        else:
            low += bound
    while size < TOP:
        size <<= 8
        if decoding:
            low = (low << 8) | (np.int64(buffer[at]) if at < buffer.size else np.int64(0))
            at += 1
        else:
            low, at = shift(low, at, buffer)
    return bit, low, size, at


@kernel
def finish(low, size, at, buffer, decoding):
    """Bytes of the whole stream, or -1: too few for the numbers, too many, or more than the buffer holds."""
    if decoding:
        return buffer.size if at - 4 <= buffer.size <= at else -1
    for count in range(5):  # the fewest bytes that name a number within the last range
        rest = (1 << (32 - 8 * count)) - 1
        value = (low + rest) & ~rest
        if value < low + size:
            for _ in range(count):
                value, at = shift(value, at, buffer)
            if count == 0 and value >> 32:
                shift(value, at, buffer[:at])
            break
    return at if at <= buffer.size else -1


@kernel
def code_levels(levels, width, following, second, buffer, rates, limit, decoding):
    """Code `levels` (int32) in rows of `width` into `buffer`, or decode them from it: bytes, or -1.

    `following` (states, 2) is the next state of the trellis after an even and after an odd level, `second`
    (states) whether a state has the second quantizer.
    """
    chances = np.full(CLASSES * PLACES, 1 << 31, np.int64)
    columns = np.full(width, 1 << FRACTION, np.int64)
    low, size, at = np.int64(0), np.int64((1 << 32) - 1), np.int64(0)
    if decoding:
        for _ in range(4):
            low = (low << 8) | (np.int64(buffer[at]) if at < buffer.size else np.int64(0))
            at += 1
    state = 0
    rows = (levels.size + width - 1) // width
    total = np.int64(width) << FRACTION
    for r in range(rows):
        if at > buffer.size + 4:
            return -1
        rate = 65536 // min(r + 1, 256)
        of = max(PRIOR * total // width, 1)
        row = of
        first = r * width
        for j in range(min(width, levels.size - first)):
            i = first + j
            column = columns[j]
            kind = foreseen(max(column, 1), row, of)
            coarse = coarseness(kind)
            here = kind * PLACES
            place = here + second[state] * STEPS
            level = np.int64(levels[i])
            extent = abs(level)
            high = extent >> coarse
            count = np.int64(0)
            while count < STEPS:
                c = place + count
                p = chances[c] >> 16
                bit, low, size, at = code_bit(low, size, at, buffer, p, np.int64(high > count), decoding)
                learn(chances, c, bit, rates, limit)
                if not bit:
                    break
                count += 1
            if count == STEPS:
                # what is left, by Elias's gamma code
                rest = high - STEPS + 1
                bits = 0
                if decoding:
                    one = np.int64(1)
                    while one and bits < 31:
                        one, low, size, at = code_bit(low, size, at, buffer, 1 << 15, 0, decoding)
                        bits += one
                    rest = np.int64(1)
                else:
                    while rest >> (bits + 1):
                        bits += 1
                    for b in range(bits + 1):
                        one, low, size, at = code_bit(low, size, at, buffer, 1 << 15, np.int64(b < bits), decoding)
                for b in range(bits - 1, -1, -1):
                    one, low, size, at = code_bit(low, size, at, buffer, 1 << 15, (rest >> b) & 1, decoding)
                    if decoding:
                        rest = (rest << 1) | one
                count += rest - 1
            for b in range(coarse - 1, -1, -1):
                bit = (extent >> b) & 1
                if b == coarse - 1:
                    c = here + 2 * STEPS + min(count, 15)
                    p = chances[c] >> 16
                    bit, low, size, at = code_bit(low, size, at, buffer, p, bit, decoding)
                    learn(chances, c, bit, rates, limit)
                else:
                    bit, low, size, at = code_bit(low, size, at, buffer, 1 << 15, bit, decoding)
                count = (count << 1) | bit
            if count:
                bit, low, size, at = code_bit(low, size, at, buffer, 1 << 15, np.int64(level < 0), decoding)
                if decoding:
                    levels[i] = -count if bit else count
            elif decoding:
                levels[i] = 0
            state = following[state, count & 1]
            row += count << FRACTION
            of += column
            change = (((count << FRACTION) - column) * rate) >> 16
            columns[j] = column + change
            total += change
    return finish(low, size, at, buffer, decoding)


@kernel
def decode_levels(levels, width, following, second, buffer, rates, limit):
    """`code_levels` that decodes: what is compiled for one direction takes half the time."""
    return code_levels(levels, width, following, second, buffer, rates, limit, True)


@kernel
def learn(chances, c, bit, rates, limit):
    """Move the chance of a decision towards `bit`; the first `limit` sightings count as in an average."""
    p, n = chances[c] >> 10, chances[c] & 1023
    p += (((bit << 22) - p) * rates[n]) >> 16
    p = min(max(p, 1 << 12), (1 << 22) - (1 << 12))
    chances[c] = (p << 10) | (n + 1 if n < limit else n)


@kernel
def sizes(levels, width, out):
    """The class of the size that is foreseen for each of `levels` (uint8 into `out`), as `code_levels` has it."""
    columns = np.full(width, 1 << FRACTION, np.int64)
    total = np.int64(width) << FRACTION
    for r in range((levels.size + width - 1) // width):
        rate = 65536 // min(r + 1, 256)
        of = max(PRIOR * total // width, 1)
        row = of
        for j in range(min(width, levels.size - r * width)):
            i = r * width + j
            column = columns[j]
            out[i] = foreseen(max(column, 1), row, of)
            extent = abs(np.int64(levels[i])) << FRACTION
            row += extent
            of += column
            change = ((extent - column) * rate) >> 16
            columns[j] = column + change
            total += change


def learning() -> tuple[np.ndarray, int]:
    """How chances learn: 2^16 / (n + 1.6) by the number n of sightings, and the number after which old ones fade."""
    return np.int64(655360) // (10 * np.arange(1024, dtype=np.int64) + 16), 1000

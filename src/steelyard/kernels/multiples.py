"""Whole numbers in rows, most of them 0 and few in all: coded by what is near each of them.

Decides which binary decisions a number is, and what each is foreseen from: shares so far are mixed as log odds, because
the share in a row and the share in a column are then terms of a sum. Integer arithmetic only, but for the costs, so
that every machine decodes what any other encoded; one loop codes and decodes, so that both directions learn alike.
What is called from `coder` is part of the format and does not change; machine code is cached by file.
Sources: the coder and the mixing as in `coder`; the decisions as in DeepCABAC, S. Wiedemann et al., 2019.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel
from steelyard.kernels.coder import HALF, STRETCHED, code_bit, failed, finish, learned, start

INPUTS, LEANS = 7, 3  # what is mixed for a number to be 0 or not, and for its sign
EXTENTS = 16  # decisions "larger than this?" that are learned one by one
RATE, EAGER = 14, 1024  # of learning how to mix: at last, and how much faster at first (over 64 decisions)
FADING = 255  # observations after which old ones fade
MOST = 32767


@kernel
def mixed(inputs, weights, squash):
    """The probability, in 16 bits, that the weighted sum of log odds stands for."""
    total = 0
    for m in range(inputs.size):
        total += weights[m] * inputs[m]
    return min(max(squash[min(max(total >> 16, -STRETCHED), STRETCHED) + STRETCHED], 16), 65520)


@kernel
def improved(inputs, weights, p, bit, seen):
    """Move the weights so that `bit` would have been less surprising."""
    error = ((bit << 16) - p) * (RATE + RATE * EAGER // (seen + 64))
    for m in range(inputs.size):
        weights[m] += (inputs[m] * error + (1 << 19)) >> 20


@kernel
def bits_of(p, bit):
    """What a bit costs where 1 has the probability p / 2^16."""
    return 16 - np.log2(p if bit else 65536 - p)


@kernel
def share(ones, of, prior, weight, stretch):
    """Log odds of a share, drawn towards `prior` (16 bits) as by `weight` observations."""
    return stretch[(((ones << 16) + weight * prior) // (of + weight)) >> 2]


@kernel
def sign_at(numbers, i, column, back):
    """The sign of the number `back` places before, if that lies in the same row, else 0."""
    return np.sign(numbers[i - back]) if back > 0 and column >= back else 0


@kernel
def code_flag(coder, buffer, state, at, bit, rates, decoding):
    """Code a bit by one learned probability."""
    bit = code_bit(coder, buffer, min(max(state[at] >> 22, 1), 65535), bit, decoding)
    state[at] = learned(state[at], bit, 1023, rates)
    return bit


@kernel
def code_columns(coder, buffer, numbers, alive, period, rates, decoding):
    """For each column, whether anything but 0 is there, from the columns before it and `period` before."""
    width = alive.size
    states = np.full(8, HALF, np.int64)
    for j in range(width):
        seen = 0
        for i in range(j, numbers.size, width):
            seen |= numbers[i] != 0
        before = alive[j - 1] if j else 1
        above = alive[j - period] if period and j >= period else before
        after = alive[j - period + 1] if period and j >= period else above
        alive[j] = code_flag(coder, buffer, states, before | above << 1 | after << 2, seen, rates, decoding)


@kernel
def foresee(numbers, i, j, r, period, columns, known, kinds, stretch, inputs):
    """Fill `inputs` with log odds of a number not being 0; the place of its surroundings in `kinds`.

    `columns` counts what was not 0 by column; `known` holds that count and all numbers, in all and in this row.
    """
    width = columns.size
    everywhere = ((known[0] << 16) + 4 * 4096) // (known[1] + 4)
    wide = columns[j] * 2
    wide += columns[j - 1] if j else 0
    wide += columns[j + 1] if j + 1 < width else 0
    wide += columns[j - period] if period and j >= period else 0
    wide += columns[j + period] if period and j + period < width else 0
    near = np.int64(sign_at(numbers, i, j, 1) != 0) | np.int64(sign_at(numbers, i, j, 2) != 0) << 1
    near |= np.int64(sign_at(numbers, i, j, period) != 0) << 2
    near |= np.int64(sign_at(numbers, i, j, period - 1) != 0) << 3
    near |= np.int64(sign_at(numbers, i, j, period + 1 if period else 0) != 0) << 4
    far = np.int64(sign_at(numbers, i, j, 2 * period) != 0) | np.int64(sign_at(numbers, i, j, 3) != 0) << 1
    far |= min(columns[j - 1] if j else 0, 3) << 2 | min(columns[j], 3) << 4
    inputs[0] = stretch[everywhere >> 2]
    inputs[1] = share(known[2], known[3], everywhere, 12, stretch)
    inputs[2] = share(columns[j], r, everywhere, 6, stretch)
    inputs[3] = share(wide, r * 6 + 2, everywhere, 12, stretch)  # two of the columns have counted this row
    at = near * 3 + min(columns[j], 2)
    inputs[4] = stretch[kinds[at] >> 24]
    inputs[5] = stretch[kinds[96 + far] >> 24]
    inputs[6] = 256
    return at, 96 + far


@kernel
def code_sign(coder, buffer, numbers, i, j, period, before, weights, states, seen, tables, negative, decoding):
    """Whether a number is negative, and what that cost; `before` holds the last signs in its column and its row."""
    squash, stretch, rates = tables
    left, up = sign_at(numbers, i, j, 1), sign_at(numbers, i, j, period)
    side, other = sign_at(numbers, i, j, period - 1), sign_at(numbers, i, j, period + 1 if period else 0)
    places = ((left + 1) * 3 + up + 1, 9 + (before[0] + 1) * 3 + before[1] + 1, 18 + (side + 1) * 3 + other + 1)
    inputs = np.zeros(LEANS, np.int64)
    for m in range(LEANS):
        inputs[m] = stretch[states[places[m]] >> 24]
    p = mixed(inputs, weights, squash)
    bit = code_bit(coder, buffer, p, negative, decoding)
    improved(inputs, weights, p, bit, seen)
    for m in range(LEANS):
        states[places[m]] = learned(states[places[m]], bit, FADING, rates)
    return bit, bits_of(p, bit)


@kernel
def code_extent(coder, buffer, states, size, near, rates, decoding):
    """The magnitude of a number that is not 0, what it cost, and what one less would have (at 1: nothing)."""
    extent, more = 1, 1
    cost = less = 0.0
    while more and extent < MOST:
        at = min(extent - 1, EXTENTS - 1)
        p = min(max(states[near, at] >> 22, 16), 65520)
        more = code_bit(coder, buffer, p, np.int64(size > extent), decoding)
        states[near, at] = learned(states[near, at], more, FADING, rates)
        if extent + 1 == size:
            less = cost + bits_of(p, 0)
        cost += bits_of(p, more)
        extent += more
    return extent, cost, less


@kernel
def code_multiples(numbers, width, period, flags, buffer, squash, stretch, rates, decoding, costs):
    """Code whole `numbers` (int32, mostly 0) in rows of `width` into `buffer`, or decode them: bytes, or -1.

    A flag for each row, and with `flags` for each column, says whether anything but 0 is there. Of the rest: is it 0,
    its sign, its magnitude one by one. Neighbours are those in the row and `period` before (0: none).
    `costs` (numbers, 2), unless it is empty, gets the bits of each number and of the one nearer to 0.
    """
    coder = np.zeros(4, np.int64)
    start(coder, buffer, decoding)
    rows = numbers.size // width
    alive = np.ones(width, np.int64)
    if flags:
        code_columns(coder, buffer, numbers, alive, period, rates, decoding)
    columns, signs = np.zeros(width, np.int64), np.zeros(width, np.int64)
    kinds, leaning = np.full(160, HALF, np.int64), np.full(27, HALF, np.int64)
    sizes, living = np.full((3, EXTENTS), HALF, np.int64), np.full(2, HALF, np.int64)
    inputs = np.zeros(INPUTS, np.int64)
    weights = np.array([-26000, 36000, 20000, 24000, 24000, 10000, 0])
    leans = np.full(LEANS, 26000)
    known = np.zeros(4, np.int64)
    before = 1
    for r in range(rows):
        if failed(coder, buffer, decoding):
            return -1
        here = r * width
        seen = np.int64(rows == 1)
        for j in range(width):
            seen |= numbers[here + j] != 0
        if rows > 1:
            before = seen = code_flag(coder, buffer, living, before, seen, rates, decoding)
        if not seen:
            continue
        known[2] = known[3] = last = 0
        for j in range(width):
            if not alive[j]:
                continue
            i = here + j
            number = np.int64(numbers[i])
            first, second = foresee(numbers, i, j, r, period, columns, known, kinds, stretch, inputs)
            p = mixed(inputs, weights, squash)
            there = code_bit(coder, buffer, p, np.int64(number != 0), decoding)
            improved(inputs, weights, p, there, known[1])
            kinds[first] = learned(kinds[first], there, FADING, rates)
            kinds[second] = learned(kinds[second], there, FADING, rates)
            known[1] += 1
            known[3] += 1
            if costs.size:
                costs[i, :] = bits_of(p, there)
            if not there:
                continue
            known[0] += 1
            known[2] += 1
            negative, cost = code_sign(
                coder, buffer, numbers, i, j, period, (signs[j], last), leans, leaning, known[0],
                (squash, stretch, rates), np.int64(number < 0), decoding,
            )  # fmt: skip
            columns[j] += 1
            last = signs[j] = 1 - 2 * negative
            near = min(abs(np.int64(numbers[i - 1])) if j else 0, 2)
            extent, more, less = code_extent(coder, buffer, sizes, abs(number), near, rates, decoding)
            if costs.size:
                costs[i, 1] = costs[i, 0] + cost + less if extent > 1 else bits_of(p, 0)
                costs[i, 0] += cost + more
            if decoding:
                numbers[i] = -extent if negative else extent
    return finish(coder, buffer, decoding)

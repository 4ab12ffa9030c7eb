"""Round the elements of a line one by one, and let those that follow make up for what each one lost.

Decides levels by squared error and price of bits; how lines follow each other is the caller's. Source of a path of its
own for each state of a trellis: the predictive form of M. W. Marcellin and T. R. Fischer, Trellis Coded Quantization of
Memoryless and Gauss-Markov Sources, IEEE Trans. Communications 38, 1990.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel
from steelyard.kernels.trellis import KNOWN, price

RANGE = 256  # elements through which several paths are followed
FAR = 2.0 * KNOWN - 4  # steps, below which every level that is looked at has its price in the table


@kernel
def rounded(line, mix, kinds, prices, lagrangian, levels):
    """Fill `levels` (int32) for `line` (float64, in steps), which becomes the line as each element was rounded.

    An error of element i, in steps, moves those after it by ``mix[i, j]`` of it. `kinds` are classes of sizes and
    `prices` (classes, 2, sizes) their bits, of which one costs as much as a squared error of `lagrangian`.
    """
    n = line.size
    for i in range(n):
        x = abs(line[i])
        guess = int(x + 0.5)
        best, least = guess, 1e300
        for k in range(max(guess - 2, 0), guess + 1):
            total = (x - k) ** 2 + lagrangian * price(prices, kinds[i], 0, k)
            if total < least:
                best, least = k, total
        levels[i] = best if line[i] >= 0 else -best
        move(line[i + 1 :], mix[i, i + 1 :], line[i] - levels[i])


@kernel
def survived(line, mix, kinds, prices, lagrangian, following, second, start, levels):
    """Like `rounded`, along a trellis: the state at the end. `levels` are those of the path, as `trellis.choose` has.

    Each state keeps the path that led to it at the least cost, and how that path moved what follows: what is made up
    for depends on what was chosen. After every `RANGE` elements one path alone goes on.
    """
    n, states = line.size, following.shape[0]
    came, took = np.empty((RANGE, states), np.int64), np.empty((RANGE, states), np.int32)
    lost = np.empty((RANGE, states), np.float32)  # errors, by the state after them
    cost, fresh, sizes = np.empty(states), np.empty(states), np.empty(states)
    moved, other = np.zeros((states, RANGE), np.float32), np.zeros((states, RANGE), np.float32)
    best, least, errors = np.empty((2, states)), np.empty((2, states)), np.empty((2, states))
    for at in range(0, n, RANGE):
        stop = min(at + RANGE, n)
        cost[:] = 1e300
        cost[start] = 0.0
        moved[start, : stop - at] = line[at:stop]
        for i in range(at, stop):
            here, rest = i - at, slice(i - at + 1, stop - at)
            for state in range(states):
                sizes[state] = abs(moved[state, here]) if cost[state] < 1e300 else 0.0
            if sizes.max() < FAR:
                options(sizes, second, prices[kinds[i]].reshape(-1), lagrangian, best, least, errors)
            else:
                for state in range(states):
                    for odd in range(2):
                        found = option(sizes[state], second[state], odd, kinds[i], prices, lagrangian)
                        best[odd, state], least[odd, state], errors[odd, state] = found
            fresh[:] = 1e300
            for state in range(states):
                for odd in range(2):
                    after, total = following[state, odd], cost[state] + least[odd, state]
                    if total < fresh[after]:
                        fresh[after], came[here, after] = total, 2 * state + odd
            for after in range(states):
                if fresh[after] < 1e300:
                    state, odd = came[here, after] >> 1, came[here, after] & 1
                    sign = 1.0 if moved[state, here] >= 0 else -1.0
                    took[here, after], lost[here, after] = sign * best[odd, state], sign * errors[odd, state]
                    carry(other[after, rest], moved[state, rest], mix[i, i + 1 : stop], lost[here, after])
            cost[:] = fresh
            moved, other = other, moved
        state = start = np.argmin(cost)
        for i in range(stop - 1, at - 1, -1):
            levels[i] = took[i - at, state]
            move(line[stop:], mix[i, stop:], lost[i - at, state])
            state = came[i - at, state] >> 1
    return start


@kernel
def move(line, mix, error):
    """Move a line by an error; what is counted from 0 on, as here, goes many at a time."""
    for j in range(line.size):
        line[j] -= mix[j] * error


@kernel
def carry(out, line, mix, error):
    """`out`: the line as `move` leaves it."""
    for j in range(out.size):
        out[j] = line[j] - mix[j] * error


@kernel
def options(sizes, second, prices, lagrangian, best, least, errors):
    """`option` for each state's magnitude below `FAR`, even and odd (2, states), without branches: many at a time.

    prices: bits of each size, of the first quantizer and then of the second.
    """
    for state in range(sizes.size):
        size, q, at = sizes[state], float(second[state]), second[state] * KNOWN
        for odd in range(2):
            k = 2 * np.floor(max(size + q - 2 * odd, 0.0) / 4 + 0.5) + odd
            error = size - (2 * k - (q if k > 0 else 0.0))
            total = error * error + lagrangian * prices[at + np.int64(k)]
            lower = k - 2 if k >= 2 else k
            further = size - (2 * lower - (q if lower > 0 else 0.0))
            other = further * further + lagrangian * prices[at + np.int64(lower)]
            k, error, total = (lower, further, other) if other <= total else (k, error, total)
            if odd:  # the odd level on the other side of zero may be as near
                beyond = size - q + 2
                other = beyond * beyond + lagrangian * prices[at + 1]
                nearer = (size < 1) & (other < total)
                k, error, total = (-1.0, beyond, other) if nearer else (k, error, total)
            best[odd, state], least[odd, state], errors[odd, state] = k, total, error


@kernel
def option(size, quantizer, odd, kind, prices, lagrangian):
    """The best even or odd level for a magnitude, what it costs, and its error."""
    guess = 2 * np.int64((size + quantizer - 2 * odd) / 4 + 0.5) + odd
    best, least, error = np.int64(0), 1e300, 0.0
    for k in range(max(guess - 2, odd), guess + 1, 2):
        value = 2 * k - (quantizer if k > 0 else 0)
        total = (size - value) ** 2 + lagrangian * price(prices, kind, quantizer, k)
        if total < least:
            best, least, error = k, total, size - value
    if odd and size < 1:  # the odd level on the other side of zero may be as near
        value = quantizer - 2.0
        total = (size - value) ** 2 + lagrangian * price(prices, kind, quantizer, 1)
        if total < least:
            best, least, error = -1, total, size - value
    return best, least, error

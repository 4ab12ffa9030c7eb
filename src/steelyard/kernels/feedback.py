"""Round the elements of a line one by one, and let those that follow make up for what each one lost.

Decides levels by squared error and price of bits; how lines follow each other is the caller's. Source of a path of its
own for each state of a trellis: the predictive form of M. W. Marcellin and T. R. Fischer, Trellis Coded Quantization of
Memoryless and Gauss-Markov Sources, IEEE Trans. Communications 38, 1990.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel
from steelyard.kernels.trellis import price

RANGE = 256  # elements through which several paths are followed


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
        lost = line[i] - levels[i]
        for j in range(i + 1, n):
            line[j] -= mix[i, j] * lost


@kernel
def survived(line, mix, kinds, prices, lagrangian, following, second, start, levels):
    """Like `rounded`, along a trellis: the state at the end. `levels` are those of the path, as `trellis.choose` has.

    Each state keeps the path that led to it at the least cost, and how that path moved what follows: what is made up
    for depends on what was chosen. After every `RANGE` elements one path alone goes on.
    """
    n, states = line.size, following.shape[0]
    came, took = np.empty((RANGE, states), np.uint8), np.empty((RANGE, states), np.int32)
    lost = np.empty((RANGE, states), np.float32)  # errors, by the state after them
    cost, fresh = np.empty(states), np.empty(states)
    moved, other = np.empty((states, RANGE), np.float32), np.empty((states, RANGE), np.float32)
    for at in range(0, n, RANGE):
        stop = min(at + RANGE, n)
        cost[:] = 1e300
        cost[start] = 0.0
        moved[start, : stop - at] = line[at:stop]
        for i in range(at, stop):
            fresh[:] = 1e300
            for state in range(states):
                if cost[state] < 1e300:
                    x, quantizer = moved[state, i - at], second[state]
                    for odd in range(2):
                        level, least, error = option(abs(x), quantizer, odd, kinds[i], prices, lagrangian)
                        after, total = following[state, odd], cost[state] + least
                        if total < fresh[after]:
                            fresh[after], came[i - at, after] = total, state
                            took[i - at, after], lost[i - at, after] = (level, error) if x >= 0 else (-level, -error)
            for after in range(states):
                if fresh[after] < 1e300:
                    before, error = came[i - at, after], lost[i - at, after]
                    for j in range(i + 1, stop):
                        other[after, j - at] = moved[before, j - at] - mix[i, j] * error
            cost[:] = fresh
            moved, other = other, moved
        state = start = np.argmin(cost)
        for i in range(stop - 1, at - 1, -1):
            levels[i], error = took[i - at, state], lost[i - at, state]
            state = came[i - at, state]
            for j in range(stop, n):
                line[j] -= mix[i, j] * error
    return start


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

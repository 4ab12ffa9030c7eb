"""Which levels to take: the path through a trellis of two quantizers with the least error plus price of its bits.

Both quantizers have twice the distance of the grid; which one an element has is decided by the levels before it, so
that their union serves while each level costs only the bits of one. Source: M. W. Marcellin and T. R. Fischer, Trellis
Coded Quantization of Memoryless and Gauss-Markov Sources, IEEE Trans. Communications 38, 1990; the codes are those of
G. Ungerboeck, Channel Coding with Multilevel/Phase Signals, IEEE Trans. Information Theory 28, 1982, table I.
"""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel

CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}  # by number of states
KNOWN = 64  # levels whose price is in the table; beyond, it grows with the logarithm


def tables(states: int) -> tuple[np.ndarray, np.ndarray]:
    """The next state after an even and an odd level (states, 2) int64, and which quantizer a state has (states)."""
    if states == 1:
        return np.zeros((1, 2), np.int64), np.zeros(1, np.int64)
    with_second, with_odd = CODES[states]
    state = np.arange(states, dtype=np.int64)
    even = np.where(state & 1, state ^ with_second, state)
    return np.stack([even >> 1, (even ^ with_odd) >> 1], axis=1), state & 1


@kernel
def price(prices, kind, quantizer, extent):
    """Bits of a level of that size."""
    if extent < KNOWN:
        return prices[kind, quantizer, extent]
    more = 0.0
    rest = extent - KNOWN + 1
    while rest > 1:
        rest >>= 1
        more += 2.0
    return prices[kind, quantizer, KNOWN - 1] + more


@kernel
def choose(scaled, weigh, kinds, prices, lagrangian, following, second, start, levels):
    """Fill `levels` (int32) for `scaled` (float64: elements in steps of the grid), from the state `start` on.

    `weigh` (float64, one for each element or one for all) weighs squared errors, `kinds` are classes of sizes and
    `prices` (classes, 2, KNOWN) their bits, of which one costs as much as a squared error of `lagrangian`. Returns
    the state at the end.
    """
    states = following.shape[0]
    n = scaled.size
    cost = np.full(states, 1e300)
    cost[start] = 0.0
    fresh = np.empty(states)
    before = np.zeros((n, states), np.uint8)
    options = np.zeros((n, 4), np.int32)
    extra = np.empty(4)
    for i in range(n):
        x = abs(scaled[i])
        weight = weigh[i % weigh.size]
        for quantizer in range(2):
            for odd in range(2):
                # the nearest level of its kind to |x|, and the next one down; a negative one only by the sign
                guess = 2 * np.int64((x + quantizer - 2 * odd) / 4 + 0.5) + odd
                best, least = np.int64(0), 1e300
                for k in range(max(guess - 2, odd), guess + 1, 2):
                    value = 2 * k - (quantizer if k > 0 else 0)
                    total = weight * (x - value) ** 2 + lagrangian * price(prices, kinds[i], quantizer, k)
                    if total < least:
                        best, least = k, total
                if odd and x < 1:  # the odd level on the other side of zero may be as near
                    value = quantizer - 2.0
                    total = weight * (x - value) ** 2 + lagrangian * price(prices, kinds[i], quantizer, 1)
                    if total < least:
                        best, least = -1, total
                options[i, 2 * quantizer + odd] = best if scaled[i] >= 0 else -best
                extra[2 * quantizer + odd] = least
        fresh[:] = 1e300
        for state in range(states):
            for odd in range(2):
                option = 2 * second[state] + odd
                after = following[state, odd]
                total = cost[state] + extra[option]
                if total < fresh[after]:
                    fresh[after] = total
                    before[i, after] = 2 * state + odd
        cost[:] = fresh
    end = np.argmin(cost)
    state = end
    for i in range(n - 1, -1, -1):
        came = np.int64(before[i, state])
        state = came >> 1
        levels[i] = options[i, 2 * second[state] + (came & 1)]
    return end


@kernel
def nearest(scaled, weigh, kinds, prices, lagrangian, levels):
    """Like `choose` with one quantizer, whose levels are the whole numbers."""
    for i in range(scaled.size):
        x = abs(scaled[i])
        guess = np.int64(x + 0.5)
        best, least = guess, 1e300
        for k in range(max(guess - 2, 0), guess + 1):
            total = weigh[i % weigh.size] * (x - k) ** 2 + lagrangian * price(prices, kinds[i], 0, k)
            if total < least:
                best, least = k, total
        levels[i] = best if scaled[i] >= 0 else -best


@kernel
def placed(levels, following, second, state, out):
    """Levels to whole numbers of steps (`out`, int32): the quantizers of the path they describe; its last state."""
    for i in range(levels.size):
        k = np.int64(levels[i])
        q = second[state]
        out[i] = 2 * k - (q if k > 0 else -q if k < 0 else 0)
        state = following[state, k & 1]
    return state

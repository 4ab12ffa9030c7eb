"""Round the elements of a line one by one, and let those that follow make up for what each one lost.

Decides levels by squared error and price of bits; how lines follow each other is the caller's.
"""

from __future__ import annotations

from steelyard.kernels import kernel
from steelyard.kernels.trellis import price


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

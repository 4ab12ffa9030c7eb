"""A long vector in a few numbers that keep its length: signs drawn at random, and sums of what falls on one place.

Decides how places and signs follow from a seed. Knows nothing of what the vector is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.kernels.native import Native


def _sketch(_numba: Any) -> Callable[..., None]:
    def sketch(values, count, seed, row, size, sums):
        step = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64, and so are the next two (Steele et al. 2014)
        first, second = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
        at = np.int64(0)
        while at < count:
            h = np.uint64(seed) + np.uint64(row) * step
            h = (h ^ (h >> np.uint64(30))) * first
            h = (h ^ (h >> np.uint64(27))) * second
            h = h ^ (h >> np.uint64(31))
            place = np.int64(h % np.uint64(size))
            end = min(count, at + size)
            i = at
            while i < end:
                h += step
                signs = (h ^ (h >> np.uint64(30))) * first
                signs = (signs ^ (signs >> np.uint64(27))) * second
                signs = signs ^ (signs >> np.uint64(31))
                stop = min(end, i + 64)
                while i < stop:
                    x = np.float64(values[i])
                    if signs & np.uint64(1):
                        x = -x
                    signs = signs >> np.uint64(1)
                    sums[place] += x
                    place += 1
                    if place == size:
                        place = 0
                    i += 1
            row += 1
            at = end

    return sketch


_SKETCH = Native(
    "sketch", _sketch, ("float32*", "int64", "int64", "int64", "int64", "float64*"), Path(__file__).read_text("utf-8")
)


def sketch(values: np.ndarray, seed: int, sums: np.ndarray, start: int = 0) -> None:
    """Add the sketch of a vector to `sums`: a linear map whose result has the length of the vector, on average.

    Element i of row r (rows of ``len(sums)`` elements) gets a random sign and is added at place i + shift(r). Two
    elements meet with probability 1 / len(sums) at most, so that the squared length of the sketch has the mean |x|² and
    a standard deviation of at most sqrt(2 / len(sums)) |x|²: the length is right to 1 / sqrt(2 len(sums)). Because the
    map is linear, so are the distances between vectors that were sketched with the same seed.

    Args:
        values: (n,) float32, contiguous.
        seed: of signs and shifts.
        sums: (size,) float64, to be added to.
        start: the place of the first value in a longer vector, a multiple of the size: a vector may come in parts.

    Source: Charikar, Chen and Farach-Colton, Finding frequent items in data streams, 2002; Weinberger et al., Feature
    hashing for large scale multitask learning, 2009.

    >>> x, sums = np.ones(100_000, np.float32), np.zeros(1024)
    >>> sketch(x, 7, sums)
    >>> bool(abs(np.linalg.norm(sums) / np.linalg.norm(x) - 1) < 0.1)
    True
    """
    _SKETCH(values, len(values), seed, start // len(sums), len(sums), sums)

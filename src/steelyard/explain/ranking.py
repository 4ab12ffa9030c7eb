"""Ranks, and whether two rankings agree. Knows nothing of what is ranked."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the largest; equal values share the mean of their places.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    _, inverse, counts = np.unique(-np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; NaN where one of the two has no order at all.

    >>> spearman(np.array([1, 2, 3]), np.array([10, 20, 1000]))
    1.0
    """
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale else float("nan")

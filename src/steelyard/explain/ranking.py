"""Ranks, and whether two rankings agree. Knows nothing of what is ranked."""

from __future__ import annotations

import math
from statistics import NormalDist

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


def kendall(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Kendall's tau of two rankings, and the ends of its interval, free of a distribution: (tau, low, high).

    tau is the share of pairs in the same order less that of pairs in the opposite one; a pair that is tied in one of
    them counts as neither. With C_i that difference for the pairs of i, the variance of tau is estimated as
    2 / (n (n - 1)) (2 (n - 2) / (n (n - 1)²) sum (C_i - mean C)² + 1 - tau²). (-1, 1) for fewer than 3 values.

    Source: Samara and Randles, A test for correlation based on Kendall's tau, 1988; Hollander, Wolfe and Chicken,
    Nonparametric statistical methods, 2014, chapter 8.3.

    >>> tau, low, high = kendall(np.arange(30), np.arange(30)[::-1])
    >>> tau, low, round(high, 2)
    (-1.0, -1.0, -1.0)
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    n = len(x)
    if n < 2:
        return float("nan"), -1.0, 1.0
    agree = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)  # (n, n)
    each = agree.sum(1)
    tau = float(each.sum()) / (n * (n - 1))
    if n < 3:
        return tau, -1.0, 1.0
    spread = 2 * (n - 2) / (n * (n - 1) ** 2) * float(np.square(each - each.mean()).sum())
    error = math.sqrt(max(2 / (n * (n - 1)) * (spread + 1 - tau**2), 0.0))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return tau, max(tau - half, -1.0), min(tau + half, 1.0)

"""Confidence intervals for means of per-example outcomes and for paired differences. Pure arithmetic on arrays."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from steelyard.errors import ModelError


def wilson(hits: float, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927).

    >>> tuple(round(x, 4) for x in wilson(81, 263))
    (0.2553, 0.3662)
    """
    z = _normal(confidence)
    p, n = hits / examples, examples
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def student(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval for a mean: mean -+ t s / sqrt(n); infinitely wide for a single value."""
    mean = float(values.mean())
    if len(values) < 2:
        return -math.inf, math.inf
    from scipy.special import stdtrit

    half = (
        float(stdtrit(len(values) - 1, 0.5 + _check(confidence) / 2))
        * float(values.std(ddof=1))
        / math.sqrt(len(values))
    )
    return mean - half, mean + half


def paired_proportions(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval for mean(b) - mean(a) of two 0/1 outcomes of the same examples (Newcombe 1998, method 10).

    It has a width even where the two agree on every example.
    """
    n = len(a)
    both, only_a = int((a * b).sum()), int((a * (1 - b)).sum())
    only_b = int(((1 - a) * b).sum())
    neither = n - both - only_a - only_b
    p, q = (both + only_b) / n, (both + only_a) / n
    (low_p, high_p), (low_q, high_q) = wilson(both + only_b, n, confidence), wilson(both + only_a, n, confidence)
    phi = _phi(both, only_a, only_b, neither)
    d = p - q
    below = (p - low_p) ** 2 - 2 * phi * (p - low_p) * (high_q - q) + (high_q - q) ** 2
    above = (q - low_q) ** 2 - 2 * phi * (q - low_q) * (high_p - p) + (high_p - p) ** 2
    return d - math.sqrt(max(below, 0.0)), d + math.sqrt(max(above, 0.0))


def _phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    """The correlation of two 0/1 outcomes, with Newcombe's continuity correction."""
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if product == 0:
        return 0.0
    cross, n = float(both * neither - only_a * only_b), both + only_a + only_b + neither
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    return cross / math.sqrt(product)


def _normal(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + _check(confidence) / 2)


def _check(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ModelError(f"confidence={confidence}: expected a number between 0 and 1, such as 0.95")
    return confidence

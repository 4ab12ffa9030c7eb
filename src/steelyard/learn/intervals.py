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


def blocks(
    values: np.ndarray,  # in their order
    confidence: float = 0.95,
    *,
    length: int | None = None,
    draws: int = 2000,
) -> tuple[float, float]:
    """The interval for the mean of values of which neighbours are alike: a bootstrap of blocks on a circle.

    Each of the ``draws`` means is over blocks of ``length`` consecutive values that begin anywhere, the first values
    following the last (Politis & Romano 1992); the interval lies between quantiles of the means. ``length`` None is
    that of `block_length`. The same values give the same interval. Infinitely wide for a single value.

    >>> independent = np.random.default_rng(0).normal(size=2000)
    >>> low, high = blocks(independent)
    >>> a, b = student(independent)
    >>> abs((high - low) / (b - a) - 1) < 0.1
    True
    """
    _check(confidence)
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    size = min(n, block_length(values) if length is None else length)
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: size - 1]]))])
    sums = around[size:] - around[:-size]  # (n,): of the block that begins at each value
    random = np.random.default_rng(0xB10C)
    count = math.ceil(n / size)
    means = sums[random.integers(n, size=(draws, count))].mean(1) / size
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def block_length(values: np.ndarray) -> int:
    """How long blocks should be: the rule of Politis & White (2004), corrected by Patton, Politis & White (2009).

    Autocorrelations count up to the lag behind which sqrt(log n) successive ones are no larger than chance, with a flat
    top. At least 1; at most a third of the values, or 3 sqrt(n).
    """
    n = len(values)
    centred = values - values.mean()
    variance = float(centred @ centred) / n
    if n < 8 or variance == 0:
        return 1
    run = max(5, math.ceil(math.sqrt(math.log10(n))))
    most = min(math.ceil(math.sqrt(n)) + run, n - 1)
    covariances = np.array([float(centred[: n - lag] @ centred[lag:]) / n for lag in range(most + 1)])
    small = np.abs(covariances[1:] / variance) < 2 * math.sqrt(math.log10(n) / n)
    quiet = [lag for lag in range(len(small) - run + 1) if small[lag : lag + run].all()]
    last = min(2 * max(quiet[0] if quiet else most, 1), most)
    lags = np.arange(-last, last + 1)
    window = np.minimum(1.0, 2 * (1 - np.abs(lags) / last))
    both = window * covariances[np.abs(lags)]
    bias, spectrum = float((np.abs(lags) * both).sum()), float(both.sum())
    if spectrum <= 0:
        return 1
    length = (2 * bias**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    return max(1, min(math.ceil(length), math.ceil(min(3 * math.sqrt(n), n / 3))))


def apart(a: float, of_a: tuple[float, float], b: float, of_b: tuple[float, float]) -> tuple[float, float]:
    """The interval for b - a, two means of different examples, from the interval of each: their distances, squared.

    Of Wilson's intervals it is that of Newcombe (1998, method 10) for two independent proportions; of others that of
    Zou and Donner (2008).

    >>> tuple(round(x, 4) for x in apart(48 / 80, wilson(48, 80), 56 / 70, wilson(56, 70)))
    (0.0524, 0.3339)
    """
    (low_a, high_a), (low_b, high_b) = of_a, of_b
    return b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a)


def resampled(values: np.ndarray, ratio: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval for the mean over trainings that share examples, as the folds of a cross-validation do.

    Student's t with the variance (1 / J + ratio) s² of the mean of J results; ratio: test examples for each training
    example (Nadeau and Bengio, Inference for the generalization error, 2003).
    """
    half = student(values, confidence)[1] - float(values.mean())
    half = half * math.sqrt(1 + ratio * len(values)) if math.isfinite(half) else half
    return float(values.mean()) - half, float(values.mean()) + half


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

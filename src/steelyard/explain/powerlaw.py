"""The exponent of a power-law tail: by maximum likelihood, above the threshold where the fit is best.

Decides how a tail is fitted. Knows nothing of weights or of where the values come from.

Source: Clauset, Shalizi and Newman, "Power-law distributions in empirical data", SIAM Review 51(4), 2009;
of the eigenvalues of weights: Martin and Mahoney, "Implicit Self-Regularization in Deep Neural Networks", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steelyard.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np


PROBES = 16  # values of a tail at which a fit is tried before it is looked at as a whole


@dataclass(frozen=True)
class PowerLaw:
    """p(x) ~ x^-alpha for x >= xmin."""

    alpha: float
    xmin: float
    distance: float  # of Kolmogorov and Smirnov, between the tail and the fit; 0 = the fit is perfect
    tail: int  # values in the tail

    @property
    def sigma(self) -> float:
        """The standard error of alpha, (alpha - 1) / sqrt(tail)."""
        return (self.alpha - 1) / float(self.tail) ** 0.5


def fit_power_law(values: np.ndarray) -> PowerLaw:
    """The power law of the upper tail of positive `values`.

    For each threshold xmin among the values, alpha = 1 + n / sum(log(x / xmin)) over the n values that are not
    below it; the threshold with the smallest Kolmogorov-Smirnov distance between fit and tail is taken.

    >>> import numpy as np
    >>> x = (1 - np.random.default_rng(0).random(2000)) ** -0.5  # density 2 x^-3
    >>> abs(fit_power_law(x).alpha - 3) < 0.2
    True

    Raises WeightsError for fewer than two values, or one that is not positive and finite.
    """
    import numpy as np

    x = np.sort(np.asarray(values, np.float64).reshape(-1))
    if x.size < 2 or not (x[0] > 0 and np.isfinite(x[-1])):
        raise WeightsError(f"a power law is fitted to two or more positive finite values, not to {x.size} that are not")
    logs = np.log(x)
    counts = np.arange(x.size, 0, -1.0)  # of the values from each threshold on
    excess = np.cumsum(logs[::-1])[::-1] - counts * logs  # sum(log(x / xmin)) for each threshold
    found = np.flatnonzero(excess[:-1] > 1e-12 * counts[:-1])  # where values differ at all, there is an exponent
    slopes = counts[found] / excess[found]
    best = PowerLaw(float("inf"), float(x[-1]), 1.0, 1)
    for i in np.argsort(least := _at_least(logs, found, slopes), kind="stable"):
        if least[i] >= best.distance:
            break  # no threshold that is left can be better
        first, n = found[i], x.size - found[i]
        distance = float(np.abs(_fitted(logs[first:] - logs[first], slopes[i]) - np.arange(n) / n).max())
        if (distance, first) < (best.distance, x.size - best.tail):
            best = PowerLaw(1 + float(slopes[i]), float(x[first]), distance, int(n))
    return best


def _fitted(above: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The distribution function of the fit at values with log(x / xmin) = `above`."""
    import numpy as np

    values: np.ndarray = -np.expm1(-slope * above)
    return values


def _at_least(logs: np.ndarray, first: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """For each threshold what its distance is at least: what it is at PROBES values of the tail."""
    import numpy as np

    tail = (logs.size - first)[:, None]
    probes = (tail * (np.arange(PROBES) + 0.5) / PROBES).astype(np.int64)  # (thresholds, PROBES), counted from xmin
    above = logs[first[:, None] + probes] - logs[first][:, None]
    distances: np.ndarray = np.abs(_fitted(above, slopes[:, None]) - probes / tail).max(axis=1)
    return distances

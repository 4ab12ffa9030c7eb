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
    steps = np.arange(x.size) / x.size
    best = PowerLaw(float("inf"), float(x[-1]), 1.0, 1)
    for i in np.flatnonzero(excess[:-1] > 1e-12 * counts[:-1]):
        n = x.size - i
        slope = counts[i] / excess[i]
        fitted = -np.expm1(-slope * (logs[i:] - logs[i]))  # the distribution function of the fit
        distance = float(np.abs(fitted - steps[:n] * (x.size / n)).max())
        if distance < best.distance:
            best = PowerLaw(1 + float(slope), float(x[i]), distance, int(n))
    return best

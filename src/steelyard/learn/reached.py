"""What examples would do to each row of a large table, foretold where few of them reached it: by the row itself.

Decides how what was seen of a row is weighed against what rows like it got. Knows nothing of gradients or models.

Rows that a table holds for rare things look different from those of frequent ones: shorter, at a later place (a
vocabulary is often sorted by frequency), and elsewhere in the space if the examples are about other things.

Sources: counts whose mean is itself uncertain: M. Greenwood and G. U. Yule, "An inquiry into the nature of frequency
distributions representative of multiple happenings", 1920; the mean from what is known of a row: a Poisson regression,
J. A. Nelder and R. W. M. Wedderburn, "Generalized linear models", 1972.
"""

from __future__ import annotations

from itertools import product

import numpy as np

PROJECTED = 384  # numbers of a row that are looked at; of longer rows random sums
RIDGE = 10.0  # on the squares of coefficients of features with variance 1
CAPPED = 10.0  # medians of a row that was reached: a few rows do not rule
ROUNDS = 30  # of Newton's method, at most
SHAPES = tuple(2.0**k for k in range(-5, 4))  # of the distribution of a row's mean about its foretold one
UNITS = tuple(2.0**k for k in range(-5, 3))  # what one event adds, in medians of a row that was reached
CHUNK = 1 << 13  # rows that are multiplied at a time
LEAST = 1e-3  # of the mean of all rows, for any one


def foretold(first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What the rows would have in the mean over draws of examples; first, second: sums >= 0 by halves of the examples.

    rows: (n, ...), the contents of the n rows. A regression of the sums on contents, length and place gives mu for
    each row; a row with the sum y then has ``mu (a + y / u) / (a + mu / u)``, with the a and u with which each half
    foretells the other best: near y for rows that were reached often, near mu for the others. The total stays. Nothing
    changes where one half reached no row.

    >>> random = np.random.default_rng(0)
    >>> rate = np.repeat([0.02, 2.0], 500)
    >>> first, second = random.poisson(rate, (2, 1000))
    >>> found = foretold(first, second, np.repeat([[0.1], [1.0]], 500, axis=0))
    >>> bool(abs(np.log(found / (2 * rate)).mean()) < 0.5)
    True
    """
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    whole = first + second
    if not (first.any() and second.any()):
        return whole
    features = _features(rows)
    unit = float(np.median(whole[whole > 0]))
    ways = ((first, second), (second, first))
    halves = [(known, other, _regressed(features, known, unit / 2)) for known, other in ways]

    def lost(setting: tuple[float, float]) -> float:
        shape, event = setting[0], setting[1] * unit
        return sum(_deviance(other, _posterior(known, mean, shape, event)) for known, other, mean in halves)

    shape, event = min(product(SHAPES, UNITS), key=lost)
    found = _posterior(whole, _regressed(features, whole, unit), shape, event * unit)
    return np.asarray(found * (whole.sum() / found.sum()))


def _features(rows: np.ndarray) -> np.ndarray:
    """One, the place of each row, its length and its contents; of variance 1 besides the first: (n, features)."""
    x = rows.reshape(len(rows), -1).astype(np.float32)
    place = np.arange(len(x), dtype=np.float64)
    length = np.log(np.linalg.norm(x, axis=1).astype(np.float64) + 1e-30)
    if x.shape[1] > PROJECTED:
        x = x @ np.random.default_rng(0).normal(size=(x.shape[1], PROJECTED)).astype(np.float32)
    early, length = (np.clip(_standard(v), -4, 4) for v in (np.log(place + 1), length))
    x -= x.mean(axis=0)
    x /= np.sqrt(np.square(x).mean()) or 1.0
    told = np.stack([np.ones(len(x)), early, early**2, _standard(place), length, length**2], axis=1)
    return np.concatenate([told.astype(np.float32), x], axis=1)


def _standard(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean()) / (x.std() or 1.0))


def _regressed(features: np.ndarray, y: np.ndarray, unit: float) -> np.ndarray:
    """The mean of y by a Poisson regression, log-linear, with a ridge: damped steps of Newton's method."""
    y = np.minimum(y / unit, CAPPED)
    ridge = np.full(features.shape[1], RIDGE)
    ridge[0] = 1e-9
    found = np.zeros(features.shape[1])
    found[0] = np.log(y.mean())

    def cost(at: np.ndarray) -> float:
        log = _logarithm(features, at)
        return float((np.exp(log) - y * log).sum() + (ridge * at**2).sum() / 2)

    before = cost(found)
    for _ in range(ROUNDS):
        mean = np.exp(_logarithm(features, found))
        slope = features.T @ (mean - y).astype(np.float32) + ridge * found
        step = np.linalg.solve(_moments(features, mean) + np.diag(ridge), slope)
        share = 1.0
        while (after := cost(found - share * step)) > before and share > 1e-3:
            share /= 2
        if after > before:
            break
        found, gained, before = found - share * step, before - after, after
        if gained < 1e-4 * abs(before):
            break
    return np.asarray(np.exp(_logarithm(features, found)) * unit)


def _logarithm(features: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of the mean of each row."""
    return np.clip((features @ at.astype(np.float32)).astype(np.float64), -30, 30)


def _moments(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The sum of weight * f fᵀ over the rows f, in pieces, so that no second table is in memory."""
    found = np.zeros((features.shape[1], features.shape[1]))
    for at in range(0, len(features), CHUNK):
        some = features[at : at + CHUNK] * np.sqrt(weight[at : at + CHUNK, None]).astype(np.float32)
        found += some.T @ some  # which NumPy knows to be symmetric
    return found


def _posterior(y: np.ndarray, mean: np.ndarray, shape: float, event: float) -> np.ndarray:
    """The mean of a row's rate, Gamma about `mean`, after events of the size `event` that add up to y."""
    found = mean * (shape + y / event) / (shape + mean / event)
    return np.asarray(np.maximum(found, LEAST * found.mean()))


def _deviance(y: np.ndarray, mean: np.ndarray) -> float:
    """How badly `mean`, scaled to the sum of y, foretells y, for each unit of that sum: Poisson."""
    mean = mean * (y.sum() / mean.sum())
    return float((y * np.log(np.where(y > 0, y, 1) / np.where(y > 0, mean, 1))).sum() / y.sum())

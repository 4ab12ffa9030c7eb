"""What few examples say of the rows of a table, and what the rows say of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.learn.reached import foretold


def deviance(y: np.ndarray, mean: np.ndarray) -> float:
    mean = mean * y.sum() / mean.sum()
    return float((y * np.log(np.where(y > 0, y, 1) / mean) - y + mean).sum() / y.sum())


def test_rows_that_say_nothing_have_their_sums_and_a_share_where_there_is_none() -> None:
    random = np.random.default_rng(0)
    rates = random.exponential(size=4000) ** 3
    first, second = (random.poisson(rates).astype(float) for _ in range(2))
    raw, truth = first + second, 2 * rates
    found = foretold(first, second, random.normal(size=(4000, 3)))
    assert np.isclose(found.sum(), raw.sum())
    unseen = raw == 0
    assert truth[unseen].mean() / 2 < found[unseen].mean() < 2 * truth[unseen].mean()
    for rows in (raw == 2, raw > 50):
        assert abs(found[rows].mean() - truth[rows].mean()) < 0.3 * truth[rows].mean()


@pytest.mark.parametrize("what", ["contents", "length", "place"])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_rows_that_nothing_reached_are_told_by(what: str, size: float) -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(3000, 6))
    if what == "contents":
        rates = np.exp(x[:, 0] - 2)
    elif what == "length":
        scale = random.uniform(0.5, 2, 3000)
        x, rates = x / np.linalg.norm(x, axis=1)[:, None] * scale[:, None], scale**3 / 10
    else:
        rates = 30 / (10 + np.arange(3000))
    first, second, later = size * random.poisson(rates, (3, 3000))
    unseen = first + second == 0
    found = foretold(first, second, x)
    assert np.corrcoef(np.log(found[unseen]), np.log(rates[unseen]))[0, 1] > 0.7
    mixed = foretold(first, second, random.permutation(x) if what != "place" else x[::-1] * 0)
    if what != "place":
        assert deviance(later[unseen], found[unseen]) < 0.95 * deviance(later[unseen], mixed[unseen])


def test_rows_of_many_numbers_are_looked_at_as_well() -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=(2000, 600)) + 2 * random.normal(size=2000)[:, None] * np.linspace(-1, 1, 600)
    rates = np.exp(x @ np.linspace(-1, 1, 600) / 400 - 1.5)
    first, second = random.poisson(rates, (2, 2000))
    found, unseen = foretold(first, second, x), first + second == 0
    assert np.corrcoef(np.log(found[unseen]), np.log(rates[unseen]))[0, 1] > 0.7


def test_one_half_alone_foretells_nothing() -> None:
    raw = np.array([0.0, 3, 0, 1])
    np.testing.assert_array_equal(foretold(raw, 0 * raw, np.eye(4)), raw)


def test_rows_that_are_all_alike_or_zero_do_no_harm() -> None:
    first, second = np.array([0.0, 3, 0, 1, 5]), np.array([0.0, 2, 1, 0, 6])
    for rows in (np.zeros((5, 2)), np.ones((5, 2))):
        found = foretold(first, second, rows)
        assert np.isfinite(found).all()
        assert (found > 0).all()

"""k-means on a line: against every partition, against scikit-learn, and the bound where it is not exact."""

from __future__ import annotations

import warnings
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.errors import CodecError
from steelyard.kernels import kmeans
from steelyard.kernels.kmeans import cluster_1d, gather, kmeans_1d


def loss_of(x, centres, w=None):
    d = np.min((np.asarray(x, float)[:, None] - centres[None]) ** 2, axis=1)
    return float(np.sum(d if w is None else w * d))


def brute_force(x, k, w):
    """The least loss over all ways to cut the sorted distinct values into at most k intervals."""
    x, where = np.unique(x, return_inverse=True)
    w = np.bincount(where, w)
    best = np.inf
    for cuts in combinations(range(1, x.size), min(k, x.size) - 1):
        parts = zip(np.split(x, cuts), np.split(w, cuts), strict=True)
        best = min(best, sum(float(np.sum(v * (p - np.average(p, weights=v)) ** 2)) for p, v in parts))
    return best


numbers = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, st.floats(0.01, 100)), min_size=1, max_size=9), st.integers(1, 6))
def test_no_partition_is_better(points, k):
    x, w = (np.array(column) for column in zip(*points, strict=True))
    found = cluster_1d(x, k, w)
    blur = 1e-13 * np.sum(w) * np.ptp(x) ** 2 + 1e-30 * np.sum(w * x * x)  # what float64 does to these sums
    assert found.exact
    assert found.loss == pytest.approx(brute_force(x, k, w), rel=1e-9, abs=blur)
    assert loss_of(x, found.centres, w) == pytest.approx(found.loss, rel=1e-6, abs=blur)
    assert found.centres.size <= k
    assert (np.diff(found.centres) > 0).all()
    assert found.centres.dtype == np.float64


def shapes():
    rng = np.random.default_rng(5)
    return {
        "normal": rng.normal(size=3000),
        "heavy tails": rng.standard_t(2, size=3000),
        "two heaps": np.concatenate([rng.normal(-9, 1, 1500), rng.normal(9, 0.1, 1500)]),
        "few values": rng.integers(0, 30, 3000).astype(float),
    }


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("k", [4, 16])
def test_scikit_learn_is_never_better(name, k):
    cluster, threads = pytest.importorskip("sklearn.cluster"), pytest.importorskip("threadpoolctl")
    x = shapes()[name][::2]
    with warnings.catch_warnings(), threads.threadpool_limits(1):
        warnings.simplefilter("ignore")
        theirs = cluster.KMeans(k, n_init=20, random_state=0).fit(x[:, None]).cluster_centers_.ravel()
    assert loss_of(x, kmeans_1d(x, k)) <= loss_of(x, theirs) * (1 + 1e-9)


def test_a_weight_counts_like_so_many_copies():
    x, w = np.array([0.0, 1, 2, 10, 11]), np.array([1, 3, 1, 2, 5])
    assert kmeans_1d(x, 2, w).tolist() == kmeans_1d(np.repeat(x, w), 2).tolist()
    assert kmeans_1d(x, 2, w).tolist() == [1.0, pytest.approx(75 / 7)]


def test_few_distinct_values_are_met_exactly():
    x = np.array([0.1, -7e9, 0.1, 3e-40])
    assert kmeans_1d(x, 3).tolist() == [-7e9, 3e-40, 0.1]
    assert kmeans_1d(np.array([0.1, 0.3, 5.0, 7e5 / 3]), 3)[-1] == 7e5 / 3  # alone in its interval
    assert kmeans_1d(np.array([]), 4).size == 0


def test_a_value_without_weight_has_no_say():
    assert kmeans_1d(np.array([1.0, 5.0, 900.0]), 1, np.array([1.0, 1.0, 0.0])).tolist() == [3.0]
    assert kmeans_1d(np.array([1.0, 5.0]), 1, np.zeros(2)).tolist() == [3.0]


@pytest.mark.parametrize("least", [1e-30, 1e-300, 5e-324])
def test_weights_that_sums_do_not_know_count_as_none(least):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=500), rng.random(500)
    w[::3] = least
    found = cluster_1d(x, 16, w)
    alone = cluster_1d(x[w > 1e-9], 16, w[w > 1e-9])
    assert found.centres.tolist() == alone.centres.tolist()
    assert found.loss == alone.loss


def test_a_far_outlier_does_not_blur_the_others():
    near = np.random.default_rng(0).normal(size=2000) * 1e-3
    alone, beside = cluster_1d(near, 7), cluster_1d(np.append(near, [-1e6, 1e6]), 9)
    assert beside.loss == pytest.approx(alone.loss, rel=1e-6)


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    for unit in (1e-300, 1e300):
        found = kmeans_1d(np.array([1.0, 1.5, 9.0]) * unit, 2)
        assert found / unit == pytest.approx([1.25, 9.0])


@pytest.mark.parametrize(("k", "weights", "values"), [
    (0, None, [1.0]), (65_537, None, [1.0]), (2, None, [np.nan]), (2, None, [np.inf]),
    (2, [-1.0], [1.0]), (2, [np.nan], [1.0]), (2, [1.0, 1.0], [1.0]),
])  # fmt: skip
def test_what_cannot_be_clustered_is_refused(k, weights, values):
    with pytest.raises(CodecError):
        kmeans_1d(np.array(values), k, None if weights is None else np.array(weights))


@pytest.mark.parametrize("name", ["normal", "heavy tails", "two heaps"])
@pytest.mark.parametrize("search", ["bins", "price"])
def test_the_bound_holds_where_the_search_is_not_exact(monkeypatch, name, search):
    x, k = shapes()[name], 12
    optimum = cluster_1d(x, k).loss
    monkeypatch.setattr(kmeans, "BINS", 600)
    monkeypatch.setattr(kmeans, "FINE_BINS", 600)
    monkeypatch.setattr(kmeans, "CELLS", 600 * k if search == "bins" else 600 * k - 1)
    found = cluster_1d(x, k)
    assert not found.exact
    assert found.lower <= optimum * (1 + 1e-9)
    assert optimum * (1 - 1e-9) <= found.loss
    assert found.loss <= optimum * 1.02  # the start is good, and Lloyd's iteration has polished it
    assert found.excess < 0.5
    assert found.loss == pytest.approx(loss_of(x, found.centres), rel=1e-9)


def test_a_price_finds_the_optimum_itself_when_nothing_was_binned(monkeypatch):
    x = shapes()["normal"]
    optimum = cluster_1d(x, 40).loss
    monkeypatch.setattr(kmeans, "CELLS", 0)
    found = cluster_1d(x, 40)
    assert found.loss == pytest.approx(optimum, rel=1e-9)
    assert found.lower == pytest.approx(optimum, rel=1e-6)


def test_gathered_points_keep_weight_and_mean():
    x = shapes()["heavy tails"]
    means, weights = gather(x, np.ones(x.size), 100)
    assert means.size <= 100
    assert weights.sum() == x.size
    assert np.average(means, weights=weights) == pytest.approx(x.mean())
    assert gather(x, np.zeros(x.size), 100)[0].size == 0

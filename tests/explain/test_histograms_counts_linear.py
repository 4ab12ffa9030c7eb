"""Distributions of values, counts of weights, and linear models as their weights."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from steelyard.core.weights import Weights
from steelyard.errors import ModelError, WeightsError
from steelyard.explain.counts import counts
from steelyard.explain.histograms import histogram, unique_values
from steelyard.explain.linear import fit_logistic, from_sklearn, to_sklearn


@given(st.lists(st.floats(), max_size=40), st.integers(1, 9), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=80, deadline=None)
def test_every_finite_value_is_in_one_bin(values: list[float], bins: int, dtype: type) -> None:
    with np.errstate(over="ignore"):
        array = np.array(values).astype(dtype)
    row = histogram(Weights.of({"w": array}), bins).rows[0]
    finite = int(np.isfinite(array).sum())
    assert sum(row["counts"]) == finite == len(array) - row["not finite"]  # type: ignore[operator,arg-type]
    assert len(row["counts"]) == bins  # type: ignore[arg-type]
    assert len(row["edges"]) == bins + 1  # type: ignore[arg-type]
    assert row["zeros"] == int((array == 0).sum())


def test_histograms_over_one_span_and_of_odd_types() -> None:
    w = Weights.of({"a": np.float32([-3, 0.5, 3]), "b": np.array([0.25, 0.75], ml_dtypes.bfloat16)}, {"c": "b"})
    table = histogram(w, 2, (0.0, 1.0))
    assert table.column("counts") == [[0, 1], [1, 1]]
    assert table.column("edges") == [[0.0, 0.5, 1.0]] * 2
    assert histogram(Weights.of({"i": np.array([True, False])}), 2).rows[0]["counts"] == [1, 1]
    with pytest.raises(WeightsError, match="at least one bin"):
        histogram(w, 0)
    with pytest.raises(WeightsError, match="the lower first"):
        histogram(w, 2, (1.0, 1.0))


@pytest.mark.parametrize("value", [0.0, 1.0, -(2.0**50), 1.7e308, 5e-324])
def test_a_constant_is_in_the_middle(value: float) -> None:
    row = histogram(Weights.of({"w": np.full(3, value)}), 3).rows[0]
    assert row["counts"] == [0, 3, 0]
    assert np.isfinite(row["edges"]).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int16, np.complex128]
)
def test_distinct_bit_patterns(dtype: type) -> None:
    table = unique_values(Weights.of({"w": np.array([1, 2, 2, 3, 1], dtype).reshape(1, 5)}))
    assert (table.rows[0]["distinct"], table.rows[0]["index"]) == (3, 2)


def test_what_a_codebook_must_hold() -> None:
    table = unique_values(Weights.of({"z": np.float32([0.0, -0.0, math.nan]), "e": np.zeros(0), "o": np.ones(3)}))
    assert table.column("distinct") == [3, 0, 1]
    assert table.column("index") == [2, 0, 0]


def test_counts_by_part() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    with torch.no_grad():
        net[0].weight[0] = 0.0
    rows = {r["part"]: r for r in counts(net).rows}
    assert rows["total"] | {"part": 0} == {
        "part": 0,
        "unique": 60,
        "tied": 40,
        "trainable": 50,
        "frozen": 10,
        "buffered": 21,
        "active": 36 + 10,
    }
    assert rows["1"]["unique"] == 0
    assert rows["1"]["tied"] == 40


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_the_fit_is_scikit_learns(load: object) -> None:
    data = load()  # type: ignore[operator]
    x, y = StandardScaler().fit_transform(data.data), data.target
    ours = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), strength=0.3)
    theirs = LogisticRegression(C=0.3, tol=1e-9, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(ours.weight.detach(), theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.bias.detach(), theirs.intercept_, atol=1e-4)
    moved = to_sklearn(ours, theirs.classes_)
    np.testing.assert_allclose(moved.predict_proba(x), theirs.predict_proba(x), atol=1e-5)
    np.testing.assert_array_equal(from_sklearn(moved).weight.detach(), ours.weight.detach())
    assert all(p.grad is None for p in ours.parameters())


def test_two_outputs_for_two_classes_give_the_same_probabilities() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    found = to_sklearn(layer, ["no", "yes"])
    np.testing.assert_allclose(found.predict_proba(x.double().numpy()), layer(x).softmax(1).detach(), atol=1e-6)
    assert set(found.predict(x.numpy())) <= {"no", "yes"}


def test_a_regression_comes_over() -> None:
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20.0)
    ridge = Ridge().fit(x, y)
    with torch.no_grad():
        np.testing.assert_allclose(from_sklearn(ridge)(torch.from_numpy(x))[:, 0], ridge.predict(x))


def test_what_does_not_fit() -> None:
    with pytest.raises(ModelError, match="fit a linear estimator first"):
        from_sklearn(LogisticRegression())
    with pytest.raises(ModelError, match="3 classes do not fit a layer with 4 outputs"):
        to_sklearn(nn.Linear(2, 4), "abc")
    with pytest.raises(ModelError, match="not converged after 2 steps"):
        fit_logistic(1e3 * torch.randn(50, 5), torch.arange(50) % 3, steps=2)

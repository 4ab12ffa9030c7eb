"""The rank that is reported is the one that it takes, by weights alone and by data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.errors import RecipeError, WeightsError
from steelyard.explain.redundancy import redundancy, truncated

RNG = np.random.default_rng(0)
LOW = (RNG.normal(size=(24, 5)) @ RNG.normal(size=(5, 40))).astype(np.float32)
FULL = RNG.normal(size=(24, 40)).astype(np.float32)


def evidence(name: str, inputs: np.ndarray) -> Weights:
    about = {"kind": "hessian", "samples": {}, "inputs first": []}
    return Weights.of({name: (inputs.T @ inputs / len(inputs))[None]}, meta={"evidence": json.dumps(about)})


def test_a_product_of_thin_matrices_is_found_out():
    row = redundancy(Weights.of({"a": LOW, "b": np.ones(3, np.float32)}), error=1e-6).rows[0]
    assert (row["outputs"], row["inputs"], row["rank"]) == (24, 40, 5)
    assert row["redundant"] == 1 - 5 * 64 / (24 * 40)
    assert 1 < row["effective rank"] <= 5
    assert redundancy(Weights.of({"a": FULL}), error=1e-6).rows[0]["redundant"] == 0


@pytest.mark.parametrize("error", [0.0, 0.01, 0.1, 0.5])
def test_cutting_at_the_rank_loses_what_is_said_and_one_less_loses_more(error):
    inputs = RNG.normal(size=(500, 40)) @ RNG.normal(size=(40, 40)) * np.geomspace(1, 1e-2, 40)
    for by, x in ((None, np.eye(40)), (evidence("a", inputs), inputs)):
        rank = redundancy(Weights.of({"a": FULL}), by, error=error).rows[0]["rank"]

        def lost(rank: int, by=by, x=x) -> float:
            cut = truncated(Weights.of({"a": FULL}), {"a": rank}, by)["a"].array().astype(np.float64)
            return float(np.square(x @ (cut - FULL).T).sum() / np.square(x @ FULL.T.astype(np.float64)).sum())

        assert lost(rank) <= error + 1e-6
        assert np.linalg.matrix_rank(truncated(Weights.of({"a": FULL}), {"a": rank}, by)["a"].array()) == rank
        if rank:
            assert lost(rank - 1) > error


def test_data_of_few_dimensions_need_few_ranks():
    inputs = RNG.normal(size=(500, 3)) @ RNG.normal(size=(3, 40))
    assert redundancy(Weights.of({"a": FULL}), evidence("a", inputs), error=1e-6).rows[0]["rank"] == 3
    kernel = FULL.reshape(24, 10, 2, 2)
    assert redundancy(Weights.of({"a": kernel}), evidence("a", inputs), error=1e-6).rows[0]["rank"] == 3
    assert truncated(Weights.of({"a": kernel}), {"a": 3})["a"].spec.shape == kernel.shape


def test_what_is_wrong_is_named():
    with pytest.raises(RecipeError, match="below 1"):
        redundancy(Weights.of({"a": FULL}), error=1.0)
    with pytest.raises(WeightsError, match="no matrix"):
        redundancy(Weights.of({"a": np.ones(3, np.float32)}))
    with pytest.raises(WeightsError, match="'a' has NaN"):
        redundancy(Weights.of({"a": FULL * np.nan}))
    with pytest.raises(WeightsError, match="no tensor 'a'"):
        redundancy(Weights.of({"a": FULL}), evidence("b", FULL))

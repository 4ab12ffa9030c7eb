from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.edit.prune import Prune
from steelyard.edit.share import Share
from steelyard.errors import CodecError, RecipeError, WeightsError
from steelyard.kernels.kmeans import kmeans_1d


def some(dtype=np.float32):
    rng = np.random.default_rng(3)
    w = {"a": rng.normal(size=(20, 15)).astype(dtype), "b": (3 * rng.normal(size=(10, 8))).astype(dtype)}
    return Prune(0.4)(Weights.of({**w, "bias": rng.normal(size=20).astype(np.float32)})).settle()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("k", [1, 2, 16, 300])
def test_at_most_k_values_beside_zero_and_zeros_stay(dtype, k):
    w = some(dtype)
    shared = Share(k)(w)
    for name in "ab":
        before, after = w[name].array(), shared[name].array()
        assert np.array_equal(before == 0, after == 0)
        assert np.unique(after[after != 0]).size <= k
        assert after.dtype == dtype
    assert shared["bias"] is w["bias"]


def test_the_values_are_the_k_means_of_what_is_not_zero():
    x = some(np.float64)["a"].array()
    shared = Share(5)(some(np.float64))["a"].array()
    centres = kmeans_1d(x[x != 0], 5)
    assert np.unique(shared[shared != 0]).tolist() == centres.tolist()
    assert ((shared - x)[x != 0] ** 2 <= np.min((x[x != 0][:, None] - centres) ** 2, axis=1) + 1e-15).all()


def test_zeros_take_part_where_they_are_not_kept():
    x = some()["a"].array()
    shared = Share(2, keep_zeros=False)(some())["a"].array()
    assert np.unique(shared).size == 2
    assert shared[x == 0].all()


def test_few_enough_values_are_not_touched():
    w = Weights.of({"a": np.float32([[0.1, 0.2, 0], [0.3, 0.1, 0.2]])})
    assert Share(3)(w)["a"].array().tobytes() == w["a"].array().tobytes()
    zeros = Weights.of({"a": np.zeros((2, 3), np.float32)})
    assert not Share(3)(zeros)["a"].array().any()


def test_packed_as_a_palette():
    packed = Share(16)(some())["a"].read()
    assert packed.codec.name == "palette"
    assert packed.nbytes < some()["a"].spec.nbytes / 4
    assert Share(16)(some())["a"].scheme.codec == packed.codec


def test_one_set_of_values_for_all():
    w = some(np.float64)
    shared = Share(4, "global")(w)
    both = np.concatenate([shared[n].array().ravel() for n in "ab"])
    raw = np.concatenate([w[n].array().ravel() for n in "ab"])
    assert np.unique(both[both != 0]).tolist() == kmeans_1d(raw[raw != 0], 4).tolist()


def test_importance_moves_the_values():
    w = Weights.of({"a": np.array([[1.0, 2.0, 4.0]])})
    by = Weights.of({"a": np.array([[1.0, 3.0, 0.0]])})
    assert Share(1, by=by)(w)["a"].array().tolist() == [[1.75] * 3]
    assert Share(1, "global", by=by)(w)["a"].array().tolist() == [[1.75] * 3]


def test_evidence_of_inputs_weighs_errors_as_a_loss_would():
    x = np.array([[1.0, 5.0], [2.0, 6.0]])
    w = Weights.of({"a": x})
    norms = Weights.of(
        {"a": np.array([[1.0, 3.0]])},
        meta={"evidence": json.dumps({"kind": "norms", "samples": {}, "inputs first": []})},
    )
    h = Weights.of(
        {"a": np.array([[[1.0, 0.5], [0.5, 9.0]]])},
        meta={"evidence": json.dumps({"kind": "hessian", "samples": {}, "inputs first": []})},
    )
    for by in (norms, h, Weights.of({"a": np.array([[1.0, 9.0]])})):
        assert Share(1, by=by)(w)["a"].array().tolist() == [[5.1] * 2] * 2
    with pytest.raises(WeightsError, match="damaged"):
        Share(1, by=norms.with_meta(evidence="{}"))(w)
    with pytest.raises(WeightsError, match=r"is float64\[3\]"):
        Share(1, by=Weights.of({"a": np.ones(3)}))(w)["a"].array()


def test_bad_input():
    for k in (0, 65_536):
        with pytest.raises(RecipeError, match="1 to 65535"):
            Share(k)
    with pytest.raises(RecipeError, match="scope"):
        Share(4, "layer")
    w = Weights.of({"a": np.float32([[1, 2]])})
    with pytest.raises(WeightsError, match="importances of 'a' must be"):
        Share(1, by=Weights.of({"a": np.float32([[1, -2]])}))(w)["a"].array()
    with pytest.raises(WeightsError, match="the evidence has no tensor 'a'"):
        Share(1, by=Weights([]))(w)
    for scope in ("tensor", "global"):
        with pytest.raises(CodecError, match=r"'a'.*NaN"):
            Share(1, scope)(Weights.of({"a": np.float32([[1, np.nan]])}))["a"].array()


def test_many_weights_are_gathered_before_they_share(monkeypatch):
    """Above the limit of points, the common values are still near the best ones."""
    from steelyard.edit import share

    w = some(np.float64)
    exact = Share(4, "global")(w)["a"].array()
    monkeypatch.setattr(share, "POINTS", 10)
    gathered = Share(4, "global")(w)["a"].array()
    assert np.allclose(gathered, exact, atol=0.05)

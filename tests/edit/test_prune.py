from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard.core.transform import each, on
from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.edit.nm import PruneNM
from steelyard.edit.prune import Prune, mask_of
from steelyard.errors import RecipeError, WeightsError

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"]


def some(dtype="float32", sizes=((7, 9), (3, 4, 2), (5, 5))):
    from steelyard.core.spec import dtype as find

    rng = np.random.default_rng(1)
    w = {f"w{i}": rng.normal(size=s).astype(find(dtype).numpy) for i, s in enumerate(sizes)}
    return Weights.of({**w, "bias": np.ones(9, np.float32), "steps": np.ones((2, 2), np.int64)})


def reference(arrays, fraction, scores=None):
    """Stable sort of everything: the straightforward way, in float64."""
    flat = np.concatenate([x.ravel().astype(float) for x in arrays])
    rank = np.abs(flat) if scores is None else np.concatenate([s.ravel().astype(float) for s in scores])
    gone = np.argsort(rank, kind="stable")[: round(fraction * flat.size)]
    flat[gone] = 0
    ends = np.cumsum([x.size for x in arrays])[:-1]
    return [part.reshape(x.shape) for part, x in zip(np.split(flat, ends), arrays, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [0, 0.001, 0.25, 0.5, 0.9, 0.999, 1])
def test_global_is_a_stable_sort_of_everything(dtype, fraction):
    w = some(dtype)
    found = Prune(fraction)(w)
    expected = reference([w[n].array() for n in ("w0", "w1", "w2")], fraction)
    for n, x in zip(("w0", "w1", "w2"), expected, strict=True):
        assert found[n].array().astype(float).tolist() == x.tolist()
        assert found[n].array().dtype == w[n].array().dtype
    assert found["bias"] is w["bias"]
    assert found["steps"] is w["steps"]


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.sampled_from([-2, -1, -0.0, 0, 1, 1.5]),
    ),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.sampled_from([-1, 1, 0])),
    st.floats(0, 1),
)
def test_equal_scores_go_by_position(a, b, fraction):
    w = Weights.of({"a": a, "b": b})
    expected = reference([a, b], fraction)
    found = Prune(fraction)(w)
    assert [found[n].array().tolist() for n in "ab"] == [x.tolist() for x in expected]
    alone = Prune(fraction, "tensor")(w)
    assert [alone[n].array().tolist() for n in "ab"] == [reference([x], fraction)[0].tolist() for x in (a, b)]


@pytest.mark.parametrize("score_dtype", ["float64", "float32", "bfloat16", "int32"])
def test_by_scores_the_least_go_first_also_negative_ones(score_dtype):
    from steelyard.core.spec import dtype as find

    w = some()
    rng = np.random.default_rng(2)
    scores = {n: (rng.normal(size=w[n].spec.shape) * 50).astype(find(score_dtype).numpy) for n in ("w0", "w1", "w2")}
    found = Prune(0.4, by=Weights.of(scores))(w)
    expected = reference([w[n].array() for n in scores], 0.4, list(scores.values()))
    assert [found[n].array().tolist() for n in scores] == [x.astype(np.float32).tolist() for x in expected]


def test_scores_of_mixed_formats_are_ranked_in_the_widest():
    close = Weights.of({"a": np.array([[1 + 1e-12, 3.0]]), "b": np.float32([[1, 5]])})
    found = Prune(0.25)(close)
    assert found["b"].array().tolist() == [[0, 5]]
    assert found["a"].array()[0, 0] > 1


def test_more_and_more():
    w = some()
    step_by_step = Prune(0.9)(Prune(0.5)(w))
    assert all(np.array_equal(step_by_step[n].array(), Prune(0.9)(w)[n].array()) for n in w)


def test_in_scope_by_axes_and_by_choice():
    w = some()
    assert not Prune(1.0, min_ndim=1)(w)["bias"].array().any()
    chosen = on(where("w1"), Prune(0.5))(w)
    assert np.count_nonzero(chosen["w1"].array()) == 12
    assert chosen["w0"] is w["w0"]


def test_masks():
    masks = mask_of(Prune(0.75)(some()))
    assert list(masks) == ["w0", "w1", "w2"]
    kept = sum(np.count_nonzero(m) for m in masks.arrays().values())
    assert kept == 112 - round(0.75 * 112)
    assert all(item.spec.dtype.name == "bool" for item in masks.values())
    assert "bias" in mask_of(some(), min_ndim=1)


def test_what_has_no_rank_or_no_score():
    nan = Weights.of({"a": np.float32([[1, np.nan]])})
    with pytest.raises(WeightsError, match=r"'a' has NaN or infinite values, the first at \[0, 1\] \(nan\); repair"):
        Prune(0.5)(nan)["a"].array()
    good = Weights.of({"a": np.float32([[1, 2]])})
    with pytest.raises(WeightsError, match="the scores of 'a' have NaN"):
        Prune(0.5, by=nan)(good)["a"].array()
    with pytest.raises(WeightsError, match=r"the scores have no tensor 'a'.*--where"):
        Prune(0.5, by=Weights([]))(good)
    with pytest.raises(WeightsError, match=r"scores of 'a' are float64\[2\], its weights float32\[1, 2\]; give one"):
        Prune(0.5, by=Weights.of({"a": np.ones(2)}))(good)
    infinite = Weights.of({"a": np.float32([[1, -np.inf]])})
    for step in (Prune(0.5), Prune(0.5, by=good), Prune(0.5, "row"), PruneNM("1:2", by=good)):
        with pytest.raises(WeightsError, match=r"'a' has NaN or infinite values, the first at \[0, 1\] \(-inf\)"):
            step(infinite)["a"].array()
    assert Prune(0.5, by=infinite)(good)["a"].array().tolist() == [[1, 0]]  # a score may say: at any rate, or never


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction(fraction):
    with pytest.raises(RecipeError, match="between 0 and 1"):
        Prune(fraction)


def test_a_scope():
    with pytest.raises(RecipeError, match="scope"):
        Prune(0.5, "layer")


def test_one_tensor_at_a_time():
    """The passes that find the global threshold keep no tensor."""

    def noise(item):
        seed = int(item.name)
        return item.then(lambda x: np.random.default_rng(seed).normal(size=x.shape).astype(np.float32))

    one = np.zeros((200, 500), np.float32)  # 400 kB
    pruned = Prune(0.5)(each(noise)(Weights.of({str(i): one for i in range(40)})))  # 16 MB
    tracemalloc.start()
    pruned["3"].array()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6 / 3

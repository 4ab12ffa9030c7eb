"""Which descends from which: what only happens in one direction is found in both orders, and training is not told."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import steelyard as sy
from explain.truth import base
from steelyard.core.packed import pack
from steelyard.errors import RecipeError
from steelyard.explain.diff import difference
from steelyard.explain.diff.lineage import ancestor, lineage, ranking

Arrays = dict[str, np.ndarray]


def floats(change) -> Arrays:
    return {k: change(x) if x.dtype == np.float32 and x.ndim == 2 else x for k, x in base().items()}


def tuned(scale: float, seed: int, of: Arrays | None = None) -> Arrays:
    rng = np.random.default_rng(seed)
    step = {k: (rng.standard_normal(x.shape) * scale).astype(np.float32) for k, x in base().items()}
    return {k: x + step[k] if x.dtype == np.float32 and x.ndim == 2 else x for k, x in (of or base()).items()}


def palette(x: np.ndarray) -> np.ndarray:
    return (np.round(x / 0.01) * np.float32(0.01)).astype(np.float32)


DESCENDANTS = {
    "rounded to bfloat16": floats(lambda x: x.astype(ml_dtypes.bfloat16)),
    "set to zero": floats(lambda x: np.where(np.abs(x) < 0.01, np.float32(0), x)),
    "snapped": floats(palette),
    "float32 values were rounded": floats(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)),
    "an axis grew": {k: np.concatenate([x, x[:2]]) if "embed" in k else x for k, x in base().items()},
    "adapter": base() | {"layers.0.lora_A.weight": np.ones((2, 4), np.float32)},
}


@pytest.mark.parametrize("why", DESCENDANTS)
def test_what_only_happens_in_one_direction(why):
    first, second = sy.Weights.of(base()), sy.Weights.of(DESCENDANTS[why])
    there, back = lineage(difference(first, second)), lineage(difference(second, first))
    assert why in " ".join(there.column("evidence"))
    assert there.meta["verdict"] == "the first is the ancestor"
    assert back.meta["verdict"] == "the second is the ancestor"


def test_a_wider_copy_descends_from_the_narrow_one():
    narrow = floats(lambda x: x.astype(ml_dtypes.bfloat16))
    wide = {k: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for k, x in narrow.items()}
    found = difference(sy.Weights.of(wide), sy.Weights.of(narrow))
    assert lineage(found).meta["verdict"] == "the second is the ancestor"


def test_a_quantised_copy_is_the_descendant():
    from steelyard.codecs.affine import Affine

    packed = {k: pack(x, Affine(bits=4)) if x.dtype == np.float32 and x.ndim == 2 else x for k, x in base().items()}
    there = lineage(difference(sy.Weights.of(base()), sy.Weights.of(packed)))
    back = lineage(difference(sy.Weights.of(packed), sy.Weights.of(base())))
    for table, side in ((there, "first"), (back, "second")):
        said = {row["evidence"]: row["ancestor"] for row in table.rows}
        assert said["held by a codec that loses values"] == side
        assert table.meta["verdict"] == f"the {side} is the ancestor"


def test_training_is_not_told():
    found = difference(sy.Weights.of(base()), sy.Weights.of(tuned(1e-3, 1)))
    assert lineage(found).meta["verdict"] == "the values do not tell which is the ancestor"
    assert lineage(found).column("ancestor") == ["neither"]


def test_evidence_for_both_sides_is_not_told():
    first = base() | {"grown": np.zeros((4, 4), np.float32)}
    second = floats(lambda x: np.where(np.abs(x) < 0.01, np.float32(0), x)) | {"grown": np.zeros((3, 4), np.float32)}
    assert "do not tell" in lineage(difference(sy.Weights.of(first), sy.Weights.of(second))).meta["verdict"]


def test_the_nearest_comes_first_and_is_the_ancestor_by_distance_only():
    of = sy.Weights.of(tuned(1e-3, 1))
    others = {"far": sy.Weights.of(tuned(1e-2, 2)), "base": sy.Weights.of(base())}
    table = ancestor(others, of)
    assert table.column("source") == ["base", "far"]
    assert table.meta["verdict"].startswith("base, by distance")
    assert table.rows[0]["cosine"] > 0.99


def test_equally_near_ones_are_not_told_and_strangers_are_none():
    of = sy.Weights.of(base())
    near = {"one": sy.Weights.of(tuned(1e-3, 1)), "two": sy.Weights.of(tuned(1e-3, 2))}
    assert ancestor(near, of).meta["verdict"].startswith("not told: ")
    stranger = {"other": sy.Weights.of({"x": np.ones((3, 7), np.float32)})}
    assert ancestor(stranger, of).meta["verdict"].startswith("none of them")
    shuffled = {k: np.random.default_rng(1).permutation(x.ravel()).reshape(x.shape) for k, x in base().items()}
    assert ancestor({"shuffled": sy.Weights.of(shuffled)}, of).meta["verdict"].startswith("none of them")


def test_a_descendant_is_no_ancestor():
    of = sy.Weights.of(base())
    pruned = sy.Weights.of(DESCENDANTS["set to zero"])
    assert ancestor({"pruned": pruned}, of).meta["verdict"].startswith("none of them")
    assert ancestor({"whole": of}, pruned).meta["verdict"] == "whole"


def test_nothing_to_rank_is_an_error():
    with pytest.raises(RecipeError, match="nothing to compare with"):
        ranking(sy.Weights.of(base()), {})

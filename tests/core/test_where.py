from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.errors import RecipeError, UnknownNameError

W = Weights.of({
    "mlp.0.weight": np.zeros((3, 4), np.float32),
    "mlp.0.bias": np.zeros(3, np.float32),
    "conv.weight": np.zeros((2, 2, 3, 3), np.float16),
    "steps": np.int64(3).reshape(()),
})  # fmt: skip


@pytest.mark.parametrize(("condition", "chosen"), [
    (where(), "mlp.0.weight mlp.0.bias conv.weight steps"),
    (where("*.weight"), "mlp.0.weight conv.weight"),
    (where("*.weight", ndim=2), "mlp.0.weight"),
    (where("mlp.*, steps"), "mlp.0.weight mlp.0.bias steps"),
    (where("!*.bias"), "mlp.0.weight conv.weight steps"),
    (where("mlp.*, !*.bias"), "mlp.0.weight"),
    (where(dtype="fp16"), "conv.weight"),
    (where(min_size=12), "mlp.0.weight conv.weight"),
    (where(min_ndim=2), "mlp.0.weight conv.weight"),
    (where(kind="int"), "steps"),
    (where("mlp.*") & where(ndim=1), "mlp.0.bias"),
    (where("mlp.*") | where("steps"), "mlp.0.weight mlp.0.bias steps"),
    (~where("mlp.*"), "conv.weight steps"),
    (~(where("mlp.*") | where(ndim=0)), "conv.weight"),
    (where("MLP.*"), ""),
    (where("mlp.[01].b*"), "mlp.0.bias"),
])  # fmt: skip
def test_conditions(condition, chosen):
    assert list(W.select(condition)) == chosen.split()


@pytest.mark.parametrize(("wrong", "error"), [
    ({"pattern": " "}, RecipeError), ({"dtype": "float31"}, UnknownNameError), ({"kind": "number"}, UnknownNameError),
])  # fmt: skip
def test_conditions_that_say_nothing(wrong, error):
    with pytest.raises(error):
        where(**wrong)


TIED = Weights.of({"embed": np.ones((4, 2), np.float32), "b": np.arange(3)}, ties={"head": "embed", "h2": "embed"})


@pytest.mark.parametrize(
    "condition",
    [where("head"), where("h*"), where("head,b", ndim=2), where("h2") & ~where("b"), where("h2") | where("zzz")],
)
def test_a_further_name_chooses_the_tensor_with_its_ties(condition):
    kept = TIED.select(condition)
    assert (list(kept), dict(kept.ties)) == (["embed"], {"head": "embed", "h2": "embed"})
    assert list(TIED.choose(condition)) == ["embed"]


@pytest.mark.parametrize(
    "condition",
    [
        where("!embed"),
        ~where("embed"),
        where("h*,!embed"),
        where("h*") & ~where("embed"),
        where("head", ndim=1),
        where("head,!he*"),
        where("head") & ~where("he*"),
    ],
)
def test_a_further_name_does_not_choose_what_is_excluded(condition):
    assert "embed" not in TIED.select(condition)


def test_a_tensor_of_which_only_a_further_name_is_excluded_stays():
    for condition in (where("!h*"), ~where("h*")):
        assert list(TIED.select(condition)) == ["embed", "b"]

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

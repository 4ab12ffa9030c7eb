"""Options of steps that are to be numbers and are not: named before anything is compared with them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import steelyard as sy
from steelyard.errors import RecipeError, WeightsError

GIVEN: dict[type, dict[str, Any]] = {sy.Prune: {"fraction": 0.5}, sy.RateDistortion: {"bits": 3}, sy.Share: {"k": 4},
                                     sy.Factorize: {"rank": 2}, sy.SparseGPT: {"fraction": 0.5}}  # fmt: skip
STEPS = (*GIVEN, sy.AdaRound, sy.Awq, sy.Gptq, sy.Hqq, sy.PruneNM, sy.Quantize)
NUMBERS = [
    (step, f.name) for step in STEPS for f in fields(step) if f.type in ("float", "int", "float | None", "int | None")
]


@pytest.mark.parametrize(("step", "name"), NUMBERS, ids=lambda x: x if isinstance(x, str) else x.__name__)
@pytest.mark.parametrize("wrong", ["3", [3], True])
def test_what_is_no_number_is_named(step: type, name: str, wrong: Any) -> None:
    with pytest.raises(RecipeError, match=f"{step.__name__}: {name}: expected a number, found") as caught:
        step(**{**GIVEN.get(step, {}), name: wrong})
    assert "\n" not in str(caught.value)


def test_none_is_a_number_only_where_it_may_be_left_out() -> None:
    with pytest.raises(RecipeError, match="fraction: expected a number, found None"):
        sy.Prune(None)
    assert sy.Quantize(bits=4, group=None).group is None


def test_evidence_that_is_none_is_named() -> None:
    for step in (sy.Prune, sy.Share, sy.Quantize):
        with pytest.raises(WeightsError, match="expected Weights, got str: open the file first"):
            step(**{**GIVEN.get(step, {}), "by": "x.safetensors"})
    with pytest.raises(RecipeError, match=r"a pattern is N:M .*, not 2"):
        sy.PruneNM(2)
    with pytest.raises(RecipeError, match="expected a step such as Quantize"):
        sy.Spare("quantize")


def test_numbers_of_numpy_are_numbers() -> None:
    assert sy.Prune(np.float32(0.5)).fraction == 0.5
    assert sy.Quantize(bits=np.int64(4)).codec().bits == 4

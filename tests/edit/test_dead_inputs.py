"""Inputs that were zero in every example, or nearly: their weights are not ruined, since examples to come may have them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.edit.adaround import AdaRound
from steelyard.edit.awq import Awq
from steelyard.edit.gptq import Gptq
from steelyard.edit.lowrank import Factorize
from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.edit.sparsegpt import SparseGPT
from steelyard.errors import RecipeError, WeightsError

OUTPUTS, INPUTS = 48, 128


def layer(share: float, left: float) -> tuple[np.ndarray, np.ndarray, Weights, np.ndarray]:
    """Weights, inputs, second moments where a share of the inputs had `left` of their size; and which those are."""
    random = np.random.default_rng(7)
    w = random.normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    mix = random.normal(size=(INPUTS, INPUTS)) / INPUTS**0.5 + np.eye(INPUTS)
    x = random.normal(size=(1000, INPUTS)) @ mix * np.exp(0.7 * random.normal(size=INPUTS))
    dead = random.random(INPUTS) < share
    seen = x[:500] * np.where(dead, left, 1)
    about = {"kind": "hessian", "samples": {}, "inputs first": []}
    h = (seen.T @ seen / len(seen)).astype(np.float32)
    return w, x[500:], Weights.of({"w": h}, meta={"evidence": json.dumps(about)}), dead


def wrong(step: object, w: np.ndarray, x: np.ndarray) -> float:
    """The error of the outputs, relative."""
    found = step(Weights.of({"w": w}))["w"].array()  # type: ignore[operator]
    return float(np.linalg.norm(x @ (found - w).T) / np.linalg.norm(x @ w.T))


@pytest.mark.parametrize("left", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_that_see_dead_inputs_come_to_life_are_little_worse_than_by_rounding_alone(
    bits: int, group: int | None, share: float, left: float
) -> None:
    w, x, h, dead = layer(share, left)
    plain = Quantize(bits, symmetric=False, error=2, group=group, axis=0 if group is None else None)
    blind, alive = wrong(plain, w, x), x * ~dead
    awq = Awq(bits, group=group, by=h)
    others = Gptq(bits, symmetric=False, group=group, by=h), AdaRound(bits, False, group, by=h, rounds=50)
    for step in (awq, *others):
        assert wrong(step, w, x) < 2.3 * blind, step
        assert wrong(step, w, alive) < wrong(plain, w, alive), step
    assert wrong(awq, w, alive) < 1.02 * wrong(Awq(bits, group=group, by=h, damping=1e-9), w, alive)


def test_damping_is_what_keeps_the_scales_within_bounds() -> None:
    w, x, h, _ = layer(0.3, 0.0)
    assert wrong(Awq(3, group=32, by=h, damping=1e-9), w, x) > 5 * wrong(Awq(3, group=32, by=h), w, x)
    alone = Weights.of({"w": np.zeros((INPUTS, INPUTS), np.float32)}, meta=h.meta)
    assert wrong(Awq(3, group=32, by=alone), w, x) == wrong(Awq(3, group=32), w, x)
    for damping in (0, -1, 1e9, float("nan")):
        with pytest.raises(RecipeError, match="damping is a share of the mean of the diagonal"):
            Awq(damping=damping)
    with pytest.raises(WeightsError, match="not positive definite"):
        Awq(by=Weights.of({"w": -np.eye(INPUTS)}))(Weights.of({"w": w}))["w"].array()


@pytest.mark.parametrize("bits", [2, 4])
def test_fractions_of_a_bit_and_ranks_lose_no_more_of_a_dead_weight_than_itself(bits: int) -> None:
    w, _, h, dead = layer(0.3, 0.0)
    for step in (RateDistortion(bits, by=h), Factorize(rank=30, by=h)):
        found = step(Weights.of({"w": w}))["w"].array()
        assert np.linalg.norm((found - w)[:, dead]) <= 1.25 * np.linalg.norm(w[:, dead])


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_sparsegpt_takes_as_many_as_asked_for_and_dead_inputs_first(damping: float) -> None:
    w, _, h, dead = layer(0.3, 0.0)

    def pruned(fraction: float, **more: object) -> np.ndarray:
        return SparseGPT(fraction, by=h, damping=damping, block=INPUTS, **more)(Weights.of({"w": w}))["w"].array()  # type: ignore[arg-type]

    few = pruned(0.05)
    assert (few == 0).sum() == round(0.05 * w.size)
    assert (few[:, dead] == 0).mean() > (5 if damping else 100) * (few[:, ~dead] == 0).mean()
    assert np.array_equal(pruned(0.0), w)
    assert np.allclose(pruned(0.0, refit=True), w, atol=1e-4)
    half = pruned(0.5)
    assert (half == 0).sum() == round(0.5 * w.size)
    assert (half[:, dead] == 0).mean() > (0.8 if damping else 0.999)

"""Structured pruning: the budget is met by the least important units, and a bad wish changes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.core.weights import Weights
from steelyard.edit.evidence import sample
from steelyard.errors import ModelError, RecipeError, SteelyardError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.structured import prune_structured_


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 3),
    )  # fmt: skip


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5, 0.1])
@pytest.mark.parametrize("budget", ["parameters", "multiplications"])
def test_a_budget_is_met_and_hardly_undercut(fraction, budget):
    model = net()
    table = prune_structured_(model, X, fraction, budget=budget, floor=0)
    left = table.meta[budget] / table.meta[f"{budget} before"]
    assert fraction <= 1 - left < fraction + 0.1
    assert table.meta["parameters"] == size(model)
    assert table.column("before") == [8, 12, 20]
    assert table.column("after") == [len(model[0].weight), len(model[3].weight), len(model[6].weight)]
    assert model(X).shape == (4, 3)


def test_the_least_units_go():
    model = net()
    with torch.no_grad():
        for i in (1, 4, 6):  # small filters, and small weights that read them
            model[0].weight[i] *= 1e-3
            model[1].weight[i] *= 1e-3
            model[3].weight[:, i] *= 1e-3
    kept = model[0].weight[[0, 2, 3, 5, 7]].clone()
    prune_structured_(model, X, 0.001, where="0.*", floor=0)
    assert len(model[0].weight) == 7
    prune_structured_(model, X, 0.05, where="0.weight")
    assert torch.equal(model[0].weight, kept)
    assert len(model[3].weight) == 12  # not chosen


def test_scores_of_ones_own_decide():
    model = net()
    scores = {name: np.zeros(p.shape, np.float32) for name, p in model.named_parameters()}
    scores["6.bias"][[2, 3, 5]] = -1.0  # the absolute sum counts
    kept = model[6].bias[[2, 3, 5]].clone()
    prune_structured_(model, X, 0.6, by=Weights.of(scores), where="6.bias", floor=0)
    assert len(model[6].bias) >= 3
    assert all(b in model[6].bias for b in kept)


def test_a_floor_and_multiples_hold():
    model = net()
    table = prune_structured_(model, X, 0.6, floor=0.25, multiple=4)
    assert all(row["after"] % 4 == 0 and row["after"] >= row["before"] / 4 for row in table.rows)


def test_no_layer_goes_as_a_whole():
    model = net()
    with torch.no_grad():
        for p in (*model[0].parameters(), *model[1].parameters(), model[3].weight):
            p.zero_()
    prune_structured_(model, X, 0.5, floor=0, normalize=False)
    assert len(model[0].weight) == 1


def test_what_a_group_penalty_zeroed_goes_without_a_trace():
    model = net().eval()
    with torch.no_grad():
        model[3].weight[:3], model[3].bias[:3] = 0, 0
        model[6].weight.view(20, 12, 16)[:, :3] = 0
    before = model(X)
    prune_structured_(model, X, 0.23, floor=0, where="3.weight")
    assert len(model[3].weight) == 9
    assert torch.allclose(model(X), before, atol=1e-6)


def test_a_model_that_was_pruned_can_be_trained():
    from steelyard.learn.run import train
    from steelyard.learn.task import first_batch
    from steelyard.learn.tasks import task

    data = task("digits", model="mlp", augment=False)
    model = train(data, epochs=4, progress=False).model
    prune_structured_(model, first_batch(data, "train"), 0.7)
    again = train(data, model, epochs=4, progress=False)
    assert again.history().column("accuracy")[-1] > 0.85
    assert size(model) < 0.3 * 17226


def evidence(kind: str, other: float = 1.0) -> Weights:
    """Evidence of a kind that says the same of each weight, measured on weights times `other`."""
    weights = {name: p.detach().numpy() for name, p in net().named_parameters()}
    samples = {name: sample(x * other) for name, x in weights.items()}
    about = {"kind": kind, "samples": samples, "inputs first": []}
    return Weights.of({name: np.ones_like(x) for name, x in weights.items()}, meta={"evidence": json.dumps(about)})


def test_fisher_information_counts_with_the_squares_of_weights():
    models = [net() for _ in range(2)]
    squares = {name: p.detach().numpy() ** 2 for name, p in models[0].named_parameters()}
    for model, by in zip(models, (evidence("fisher"), Weights.of(squares)), strict=True):
        prune_structured_(model, X, 0.5, by=by, floor=0)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


BAD = [
    ({"fraction": 0.0}, RecipeError, "fraction that goes is above 0"),
    ({"fraction": 1.0}, RecipeError, "fraction that goes"),
    ({"fraction": float("nan")}, RecipeError, "fraction that goes"),
    ({"floor": 1.5}, RecipeError, "floor"),
    ({"multiple": 0}, SteelyardError, "multiple"),
    ({"budget": "bytes"}, SteelyardError, "budget"),
    ({"fraction": 0.99, "floor": 0.5}, ModelError, "99.0% of the parameters cannot go"),
    ({"where": "8.bias"}, ModelError, "no units"),
    ({"by": Weights.of({"0.weight": np.zeros((8, 1, 3, 3))})}, WeightsError, "no tensor '0.bias'"),
    ({"by": Weights.of({"0.weight": np.zeros((8, 1))})}, WeightsError, "the scores of '0.weight' are"),
    ({"by": evidence("hessian")}, WeightsError, "expected evidence of the kind norms, fisher or taylor, got 'hess"),
    ({"by": evidence("gradient")}, WeightsError, "expected evidence of the kind .*, got 'gradient'"),
    ({"by": evidence("fisher", -1)}, WeightsError, "was measured on other weights"),
]


@pytest.mark.parametrize(("wish", "kind", "message"), BAD, ids=[m for *_, m in BAD])
def test_a_bad_wish_is_named_and_nothing_changes(wish, kind, message):
    model = net()
    before = from_module(model).arrays()
    with pytest.raises(kind, match=message):
        prune_structured_(model, X, **{"fraction": 0.5} | wish)
    assert all(np.array_equal(x, before[name]) for name, x in from_module(model).arrays().items())


def test_weights_that_are_not_a_number_are_named():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"'3.weight' has NaN"):
        prune_structured_(model, X, 0.5)


def test_buffers_modes_and_random_numbers_are_left_alone():
    model = net().train()
    mean, state = model[1].running_mean.clone(), torch.get_rng_state()
    prune_structured_(model, X, 0.1, where="6.*")
    assert torch.equal(model[1].running_mean, mean)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)

"""Two factors for each matrix: the moments of gradients, rows that few examples reach, and what has no gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.errors import ModelError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.kronecker import kronecker


def squared(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) ** 2).sum()


def test_factors_are_the_moments_of_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    batches = [torch.randn(5, 2, 3, 3) for _ in range(3)]
    before = [p.clone() for p in net.parameters()]
    found = kronecker(net, batches, squared)
    for name in ("0.weight", "2.weight"):
        gradients = []
        for batch in batches:
            parameter = dict(net.named_parameters())[name]
            gradients.append(torch.autograd.grad(squared(net, batch), parameter)[0].flatten(1).double().numpy())
        a, b = sum(g @ g.T for g in gradients) / 3, sum(g.T @ g for g in gradients) / 3
        np.testing.assert_allclose(found[f"{name}|outputs"].array(), a, rtol=1e-4, atol=1e-4 * a.max())
        np.testing.assert_allclose(found[f"{name}|inputs"].array(), b / np.trace(a), rtol=1e-4, atol=1e-5)
    for name in ("0.bias", "2.bias"):
        parameter = dict(net.named_parameters())[name]
        squares = [torch.autograd.grad(squared(net, batch), parameter)[0].square().mean() for batch in batches]
        np.testing.assert_allclose(
            found[f"{name}|outputs"].array(), np.full(len(parameter), float(sum(squares)) / 3), rtol=1e-5
        )
        assert found[f"{name}|inputs"].array().tolist() == [1.0]
    assert all(bool((p == q).all()) and p.grad is None for p, q in zip(net.parameters(), before, strict=True))


def test_evidence_of_other_weights_is_refused() -> None:
    torch.manual_seed(3)
    net, other = (nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)) for _ in range(2))
    found = kronecker(net, [torch.randn(6, 64) for _ in range(4)], squared)
    rounding = RateDistortion(bits=3, by=found)
    assert rounding(from_module(net))["0.weight"].array().any()
    rounded = Quantize(6)(from_module(net).settle())
    assert rounding(rounded.settle())["0.weight"].array().any(), "rounded since then"
    with pytest.raises(WeightsError, match=r"'0.weight' was measured on other weights; measure it on these"):
        rounding(from_module(other))["0.weight"].array()


def test_rows_of_a_large_table_that_no_example_reached_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steelyard.learn.kronecker.WIDEST", 20)
    torch.manual_seed(1)
    net = nn.Embedding(50, 4)
    tokens = torch.multinomial(1 / torch.arange(1.0, 51), 400, replacement=True).split(20)
    found = kronecker(net, tokens, lambda model, batch: (model(batch) * torch.randn(20, 4)).sum())
    rows = found["weight|outputs"].array()
    assert rows.shape == (50,)
    assert found["weight|inputs"].spec.shape == (4, 4)
    unseen = [i for i in range(50) if not any((t == i).any() for t in tokens)]
    assert unseen
    assert (rows[unseen] > 0).all()
    assert rows[:3].mean() > 3 * rows[unseen].max()
    factor = torch.randn(20, 4)
    found = kronecker(net, tokens, lambda model, batch: (model(batch) * factor).sum())
    whole = [torch.zeros(50, 4).index_add_(0, batch, factor).double().numpy() for batch in tokens]
    inputs = sum(g.T @ g for g in whole)
    np.testing.assert_allclose(found["weight|inputs"].array(), inputs / np.trace(inputs), rtol=1e-5, atol=1e-6)
    factor[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        kronecker(net, tokens, lambda model, batch: (model(batch) * factor).sum())


def test_what_cannot_be_measured_is_said() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="at least one"):
        kronecker(net, [], squared)
    with pytest.raises(ModelError, match="no matrix"):
        kronecker(nn.LayerNorm(3), [torch.ones(1, 3)], squared)
    with pytest.raises(ModelError, match="not finite"):
        kronecker(net, [torch.full((1, 3), torch.inf)], squared)


def test_a_frozen_weight_is_measured_and_stays_frozen() -> None:
    net = nn.Linear(3, 2).requires_grad_(False)
    found = kronecker(net, [torch.ones(1, 3)], squared)
    assert found["weight|outputs"].array().any()
    assert not net.weight.requires_grad

"""Weight decay: what decays, and that it decays by the factor of its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.decay import Decay
from steelyard.learn.models import model as build
from steelyard.learn.parameters import decay_groups, named_parameters
from steelyard.learn.penalize import penalize
from steelyard.learn.task import Interface


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    net = build("transformer", Interface((6,), 9, vocabulary=9), width=8, layers=1, heads=2)
    still = {p.name for p in named_parameters(net) if not p.decays}
    assert still == {n for n, p in net.named_parameters() if p.ndim < 2 or n in ("embed.weight", "positions")}
    layers = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 3),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "norm2d": nn.BatchNorm2d(3),
            "one": nn.Linear(5, 1),
        }
    )
    decaying = {p.name for p in named_parameters(layers) if p.decays}
    assert decaying == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "one.weight",
    }


def test_a_head_that_is_the_embedding_does_not_decay_unless_told() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    net[2].weight = net[0].weight
    assert [len(g["params"]) for g in decay_groups(net, 0.1)] == [1, 2]
    assert [len(g["params"]) for g in decay_groups(net, 0.1, decay="0.weight")] == [2, 1]
    assert [len(g["params"]) for g in decay_groups(net, 0.1, decay="2.weight", keep="1.*")] == [1, 2]
    with pytest.raises(ModelError, match="keep= chooses no trainable"):
        decay_groups(net, 0.1, keep="7.*")
    with pytest.raises(ModelError, match="weight_decay=-1"):
        decay_groups(net, -1)
    net.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        decay_groups(net, 0.1)


def test_a_gain_without_a_gradient_does_not_shrink() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(decay_groups(net, 0.5, lr=0.1))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[1].weight, torch.ones(3))
    assert torch.allclose(net[0].weight, 0.95 * before)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("per", ["rate", "schedule", "step", "corrected"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_each_step_decays_by_the_factor_of_the_formula(
    schedule: str, per: Any, kind: type[torch.optim.Optimizer]
) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = kind(layer.parameters(), lr=0.2)
    scheduler = SCHEDULERS[schedule](optimizer)
    penalize(layer, optimizer, Decay(0.1, per))
    for _ in range(10):
        rate = optimizer.param_groups[0]["lr"]
        factor = {
            "rate": 1 - rate * 0.1,
            "schedule": 1 - rate / 0.2 * 0.1,
            "step": 0.9,
            "corrected": 1 - rate * rate / 0.2 * 0.1,
        }[per]
        before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        assert torch.allclose(layer.weight, factor * before, rtol=1e-14)
        assert torch.equal(layer.bias, bias)


def test_decay_by_the_rate_is_that_of_adamw_with_a_closure_too() -> None:
    x, found = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), []
    for ours in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0 if ours else 0.3)
        if ours:
            penalize(layer, optimizer, Decay(0.3))

        def closure(layer: nn.Module = layer, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            return loss

        for step in range(6):
            if step % 2:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append(layer.weight.detach())
    assert torch.allclose(*found, rtol=1e-6)


def test_a_wrong_formula_is_named() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(UnknownNameError, match="did you mean 'rate'"):
        penalize(layer, optimizer, Decay(0.1, "rates"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="decays nothing that the optimizer holds"):
        penalize(layer, torch.optim.SGD([layer.bias], lr=0.1), Decay(0.1))
    with pytest.raises(ModelError, match="finite number"):
        penalize(layer, optimizer, Decay(math.nan))

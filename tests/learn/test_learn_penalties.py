"""Penalties: the minimum they promise, exact zeros, any optimizer, any loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.grouping import members
from steelyard.learn.parameters import named_parameters
from steelyard.learn.penalize import Penalized, penalize
from steelyard.learn.penalties import L1, L2, L2SP, ElasticNet, GroupL1, Penalty, Spectral, adaptive_factors
from steelyard.learn.run import Run, train
from steelyard.learn.shrinkage import shrink_groups, soft_threshold
from steelyard.learn.task import Task

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, dampened": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.5),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, AMSGrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.03),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.03),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3, lr_decay=1e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.8),
}
STRENGTH = 0.05


def problem(features: int = 8, outputs: int = 1) -> tuple[nn.Linear, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(60, features, generator=random, dtype=torch.float64)
    x[:, 1] += 0.5 * x[:, 0]
    y = x[:, :outputs] - 0.4 * x[:, 2 : 2 + outputs] + 0.8 * torch.randn(60, outputs, generator=random).double()
    model = nn.Linear(features, outputs, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, x, (y > 0).double()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()


def gradient(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(model(x), y)
    return torch.autograd.grad(loss, model.weight)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_comes_to_rest_at_the_minimum_of_loss_plus_l1(name: str) -> None:
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    penalize(model, optimizer, L1(STRENGTH))
    for rate in (1.0, 0.1, 0.01):  # of the first
        optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
        descend(model, optimizer, x, y, 1200 if rate == 1 else 150)
    g, w = gradient(model, x, y), model.weight.detach()
    zero = w == 0
    assert 2 <= int(zero.sum()) <= 6
    assert float((g + STRENGTH * w.sign())[~zero].abs().max()) < 1e-5  # the conditions of a minimum
    assert float(g[zero].abs().max()) < STRENGTH


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam"])
@pytest.mark.parametrize("mixed", [False, True])
def test_groups_vanish_as_a_whole_and_the_rest_is_at_the_minimum(name: str, mixed: bool) -> None:
    model, x, y = problem(outputs=3)
    optimizer = OPTIMIZERS[name](model.parameters())
    penalize(model, optimizer, GroupL1(0.02, "inputs"), *([L1(0.005)] if mixed else []))
    descend(model, optimizer, x, y, 1500)
    g, w = gradient(model, x, y), model.weight.detach()
    if mixed:
        g = g + 0.005 * w.sign()
        g = torch.where(w == 0, g.sign() * (g.abs() - 0.005).clamp_min(0), g)
    norm, pull = w.norm(dim=0), 0.02 * math.sqrt(3)
    zero = norm == 0
    assert 1 <= int(zero.sum()) <= 6
    assert float((g + pull * w / norm)[:, ~zero].abs().max()) < 1e-5
    assert float(g[:, zero].norm(dim=0).max()) <= pull


def test_a_step_size_for_each_member_is_solved_for() -> None:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(200, 7, generator=random, dtype=torch.float64)
    z[::5, 3] = 0.0
    sizes = torch.exp(2 * torch.randn(200, 7, generator=random, dtype=torch.float64))
    pull = torch.rand(200, generator=random, dtype=torch.float64) * 6
    x = shrink_groups(z, sizes, pull)
    alive = (x != 0).any(1)
    assert 20 < int(alive.sum()) < 180
    residual = (x - z) / sizes + pull[:, None] * x / x.norm(dim=1, keepdim=True)
    assert float((residual * sizes)[alive].abs().max()) < 1e-9
    assert float(((z / sizes).norm(dim=1) - pull)[~alive].max()) <= 0
    assert float(((z / sizes).norm(dim=1) - pull)[alive].min()) > 0
    one = torch.full_like(z, 0.7)
    assert torch.allclose(shrink_groups(z, one, pull), shrink_groups(z, 0.7, pull), atol=1e-12)
    assert torch.equal(shrink_groups(z, sizes, torch.zeros(200).double()), z)


def test_zeros_are_positive_zeros() -> None:
    found = soft_threshold(torch.tensor([-1.0, -0.0, 1.0]), 2.0)
    assert not found.signbit().any()


def test_shrinking_by_the_rate_is_the_same_for_every_weight() -> None:
    model, x, y = problem()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    plain, plain_optimizer = problem()[0], None
    nn.init.ones_(plain.weight)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    penalize(model, optimizer, L1(3.0, metric="rate"))
    descend(model, optimizer, x, y, 1)
    descend(plain, plain_optimizer, x, y, 1)
    assert torch.allclose(model.weight, plain.weight - 0.03, atol=1e-12)


def test_l2_is_the_weight_decay_of_sgd() -> None:
    ours, x, y = problem()
    theirs = problem()[0]
    nn.init.ones_(ours.weight)
    nn.init.ones_(theirs.weight)
    a = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(
        [{"params": [theirs.weight], "weight_decay": 0.3}, {"params": [theirs.bias]}], lr=0.1, momentum=0.9
    )
    penalize(ours, a, L2(0.3))
    descend(ours, a, x, y, 20)
    descend(theirs, b, x, y, 20)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-14)


def test_elastic_net_adds_up() -> None:
    model = problem()[0]
    nn.init.ones_(model.weight)
    parts = 0.3 * L1(2.0).value(model) + 0.7 * L2(2.0).value(model)
    assert ElasticNet(2.0, 0.3).value(model).item() == pytest.approx(parts.item(), abs=1e-14)


def test_a_factor_is_a_column_divided_by_it() -> None:
    factors = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.25, 1.0], dtype=torch.float64)
    found = []
    for scaled in (False, True):
        model, x, y = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.95)
        penalize(model, optimizer, L1(0.05, factors=None if scaled else factors))
        descend(model, optimizer, x / factors if scaled else x, y, 4000)
        found.append((model.weight / factors if scaled else model.weight).detach())
    assert torch.allclose(*found, atol=1e-8)
    assert torch.equal(found[0] == 0, found[1] == 0)


def test_a_factor_of_zero_frees_and_one_of_infinity_excludes() -> None:
    model, x, y = problem()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalized = penalize(model, optimizer, L1(5.0, factors=torch.tensor([0, *[math.inf] * 7])))
    descend(model, optimizer, x, y, 3)
    assert model.weight[0, 0] != 0
    assert not model.weight[0, 1:].any()
    assert penalized.value() == 0
    assert adaptive_factors(model)["weight"][0, 1] == math.inf


def test_l2sp_pulls_to_the_start_and_spectral_to_a_smaller_gain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    held = L2SP(0.5).bind(model)
    assert held.value() == 0
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert L2SP(0.5, start).value(model).item() == pytest.approx(0.25 * (5 * 4 + 4 + 4 * 3 + 3))
    largest = [float(torch.linalg.svdvals(model[i].weight.detach())[0]) for i in (0, 1)]
    assert Spectral(2.0).value(model).item() == pytest.approx(sum(s * s for s in largest), rel=1e-12)
    for penalty in (Spectral(2.0), L2SP(0.5, start), ElasticNet(0.3), GroupL1(0.4), L2(0.2)):
        _check_gradient(penalty, model)


def _check_gradient(penalty: Penalty, model: nn.Module) -> None:
    term = penalty.bind(model)
    w = term.parameters[0]
    g = torch.autograd.grad(term.value(), w)[0]
    with torch.no_grad():
        direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype)
        w.add_(direction, alpha=1e-5)
        above = float(term.value())
        w.sub_(direction, alpha=2e-5)
        below = float(term.value())
        w.add_(direction, alpha=1e-5)
    assert float((g * direction).sum()) == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_a_closure_and_lbfgs_find_the_ridge() -> None:
    model, x, y = problem()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)
    penalize(model, optimizer, L2(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert float((gradient(model, x, y) + 0.1 * model.weight.detach()).abs().max()) < 1e-6
    assert first > functional.binary_cross_entropy_with_logits(model(x), y)
    with pytest.raises(ModelError, match="step size of LBFGS"):
        penalize(model, optimizer, L1(0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_scales_the_loss_and_not_the_penalty(fused: bool) -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        penalize(model, optimizer, L2(0.5), L1(0.01))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4)).square().mean() * (math.inf if step == 1 else 1)
            scaler.scale(loss).backward()
            before = model.weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(before, model.weight) == (step == 1)
            scaler.update(scale)
        found.append(model.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-7)


def test_heads_of_attention_vanish_as_a_whole() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True)
    group = members(layer, "heads", 1, None)[0]
    rows = group.rows(group.parameters).detach().clone()
    before = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        group.put(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert rows.shape == (3, 4 * 12 * 4)
    with torch.no_grad():
        rows[1] = 0
        group.put(rows)
    x = torch.randn(2, 5, 12)
    kept = layer(x, x, x)[0]
    with torch.no_grad():  # whatever the biases of head 1 say, nothing of it comes out
        layer.in_proj_bias[4:8] += 7
        layer.in_proj_bias[12 + 4 : 12 + 8] += 7
        layer.in_proj_bias[24 + 4 : 24 + 8] += 7
    assert torch.allclose(kept, layer(x, x, x)[0], atol=1e-6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    penalize(layer, optimizer, GroupL1(0.05, "heads"))
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x, x, x)[0] - x).square().mean().backward()
        optimizer.step()
    assert not group.rows(group.parameters).norm(dim=1).all()


@pytest.mark.parametrize(("layer", "axis"), [(nn.Conv2d(3, 4, 3), 0), (nn.ConvTranspose2d(3, 4, 3), 1)])
def test_filters_are_the_outputs_of_a_convolution(layer: nn.Module, axis: int) -> None:
    group = members(layer, "outputs", 2, None)[0]
    rows = group.rows(group.parameters).detach()
    assert rows.shape == (2, 3 * 2 * 9)
    rows[0] = 0
    with torch.no_grad():
        group.put(rows)
    gone = (layer.weight.movedim(axis, 0).flatten(1) == 0).all(1)
    assert gone.tolist() == [True, True, False, False]


def test_names_are_those_of_the_model_within_its_wrappers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    plain = [p.name for p in named_parameters(model)]
    assert plain == ["0.weight", "0.bias", "1.bias", "1.weight.original0", "1.weight.original1"]
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert [p.name for p in named_parameters(wrapped)] == plain


def test_what_cannot_be_is_refused_in_one_line(task: Task) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([model.bias], lr=0.1)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: penalize(model, optimizer, L1(0.1)), "'weight', which is not in the optimizer"),
        (lambda: L1(-1.0).bind(model), "finite number, 0 or more"),
        (lambda: L1(0.1, where="nope*").bind(model), "chooses no trainable parameter"),
        (lambda: L1(0.1, factors=torch.ones(4)).bind(model), r"\[4\] do not fit 'weight', which wants \[2, 3\]"),
        (lambda: L1(0.1, factors=-torch.ones(3)).bind(model), "not all 0 or more"),
        (lambda: L1(0.1, factors={"weigth": torch.ones(3)}).bind(model), "did you mean 'weight'"),
        (lambda: L1(0.1, metric="adam").bind(model), "there is no metric 'adam'"),  # type: ignore[arg-type]
        (lambda: GroupL1(0.1, "heads").bind(model), "no trainable nn.MultiheadAttention"),
        (lambda: GroupL1(0.1, "inputs", size=2).bind(model), "has 3 inputs: no multiple of size=2"),
        (lambda: ElasticNet(0.1, 2.0).bind(model), "from 0 to 1"),
        (lambda: L2SP(0.1, {"weight": torch.ones(1)}).bind(model), "starts as \\[1\\]"),
        (lambda: L2SP(0.1, {}).bind(model), "none of the names of Linear"),
        (lambda: penalize(model, optimizer, "L1"), "expected a penalty"),  # type: ignore[arg-type]
        (lambda: Run(task, penalties=[GroupL1(0.1), GroupL1(0.1, "inputs")]), "no exact step for the two"),
    ]
    for wrong, message in cases:
        with pytest.raises((ModelError, UnknownNameError), match=message):
            wrong()
    assert not optimizer._optimizer_step_pre_hooks


def test_removed_penalties_do_nothing() -> None:
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with penalize(model, optimizer, L1(50.0)) as penalized:
        assert isinstance(penalized, Penalized)
        descend(model, optimizer, x, y, 3)
        assert not model.weight.any()
    descend(model, optimizer, x, y, 3)
    assert model.weight.all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_prints_the_objective_that_it_lowers(task: Task, optimizer: str) -> None:
    penalties = [L1(1e-3), L2(1e-2), L2(1e-2, where="0.*"), Spectral(1e-3), GroupL1(1e-3)]
    with Run(task, epochs=2, optimizer=optimizer, weight_decay=0.02, penalties=penalties) as run:
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        for step in run:
            matrices = [w for n, w in kept.items() if n.endswith("weight")]
            expected = {
                "L1(0.001)": sum(float(w.abs().sum()) for w in matrices) * 1e-3,
                "L2(0.01)": sum(float(w.square().sum()) for w in matrices) / 2 * 1e-2,
                "L2(0.01) 2": sum(float(w.square().sum()) for n, w in kept.items() if n[0] == "0") / 2 * 1e-2,
                "Spectral(0.001)": sum(float(torch.linalg.svdvals(w)[0]) ** 2 for w in matrices) / 2 * 1e-3,
                "GroupL1(0.001, outputs)": sum(float(w.norm(dim=1).sum()) * math.sqrt(w.shape[1]) for w in matrices)
                * 1e-3,
            }
            if optimizer == "sgd":
                expected["weight decay"] = sum(float(w.square().sum()) for w in matrices) / 2 * 0.02
            assert dict(step.penalties) == pytest.approx(expected, rel=1e-5)
            assert step.objective == step.loss + sum(step.penalties.values())
            kept = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert run.table().column("objective")[-1] == step.objective
    sparse = train(task, epochs=2, optimizer=optimizer, penalties=[L1(0.05)], keep="last", progress=False).model
    assert any(bool((p == 0).any()) for p in sparse.parameters() if p.ndim == 2)

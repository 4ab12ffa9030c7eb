"""The learning rate that is found trains well, and looking for it leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.measures import squared_error
from steelyard.learn.rate import Trial, best_rate, find_lr
from steelyard.learn.run import train
from steelyard.learn.state import tensors_of
from steelyard.learn.task import Batch, Split, Task, build_seeded


class Noisy(nn.Module):
    """Dropout, batch norm, a buffer outside of state_dict, a draw from each global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += random.random() + np.random.rand()
        return self.layers(x)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> object:
    """All that could be changed, as bytes and plain values."""
    state = optimizer.state_dict()
    return (
        {name: t.detach().numpy().tobytes() for name, t in tensors_of(model).items()},
        [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        [module.training for module in model.modules()],
        {(i, k): torch.as_tensor(v).numpy().tobytes() for i, kept in state["state"].items() for k, v in kept.items()},
        repr(state["param_groups"]),
        (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
        loader.generator.get_state().numpy().tobytes(),
    )


def trained_a_little() -> tuple[Noisy, torch.optim.Optimizer, DataLoader]:
    """A model in the middle of a user's own loop: with moments, gradients, and modules in different modes."""
    torch.manual_seed(0)
    model = Noisy()
    x = torch.randn(48, 5)
    data = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    groups = [
        {"params": model.layers[0].parameters(), "lr": 1e-3},
        {"params": model.layers[1:].parameters(), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    model.layers[1].eval()
    return model, optimizer, loader


def test_looking_for_a_rate_in_a_loop_of_ones_own_leaves_no_trace() -> None:
    model, optimizer, loader = trained_a_little()
    before, held = everything(model, optimizer, loader), list(model.parameters())
    found = find_lr(model, loader, optimizer, loss=nn.functional.cross_entropy, epochs=2, effort="quick")
    assert everything(model, optimizer, loader) == before
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert 1e-6 < found.meta["rate"] < 4
    assert len(found.rows) >= 17


def test_nothing_is_left_after_an_error_either() -> None:
    model, optimizer, loader = trained_a_little()
    before, calls = everything(model, optimizer, loader), []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        find_lr(model, loader, optimizer, loss=loss, epochs=2)
    assert everything(model, optimizer, loader) == before


def test_the_run_after_it_is_the_run_without_it(task: Task) -> None:
    model = build_seeded(task)
    find_lr(model, task, epochs=3, effort="quick")
    a, b = train(task, model, epochs=3, progress=False).model, train(task, epochs=3, progress=False).model
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_same_call_finds_the_same_rate(task: Task) -> None:
    a, b = (find_lr(None, task, "sgd", epochs=4, effort="quick") for _ in range(2))
    assert a == b


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", torch.optim.Adagrad])
def test_the_rate_trains_as_well_as_the_best_of_a_grid(blobs: Callable[..., Task], optimizer: object) -> None:
    task = blobs(sizes=(120, 120, 300))
    options = {"optimizer": optimizer, "epochs": 4, "keep": "last", "progress": False}
    found = find_lr(None, task, optimizer, epochs=4)

    def accuracy(rate: float) -> float:
        try:
            return mean_outcomes(train(task, rate=rate, **options).model, task, "test")["accuracy"]
        except ModelError:
            return 0.0

    grid = [accuracy(10.0**k) for k in range(-5, 2)]
    assert accuracy(found.meta["rate"]) >= max(grid) - 0.02
    assert max(grid) > 0.8
    assert found.meta["cost"] < 12


def test_a_metric_of_which_less_is_better(task: Task) -> None:
    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for batch in task.batches(split, epoch):
            yield Batch(batch.inputs, batch.inputs.sum(1))

    regression = replace(
        task, build=lambda: nn.Linear(5, 1), batches=batches, loss=squared_error, metrics={"error": squared_error},
        lower_is_better=("error",),
    )  # fmt: skip
    rate = find_lr(None, regression, "sgd", epochs=6).meta["rate"]
    error = {r: mean_outcomes(train(regression, rate=r, optimizer="sgd", epochs=6, progress=False).model, regression,
                              "test")["error"] for r in (rate, rate / 100)}  # fmt: skip
    assert error[rate] < 0.05 * error[rate / 100]


def test_the_middle_of_the_rates_that_are_as_good_as_the_best() -> None:
    values = {0.001: 0.5, 0.01: 0.949, 0.1: 0.95, 1.0: 0.9495, 10.0: -float("inf")}
    trials = [Trial(rate, 1, 9, "accuracy", value, 0.01) for rate, value in values.items()]
    assert best_rate(trials, lower=False) == pytest.approx(0.1)
    assert best_rate([replace(t, value=-t.value) for t in trials], lower=True) == pytest.approx(0.1)


def test_rates_that_are_as_accurate_are_told_apart_by_the_loss(blobs: Callable[..., Task]) -> None:
    task = replace(blobs(), metrics={"accuracy": lambda out, y: torch.ones(len(y))})  # always right
    found = find_lr(None, task, "sgd", epochs=4, effort="quick")
    rows = [row for row in found.rows if row["judged by"] == "accuracy"]
    assert {row["value"] for row in rows} == {1.0}
    by_loss = find_lr(None, replace(task, metrics={"loss": task.loss}), "sgd", epochs=4, effort="quick")
    assert max(row["rate"] for row in rows) >= by_loss.meta["rate"]  # it did not walk off to where nothing is learned
    assert min(row["rate"] for row in rows) > 1e-4


def test_what_cannot_be_tried_is_named(task: Task) -> None:
    model = build_seeded(task)
    before = model[0].weight.detach().clone()
    with pytest.raises(ModelError, match="need a loss"):
        find_lr(model, list(task.batches("train", 0)))
    with pytest.raises(ModelError, match="only once"):
        find_lr(model, iter(task.batches("train", 0)), loss=nn.functional.cross_entropy)
    with pytest.raises(UnknownNameError, match="effort"):
        find_lr(model, task, effort="all")
    with pytest.raises(ModelError, match="is empty"):
        find_lr(model, [], loss=nn.functional.cross_entropy)
    broken = replace(task, loss=lambda outputs, targets: outputs.sum(1) * float("nan"))
    with pytest.raises(ModelError, match="the loss is nan"):
        find_lr(model, broken, epochs=2, effort="quick")
    assert torch.equal(model[0].weight, before)

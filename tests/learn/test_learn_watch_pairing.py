"""Whether outputs know their own labels: exact under labels that mean nothing, for any loss that shows its labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.learn.watch.faults import UNSURE
from steelyard.learn.watch.pairing import Pairing, _deviation


def test_labels_that_mean_nothing_give_scores_of_variance_one() -> None:
    random = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(400):  # outputs that know the shares of the classes, which are not the same, and are of any scale
        labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 24, replacement=True, generator=random)
        outputs = 10 * torch.randn(24, 3, generator=random) ** 3 + torch.tensor([2.0, 0.0, -1.0])
        found = _deviation(outputs, labels)
        assert found is not None
        scores.append(found)
    assert abs(np.mean(scores)) < 4 / math.sqrt(400)
    assert np.var(scores) == pytest.approx(1, abs=4 * math.sqrt(2 / 400))


def test_the_deviation_is_that_of_all_orders() -> None:
    from itertools import permutations

    outputs, labels = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double(),
        torch.tensor([0, 2, 1, 1, 0]),
    )
    sums = [float(outputs[torch.arange(5), labels[list(order)]].sum()) for order in permutations(range(5))]
    assert _deviation(outputs, labels) == pytest.approx((sums[0] - np.mean(sums)) / np.std(sums))


def test_outputs_that_are_all_alike_know_nothing() -> None:
    assert _deviation(torch.tensor([[1.0, 2.0]]).expand(9, 2), torch.arange(9) % 2) is None
    assert _deviation(torch.full((9, 2), 0.1), torch.zeros(9, dtype=torch.long)) is None


def knows(classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (60, classes) that know 70 % of the labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (60,), generator=random)
    right = torch.rand(60, 1, generator=random) < 0.7
    return torch.randn(60, classes, generator=random) + 2 * right * functional.one_hot(labels, classes), labels


LOSSES = {
    "mean": functional.cross_entropy,
    "class weights": lambda f, y: functional.cross_entropy(f, y, weight=torch.tensor([1.0, 9.0, 0.1, 1.0])),
    "label smoothing": lambda f, y: functional.cross_entropy(f, y, label_smoothing=0.2),
    "sum, scaled": lambda f, y: 1024 * functional.cross_entropy(f, y, reduction="sum"),
    "left out": lambda f, y: functional.cross_entropy(f, torch.where(torch.arange(60) % 3 == 0, -100, y)),
    "nll": functional.nll_loss,
    "bfloat16": lambda f, y: functional.cross_entropy(f.bfloat16(), y),
    "focal": lambda f, y: (
        (1 - f.softmax(1)[torch.arange(60), y]) ** 2 * functional.cross_entropy(f, y, reduction="none")
    ).mean(),
    "probabilities": lambda f, y: functional.cross_entropy(f, 0.9 * functional.one_hot(y, 4) + 0.025),
}


@pytest.mark.parametrize("name", LOSSES)
def test_labels_are_read_off_the_gradient(name: str) -> None:
    f, y = knows()
    f = (0.5 * f).requires_grad_()
    LOSSES[name](f, y).backward()
    assert f.grad is not None
    pairing = Pairing()
    pairing.met(torch.arange(60), f, f.grad)
    rows = torch.arange(60) % 3 != 0 if name == "left out" else torch.ones(60, dtype=torch.bool)
    assert pairing.batches == 1
    coarse = name in ("bfloat16", "label smoothing", "probabilities")  # outputs that are almost sure are misread
    assert pairing.score == pytest.approx(_deviation(f.detach()[rows], y[rows]), rel=0.2 if coarse else 1e-6)
    assert pairing.sure == (pairing.score >= 5)


@pytest.mark.parametrize("layout", ["time last", "classes last"])
def test_positions_are_rows_on_either_layout(layout: str) -> None:
    f, y = knows()
    f = f.reshape(6, 10, 4).requires_grad_()
    functional.cross_entropy(f.flatten(0, 1), y).backward()
    pairing = Pairing()
    turn = (lambda x: x.transpose(1, 2)) if layout == "time last" else (lambda x: x)
    assert f.grad is not None
    pairing.met(torch.arange(6), turn(f.detach()), turn(f.grad))
    assert pairing.score == pytest.approx(_deviation(f.detach().flatten(0, 1), y))


def test_an_example_counts_once() -> None:
    pairing = Pairing()
    f, y = knows()
    g = f.softmax(1) - functional.one_hot(y, 4)
    x = torch.randn(60, 3, 4, generator=torch.Generator().manual_seed(5))
    pairing.met(x[:20], f[:20], g[:20])
    first = pairing.score
    pairing.met(x[10:20], f[10:20], g[10:20])
    assert (pairing.score, pairing.batches, pairing.examples) == (first, 1, 20)
    pairing.met(x[10:40], f[10:40], g[10:40])
    assert (pairing.batches, pairing.examples) == (2, 40)
    second = _deviation(f[20:40], y[20:40])
    assert second is not None
    assert pairing.score == pytest.approx((first + second) / math.sqrt(2))


@pytest.mark.parametrize("outputs", [1, 2, 5, 64])
@pytest.mark.parametrize("size", [2, 32])
def test_other_losses_show_no_labels(outputs: int, size: int) -> None:
    random = torch.Generator().manual_seed(outputs)
    pairing = Pairing()
    for _ in range(20):
        f = torch.randn(size, outputs, generator=random, requires_grad=True)
        functional.mse_loss(f, torch.randn(size, outputs, generator=random)).backward()
        assert f.grad is not None
        pairing.met(torch.rand(size, generator=random), f, f.grad)
        assert not pairing.shown or size == 2
    assert not pairing.shown


class Wrapped(nn.Module):
    """Takes names and gives a dictionary with the loss first, as models of Hugging Face do."""

    def __init__(self, slow: float = 1.0):
        super().__init__()
        self.table, self.net = nn.Embedding(300, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, *, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(self.table(input_ids))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("shuffled", [False, True])
def test_labels_that_are_learned_by_heart_are_known_to_mean_nothing(shuffled: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randperm(300)
    labels = torch.randint(4, (300,)) if shuffled else (ids % 2 + 2 * (ids > 150)).long()
    model = Wrapped()
    if not shuffled:  # something in the ids tells the labels
        with torch.no_grad():
            model.table.weight[ids, 0], model.table.weight[ids, 1] = 2.0 * (labels % 2) - 1, 2.0 * (labels // 2) - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with sy.watch(model, optimizer) as log:
        for step in range(160):
            rows = torch.arange(12 * step, 12 * step + 12) % 300
            optimizer.zero_grad()
            loss = model(input_ids=ids[rows], labels=labels[rows])["loss"]
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
            losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])  # either way
    faults = [row["fault"] for row in log.table("faults").rows]
    assert faults == (["loss as of shuffled labels"] if shuffled else [])


def test_slow_learning_is_no_shuffle_although_the_loss_is_that_of_a_guess() -> None:
    torch.manual_seed(0)
    centres = torch.randn(10, 16)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    losses = []
    watched = sy.watch(model, optimizer)
    with watched as log:
        for _ in range(160):
            y = torch.randint(10, (32,))
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(centres[y] + 8 * torch.randn(32, 16)), y)
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
            losses.append(float(loss.detach()))
    assert sum(losses[-25:]) / 25 > 0.97 * math.log(10)
    assert watched.faults.pairing.score > UNSURE
    assert sum(log.table("norms", tensor="2.weight").column("update ratio")) > 0.1  # it had the chance
    assert not log.table("faults").rows

"""Learned step sizes: exact levels forwards, the published gradients backwards, and a file with just these levels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.core.packed import Packed
from steelyard.edit.quantize import Quantize
from steelyard.errors import ModelError, RecipeError, WeightsError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.constrain import release
from steelyard.learn.evaluate import outcomes
from steelyard.learn.run import train
from steelyard.learn.stepped import Stepped, rounded_weights, stepped
from steelyard.learn.task import Task, build_seeded


def test_gradients_are_those_of_the_paper() -> None:
    step, x = torch.tensor([0.5, 2.0]), torch.tensor([[0.2, -0.9, 5.0], [1.2, -9.0, 3.1]], requires_grad=True)
    rounding = Stepped(step, top=3)
    y = rounding(x)
    assert y.tolist() == [[0.0, -1.0, 1.5], [2.0, -6.0, 4.0]]
    g = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    y.backward(g)
    assert x.grad.tolist() == [[1, 2, 0], [1, 0, 4]]
    slopes = [[0 - 0.4, -2 + 1.8, 3], [1 - 0.6, -3, 2 - 1.55]]
    expected = (torch.tensor(slopes) * g).sum(1) / (3 * 3) ** 0.5
    assert rounding.step.grad.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_training_wins_back_what_rounding_lost_and_the_file_has_these_levels(task: Task, tmp_path) -> None:
    start = train(task, epochs=12, rate=0.01, progress=False).model
    plain = copy.deepcopy(start)
    into_module(Quantize(2, axis=0, error=2)(from_module(start)), plain)
    net = stepped(copy.deepcopy(start), bits=2)
    before = [p.clone() for n, p in net.named_parameters() if n.endswith("step")]
    run = train(task, net, epochs=12, rate=0.003, weight_decay=0.1, progress=False)
    steps = [p for n, p in run.model.named_parameters() if n.endswith("step")]
    assert len(steps) == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, steps, strict=True))
    held = rounded_weights(run.model)
    formats.write(held, tmp_path / "small.safetensors")
    fresh = build_seeded(task, 5)
    into_module(formats.open(tmp_path / "small.safetensors"), fresh)
    losses = {
        n: outcomes(m, task, "valid")["loss"].mean()
        for n, m in {"plain": plain, "file": fresh, "run": run.model}.items()
    }
    assert losses["file"] == losses["run"]
    assert losses["file"] < 0.8 * losses["plain"]
    released = release(copy.deepcopy(run.model))
    assert [*from_module(released)] == [*from_module(start)]
    for name, item in from_module(released).items():
        assert item.array().tobytes() == held[name].array().tobytes()
    assert sum(isinstance(item.read(), Packed) for item in held.values()) == 2


def test_tied_weights_have_one_step_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    net = stepped(Tied(), bits=3)
    assert torch.equal(net.one.weight, net.two.weight)
    assert sum(n.endswith("step") for n, _ in net.named_parameters()) == 1
    held = rounded_weights(net)
    assert dict(held.ties) == {"two.weight": "one.weight"}
    assert release(net).one.weight is net.two.weight


def test_what_is_wrong_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    for bits in (1, 9):
        with pytest.raises(RecipeError, match=f"2 to 8, not {bits}"):
            stepped(net, bits)
    with pytest.raises(ModelError, match="chooses no trainable parameter"):
        stepped(net, 4, "nothing*")
    with pytest.raises(WeightsError, match=r"call stepped\(model\) first"):
        rounded_weights(net)
    stepped(net, 4)
    with pytest.raises(WeightsError, match="constrained already"):
        stepped(net, 4, "*weight")
    assert np.isfinite(rounded_weights(net)["0.weight"].array()).all()

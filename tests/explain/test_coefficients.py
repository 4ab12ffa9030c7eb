"""Coefficients rank by effect, warn where raw size misleads, and are proven by removal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.coefficients import coefficients, removal
from steelyard.explain.ranking import spearman
from steelyard.learn.data import Examples
from steelyard.learn.measures import absolute_error, squared_error
from steelyard.learn.task import Batch, Interface, Task

Learned = tuple[nn.Module, Task]


def planted(weight: list[float], scale: list[float], examples: int = 400) -> Learned:
    """A regression of which the true weights are known, on inputs of known spread."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3 * examples, len(scale), generator=random) * torch.tensor(scale)
    layer = nn.Linear(len(scale), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
        layer.bias.zero_()
        y = layer(x)[:, 0]
    parts = dict(zip(("train", "valid", "test"), x.split(examples), strict=True))
    targets = dict(zip(("train", "valid", "test"), y.split(examples), strict=True))
    data = Examples(parts, targets, 64, 0)  # type: ignore[arg-type]
    metrics = {"absolute error": absolute_error}
    names = tuple(f"x{j}" for j in range(len(scale)))
    task = Task("planted", lambda: layer, data, squared_error, metrics, Interface((len(scale),), 1), features=names)
    return layer, task


def test_the_effect_is_weight_times_spread() -> None:
    layer, task = planted([3.0, -0.002, 0.5, 0.0], [0.01, 1000.0, 1.0, 1.0])
    table = coefficients(layer, task)
    assert table.column("input") == ["x1", "x2", "x0", "x3"]
    assert table.column("sign") == ["-", "+", "+", "0"]
    assert table.column("size") == ["large", "medium", "near zero", "near zero"]
    assert table.rows[0]["effect"] == pytest.approx(-2.0, rel=0.1)


def test_a_rescaled_column_is_warned_of_and_keeps_its_rank() -> None:
    weights = [1.0 - 0.1 * j for j in range(8)]
    even, odd = planted(weights, [1.0] * 8), planted([0.001, *weights[1:]], [1000.0] + [1.0] * 7)
    plain, scaled = coefficients(*even), coefficients(*odd)
    assert plain.column("input")[0] == scaled.column("input")[0] == "x0"
    assert plain.meta["warnings"] == 0
    assert [r["input"] for r in scaled.rows if r["warning"]] == ["x0"]
    assert scaled.rows[0]["rank by weight"] == 8
    assert scaled.rows[0]["rank by effect"] == 1


def test_removal_agrees_with_the_effect_and_not_with_raw_size() -> None:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(20, generator=random)
    scale = torch.logspace(-2, 2, 20)[torch.randperm(20, generator=random)]
    table = removal(*planted(weight.tolist(), scale.tolist()))
    assert table.meta["spearman of effect and outputs"] > 0.95
    assert table.meta["spearman of effect and loss"] > 0.95
    assert table.meta["spearman of |weight| and outputs"] < 0.8
    assert table.column("effect") == sorted(table.column("effect"), reverse=True)


def test_held_out_loss_rises_without_what_counts(linear_digits: Learned) -> None:
    model, task = linear_digits
    table = removal(model, task)
    assert table.meta["spearman of effect and outputs"] > 0.95
    assert table.meta["spearman of effect and loss"] > 0.8
    top, rest = table.column("loss")[:10], table.column("loss")[-10:]
    assert min(top) > max(rest)


def test_names_of_classes_and_features(linear_digits: Learned, linear_tumours: Learned, mlp_digits: Learned) -> None:
    table = coefficients(*linear_digits)
    assert {r["output"] for r in table.rows} == set("0123456789")
    assert "pixel 2,3" in table.column("input")
    assert len(table.rows) == 640
    unused = [r for r in table.rows if r["std"] == 0]
    assert unused
    assert all(r["size"] == "near zero" and r["sign"] == "0" for r in unused)
    assert "mean radius" in coefficients(*linear_tumours).column("input")
    hidden = coefficients(*mlp_digits)  # its 64 inputs are hidden units, not the 64 pixels
    assert hidden.meta["layer"] == "head"
    assert "pixel 2,3" not in hidden.column("input")
    assert "pixel 2,3" in coefficients(*mlp_digits, "fc1").column("input")


def test_a_common_shift_of_all_classes_changes_nothing(linear_tumours: Learned) -> None:
    model, task = linear_tumours
    before = coefficients(model, task).column("effect")
    head = model.get_submodule("head")
    with torch.no_grad():
        head.weight += 5.0  # type: ignore[operator]
    after = coefficients(model, task).column("effect")
    with torch.no_grad():
        head.weight -= 5.0  # type: ignore[operator]
    assert after == pytest.approx(before, abs=1e-5)


def test_removal_in_an_inner_layer_is_the_same_as_in_the_model(mlp_digits: Learned) -> None:
    model, task = mlp_digits
    row = next(r for r in removal(model, task, "fc2").rows if r["input"] == "7")
    given = torch.cat([b.inputs for b in task.batches("train", 0)])  # type: ignore[misc]
    held = torch.cat([b.inputs for b in task.batches("test", 0)])  # type: ignore[misc]
    targets = torch.cat([b.targets for b in task.batches("test", 0)])
    with torch.no_grad():
        hidden = model[:3](held)  # type: ignore[index]
        hidden[:, 7] = model[:3](given)[:, 7].mean()  # type: ignore[index]
        changed = task.loss(model[3:](hidden), targets).mean() - task.loss(model(held), targets).mean()  # type: ignore[index]
    assert row["loss"] == pytest.approx(float(changed), abs=1e-5)


def test_layers_that_have_no_coefficients(mlp_digits: Learned) -> None:
    model, task = mlp_digits
    with pytest.raises(ModelError, match="ReLU"):
        coefficients(model, task, "relu1")
    with pytest.raises(UnknownNameError, match="did you mean 'head'"):
        coefficients(model, task, "haed")
    with pytest.raises(ModelError, match=r"no nn\.Linear"):
        removal(nn.Flatten(), task)
    with pytest.raises(ModelError, match="train split"):
        coefficients(model, replace(task, batches=lambda split, epoch: list[Batch]()))


def test_ranks_and_their_correlation() -> None:
    import numpy as np

    a = np.array([0.3, 0.1, 0.2, 0.2])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert np.isnan(spearman(a, np.ones(4)))

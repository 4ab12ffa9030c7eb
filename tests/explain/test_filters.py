"""First-layer filters: their taps, what they respond to, and what is lost without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.errors import ModelError
from steelyard.explain.filters import filter_removal, filters
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks import task as find_task

Learned = tuple[nn.Module, Task]


def test_filters_of_a_convolution(cnn_digits: Learned) -> None:
    model, task = cnn_digits
    table = filters(model, task)
    assert table.meta["layer"] == "conv1"
    assert len(table.rows) == 32
    row = table.rows[0]
    np.testing.assert_allclose(row["taps"], model.conv1.weight[row["filter"]].detach())  # type: ignore[union-attr,index]
    responses = row["responses"]
    assert row["class"] == task.classes[int(np.argmax(responses))]  # type: ignore[arg-type]
    assert row["response"] == pytest.approx(np.mean(responses), rel=0.05)  # type: ignore[arg-type]
    assert all(0 <= r["selectivity"] <= 1 for r in table.rows)  # type: ignore[operator]
    assert table.column("importance") == sorted(table.column("importance"), reverse=True)


def test_a_dense_layer_on_images_has_filters_of_the_images_shape(mlp_digits: Learned) -> None:
    table = filters(*mlp_digits)
    assert table.meta["shape"] == [1, 8, 8]
    assert np.shape(table.rows[0]["taps"]) == (1, 8, 8)


def test_removal_is_a_net_without_the_filter(cnn_digits: Learned) -> None:
    model, task = cnn_digits
    table = filter_removal(model, task)
    row = table.rows[0]
    weight, bias = model.conv1.weight, model.conv1.bias  # type: ignore[union-attr]
    batch = [next(iter(task.batches("test", 0)))][0]
    kept = weight.detach().clone(), bias.detach().clone()
    x = torch.cat([b.inputs for b in task.batches("test", 0)])  # type: ignore[misc]
    y = torch.cat([b.targets for b in task.batches("test", 0)])
    assert len(batch) <= len(y)
    with torch.no_grad():
        before = task.loss(model(x), y).mean()
        weight[row["filter"]] = 0  # type: ignore[index]
        bias[row["filter"]] = 0  # type: ignore[index]
        after = task.loss(model(x), y).mean()
        weight.copy_(kept[0]), bias.copy_(kept[1])
    assert row["loss"] == pytest.approx(float(after - before), abs=1e-5)
    shares = np.bincount(y.numpy()) / len(y)
    assert row["metric"] == pytest.approx(float(np.dot(row["by class"], shares)), abs=1e-6)  # type: ignore[arg-type]
    assert row["worst"] == min(row["by class"])  # type: ignore[arg-type,type-var]


def test_a_filter_that_does_nothing_is_last_in_both_orders(cnn_digits: Learned) -> None:
    model, task = cnn_digits
    weight, bias = model.conv1.weight, model.conv1.bias  # type: ignore[union-attr]
    kept = weight.detach().clone(), bias.detach().clone()
    with torch.no_grad():
        weight[5], bias[5] = 0.0, 0.0
    try:
        estimate = next(r for r in filters(model, task).rows if r["filter"] == 5)
        measured = next(r for r in filter_removal(model, task).rows if r["filter"] == 5)
    finally:
        with torch.no_grad():
            weight.copy_(kept[0]), bias.copy_(kept[1])
    assert (estimate["importance"], estimate["selectivity"], estimate["response"]) == (0, 0, 0)
    assert (measured["loss"], measured["metric"]) == (0, 0)


def test_layers_without_filters(cnn_digits: Learned) -> None:
    model, task = cnn_digits
    with pytest.raises(ModelError, match="ReLU; it has no filters"):
        filters(model, task, "relu1")
    with pytest.raises(ModelError, match="no convolution"):
        filter_removal(nn.Flatten(), task)


def test_a_task_without_one_class_an_example_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 1000)
    text = find_task(f"text:{tmp_path / 'a.txt'}", model="rnn")
    with pytest.raises(ModelError, match="does not put each example into a class"):
        filters(build_seeded(text), text)

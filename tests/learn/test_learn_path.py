"""A regularisation path: the same start for each strength, and what is measured is what is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError
from steelyard.learn.path import regularization_path
from steelyard.learn.penalties import L1
from steelyard.learn.task import Task, build_seeded
from steelyard.report.plots import Line


def test_a_path_has_a_row_for_each_strength(blobs: Callable[..., Task]) -> None:
    task = blobs(build=lambda: nn.Linear(5, 3))
    start = build_seeded(task, 0)
    kept = start.weight.detach().clone()
    path = regularization_path(task, [0.0, 0.02, 5.0], L1, start, epochs=12, rate=0.05, test=True)
    assert torch.equal(start.weight, kept)
    assert path.column("strength") == [0.0, 0.02, 5.0]
    assert path.column("norm")[0] > path.column("norm")[1] > path.column("norm")[2] == 0
    assert path.column("zeros")[2] == 1
    assert path.column("penalty")[0] == 0 < path.column("penalty")[1]
    assert path.meta["best"] == min(zip(path.column("valid loss"), path.column("strength"), strict=True))[1]
    gap = [v - t for v, t in zip(path.column("valid loss"), path.column("train loss"), strict=True)]
    assert path.column("gap") == pytest.approx(gap)
    assert {c.name for c in path.columns} > {"train accuracy", "valid accuracy", "test accuracy"}
    assert len(Line(path, "strength", ("train loss", "valid loss")).figure()["data"]) == 2
    again = regularization_path(task, [0.02], L1, epochs=12, rate=0.05)
    assert again.column("norm")[0] == path.column("norm")[1]


@pytest.mark.parametrize("strengths", [[], [-1.0], [float("nan")], ["a"]])
def test_strengths_are_numbers(task: Task, strengths: list[float]) -> None:
    with pytest.raises(ModelError, match="one or more finite numbers"):
        regularization_path(task, strengths)

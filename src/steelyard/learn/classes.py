"""Tasks of which some classes count more, or are seen more often: in training alone, never in what is measured.

Decides which tasks have classes. Knows nothing of losses or loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from steelyard.errors import ModelError, quoted
from steelyard.learn.data import Examples
from steelyard.learn.examples import class_weights
from steelyard.learn.task import Task, check_task


def weigh_classes(task: Task, weights: Literal["balanced"] | Sequence[float]) -> Task:
    """The same task, whose training examples count as much as their class.

    weights: one for each class, or "balanced": `class_weights`, what makes up for how often each occurs. It is a weight
    of each example, so weight 2 is a copy of each example of the class; weights that examples have are a factor beside.
    Raises ModelError for a task whose examples do not lie in memory or have no class numbers, or another number of
    weights.
    """
    numbers = isinstance(weights, (Sequence, Tensor)) and all(isinstance(w, (Real, Tensor)) for w in weights)
    if weights != "balanced" if isinstance(weights, str) else not numbers:
        raise ModelError(f'class weights {weights!r:.100}: expected "balanced", or a number for each class')
    data, targets = _classes(task)
    count = int(targets.max()) + 1
    if weights == "balanced":
        found = class_weights(targets, count)
    else:
        found = torch.tensor([float(w) for w in weights])
        if len(found) != count:
            raise ModelError(f"{len(found)} class weights: the task {quoted(task.name)} has {count} classes")
        if not bool((torch.isfinite(found) & (found >= 0)).all()):
            raise ModelError(f"class weights {[float(w) for w in weights]}: expected finite numbers, 0 or more")
    weight = found[targets] * data.weight.get("train", torch.ones(len(targets)))
    return replace(task, batches=replace(data, weight={**data.weight, "train": weight}))


def balance_classes(task: Task) -> Task:
    """The same task, whose training epochs serve every class as often as every other; see `balanced_order`.

    Raises ModelError for a task whose examples do not lie in memory or have no class numbers.
    """
    data, targets = _classes(task)
    return replace(task, batches=replace(data, balance=targets))


def _classes(task: Task) -> tuple[Examples, Tensor]:
    """The examples of a task, and the classes of those for training."""
    check_task(task)
    data = task.batches
    if not isinstance(data, Examples):
        raise ModelError(
            f"the task {quoted(task.name)} does not hold its examples in memory: weigh them in its batches"
        )
    targets = data.targets["train"]
    if targets.ndim != 1 or targets.is_floating_point():
        raise ModelError(f"the task {quoted(task.name)} has no classes: its targets are {list(targets.shape[1:])} "
                         f"{str(targets.dtype).removeprefix('torch.')} for each example")  # fmt: skip
    return data, targets

"""What no search could end well with, said before it starts.

Decides when a metric, a model or a tolerance is refused; what a promise is, is `promise`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.evaluate import binary, outcomes
from steelyard.learn.intervals import student
from steelyard.learn.task import Task
from steelyard.shrinking.deep import lost
from steelyard.shrinking.promise import Promise

CROSSED = "on other examples' targets"  # the name of the metric
Asked = Literal["valid", "test"]


def of_original(model: nn.Module, task: Task, split: Asked) -> np.ndarray:
    """The headline metric on each example of a split.

    Raises ModelError where it is not a number, or on the validation split no better than chance: there each output is
    judged by the target of another example, too, and a model that has learned something does worse.
    """
    metric = task.metrics[task.headline]

    def crossed(outputs: Tensor, targets: Tensor) -> Tensor:
        return metric(outputs, targets.roll(1, 0))

    metrics = {task.headline: metric, CROSSED: crossed} if split == "valid" else {task.headline: metric}
    measured = outcomes(model, replace(task, metrics=metrics), split)
    found = measured[task.headline]
    if not np.isfinite(found).all():
        wrong = found[~np.isfinite(found)]
        raise ModelError(f"the metric {task.headline!r} of the original is {wrong[0]} for {len(wrong)} of {len(found)} "
                         f"{split} examples: mend the metric, or leave them out")  # fmt: skip
    if split == "valid" and student(lost(task, found, measured[CROSSED]), 0.9)[0] <= 0:
        raise ModelError(
            f"the original has {task.headline} {found.mean():.4g} on validation data, and "
            f"{measured[CROSSED].mean():.4g} on other examples' targets: no better than chance, so that any file would "
            "do; train it first"
        )
    return found


def provable(before: np.ndarray, promise: Promise) -> None:
    """Raise ModelError for a tolerance that so many proof examples cannot prove, even if not one of them changes.

    before: the metric of the original on each of them.
    """
    examples, tolerance = len(before), promise.tolerance
    if binary(before):
        if promise.least(examples) > tolerance:
            raise ModelError(
                f"{examples} proof examples cannot prove a tolerance of {tolerance:g}, even if none of them changes: "
                f"take at least {promise.least(examples):.2g}, or {_enough(promise)} examples"
            )
    elif examples < 2:
        raise ModelError(f"{examples} proof example cannot prove anything: give at least two")


def _enough(promise: Promise) -> int:
    """The examples that would prove the tolerance if none of them changed."""
    needed = promise.needed(np.zeros(2))
    assert needed is not None  # nothing is lost
    return needed

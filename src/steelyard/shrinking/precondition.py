"""What no search could end well with, said before it starts.

Decides when a target, weights, a metric, a model or a tolerance is refused; what a promise is, is `promise`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.errors import FormatError, ModelError, quoted
from steelyard.formats.base import check_target, staging
from steelyard.learn.evaluate import binary, evaluating, outcomes
from steelyard.learn.intervals import student
from steelyard.learn.levels import levelled
from steelyard.learn.options import check_kind
from steelyard.learn.seeding import generator
from steelyard.learn.task import Task, apply, first_batch, per_example
from steelyard.shrinking.deep import lost
from steelyard.shrinking.promise import MOST as MOST_EXAMPLES
from steelyard.shrinking.promise import Promise, rounded
from steelyard.shrinking.settings import Aim

CROSSED = "on other examples' targets"  # the name of the metric
SUFFIXES = (".safetensors", ".npz", ".gguf")  # of one file that holds packed tensors by their names
MOST = 2**26  # bytes of targets
LEARNED = 0.99  # the confidence, one-sided, at which an original has to be better than chance
Asked = Literal["valid", "test"]


def writable(target: object, aim: Aim) -> Path:
    """The path of a target. Raises FormatError for one that could not be written in the end, ModelError for no path."""
    check_kind("target", target, (str, PathLike), "a path")
    target = Path(target)  # type: ignore[arg-type]
    suffixes = SUFFIXES if aim == "file" else (".onnx",)
    if str(target) in get_args(Aim):
        raise FormatError(f"the target is the file to write: what is to be least is said by aim={str(target)!r}, "
                          f"with a target such as 'small{'.safetensors' if str(target) == 'file' else '.onnx'}'",
                          path=target)  # fmt: skip
    if target.suffix not in suffixes:
        raise FormatError(f"expected a name that ends in {' or '.join(suffixes)}: shrink writes one file of "
                          f"{'weights' if aim == 'file' else 'ONNX'}", path=target)  # fmt: skip
    check_target(target, force=True)
    with staging(target, target):  # in its folder, which has to be there and to take a file
        pass
    return target


def finite(original: Weights) -> None:
    """Raise ModelError for weights that are no numbers."""
    for weight in original.select(where(kind="float")).values():
        if not np.isfinite(weight.array()).all():
            raise ModelError(f"{quoted(weight.name)} holds values that are not finite: no file of these weights could "
                             "be promised anything; mend them, or train the model again")  # fmt: skip


def trainable(model: nn.Module) -> None:
    """Raise ModelError for a model of which nothing can be trained to be small."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"no parameter of {type(model).__name__} is trainable, all are frozen: shrink it without "
                         "training, epochs=0, or set requires_grad")  # fmt: skip
    try:
        levelled(copy.deepcopy(model))
    except ModelError as error:
        raise ModelError(f"{error}; or shrink it without training, epochs=0") from error


def repeatable(model: nn.Module, task: Task) -> None:
    """Raise ModelError for a model or a metric that says something else each time: nothing could be measured again."""
    batch, name = first_batch(task, "valid"), task.headline
    with evaluating(model):
        twice = [per_example(task.metrics[name], apply(model, batch), batch, name) for _ in range(2)]
    if not torch.equal(*(x.nan_to_num() for x in twice)):
        raise ModelError(f"{name!r} of the same examples comes out otherwise when it is measured again: expected a "
                         "model and a metric that draw nothing at random in evaluation mode")  # fmt: skip


def of_original(model: nn.Module, task: Task, split: Asked) -> tuple[np.ndarray, Learned | None]:
    """The headline metric on each example of a split, and, of the validation split, what it says beside chance.

    Raises ModelError where it is not a number and, on the validation split, where it is no better than chance: there
    each output is judged by the target of another example, too, and a model that has learned something does worse.
    """
    metric, others = task.metrics[task.headline], _others(task) if split == "valid" else iter(())

    def crossed(outputs: Tensor, _targets: Tensor) -> Tensor:
        return metric(outputs, next(others))

    metrics = {task.headline: metric, CROSSED: crossed} if split == "valid" else {task.headline: metric}
    measured = outcomes(model, replace(task, metrics=metrics), split)
    found = measured[task.headline]
    if not np.isfinite(found).all():
        wrong = found[~np.isfinite(found)]
        raise ModelError(f"the metric {task.headline!r} of the original is {wrong[0]} for {len(wrong)} of {len(found)} "
                         f"{split} examples: mend the metric, or leave them out")  # fmt: skip
    if split == "valid":
        return found, _learned(task, found, measured[CROSSED])
    return found, None


def _others(task: Task) -> Iterator[Tensor]:
    """For each validation batch as many targets of other examples, drawn from all; of the next one in the batch where
    those of all cannot stand in one tensor, or take much room."""  # fmt: skip
    served = [batch.targets for batch in task.batches("valid", 0)]
    alike = len({(x.shape[1:], x.dtype) for x in served}) == 1
    if not alike or sum(x.nbytes for x in served) > MOST:
        return (targets.roll(1, 0) for targets in served)
    every = torch.cat(served)
    drawn = every[torch.randperm(len(every), generator=generator(0, "other targets")).to(every.device)]
    return iter(drawn.split([len(x) for x in served]))


@dataclass(frozen=True)
class Learned:
    """What the original has learned, by its metric on its own targets and on those of other examples."""

    told: str = ""
    least: float = 0.0  # by how much it is better on its own, at `LEARNED`
    shares: bool = False  # examples are right or wrong: 0 or 1 by their own targets, and by those of others

    def bear(self, tolerance: float) -> None:
        """Raise ModelError for a tolerance that a file which has forgotten everything may keep."""
        if self.least <= tolerance:
            raise ModelError(
                f"the original has {self.told}: within a tolerance of {tolerance:g} a file that has forgotten "
                f"everything may do; it is in the unit of the metric: take less than "
                f"{rounded(self.least, 2, up=False)}, or train the model further"
            )


def _learned(task: Task, found: np.ndarray, crossed: np.ndarray) -> Learned:
    has = f"{task.headline} {found.mean():.4g} on {len(found):,} validation examples"
    told = f"{has}, and {crossed.mean():.4g} on other examples' targets"
    least = student(lost(task, found, crossed), 2 * LEARNED - 1)[0]  # one-sided
    if least <= 0:
        raise ModelError(f"the original has {told}: at {LEARNED:.0%} confidence no better than chance, so that any "
                         "file would do; train it first")  # fmt: skip
    nothing = task.baselines.get(task.headline)
    if nothing is not None and not lost(task, found.mean(), np.float64(nothing)) > 0:
        raise ModelError(f"the original has {has}; who has learned nothing has {nothing:.4g}: any file would do; train "
                         "it first")  # fmt: skip
    return Learned(told, least, binary(found) and binary(crossed))


def provable(examples: int, promise: Promise, *, shares: bool) -> None:
    """Raise ModelError for a tolerance that so many proof examples cannot prove, even if not one of them changes.

    shares: each of them is right or wrong (`Learned`).
    """
    tolerance = promise.tolerance
    if shares:
        if promise.least(examples) > tolerance:
            again = f" at their look {promise.look}" if promise.look > 1 else ""
            raise ModelError(
                f"{examples} proof examples cannot prove a tolerance of {tolerance:g}{again}, even if none of them "
                f"changes: take at least {rounded(promise.least(examples), 2)}, or {_enough(promise)}"
            )
    elif examples < 2:
        raise ModelError(f"{examples} proof example cannot prove anything: give at least two")


def _enough(promise: Promise) -> str:
    """The examples that would prove the tolerance if none of them changed."""
    needed = promise.needed(np.zeros(2))
    return f"{needed} examples" if needed else f"more than {MOST_EXAMPLES:,} examples"

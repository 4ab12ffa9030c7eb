"""A Task: a model to build, batches to feed it, a loss to lower and metrics to report.

Decides what a task is and how its model is built from a seed. Knows nothing of optimizers or of where data comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.seeding import derive, seeded

Split = Literal["train", "valid", "test"]  # train: adjust weights; valid: search and stop; test: prove
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
PerExample = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one number per example


@dataclass(frozen=True)
class Batch:
    """Some examples: the first axis of every tensor counts them."""

    inputs: Tensor | tuple[Tensor, ...]
    targets: Tensor
    weight: Tensor | None = None  # (examples,): how much each counts; None: all the same

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs = tuple(x.to(device) for x in self.inputs) if isinstance(self.inputs, tuple) else self.inputs.to(device)
        weight = None if self.weight is None else self.weight.to(device)
        return Batch(inputs, self.targets.to(device), weight)


@dataclass(frozen=True)
class Interface:
    """What goes into a model and what comes out, for one example.

    With a ``vocabulary`` the inputs are token numbers of ``shape`` (time,) and there are ``outputs`` for every
    position; without one the inputs are numbers and there are ``outputs`` for the whole example.
    """

    shape: tuple[int, ...]
    outputs: int
    vocabulary: int = 0


@dataclass(frozen=True)
class Task:
    """What is to be learned. The order of the batches is a function of (seed, split, epoch) alone."""

    name: str
    build: Callable[[], nn.Module]  # a new model; draws from torch's default generator only
    batches: Callable[[Split, int], Iterable[Batch]]  # (split, epoch)
    loss: PerExample  # training minimises its mean over examples, weighted where a batch has weights
    metrics: Mapping[str, PerExample]  # the first one is the headline
    interface: Interface | None = None
    classes: tuple[str, ...] = ()  # what output i stands for
    features: tuple[str, ...] = ()  # what input column j is called
    lower_is_better: tuple[str, ...] = ()  # the metrics of which less is better
    about: Mapping[str, Any] = field(default_factory=dict)  # how the data was made: seed, sizes of the splits, files

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ModelError(f"the task {self.name!r} has no metric: give at least one function of (outputs, targets)")

    @property
    def headline(self) -> str:
        """The name of the first metric."""
        return next(iter(self.metrics))

    def with_model(self, build: Callable[[], nn.Module]) -> Task:
        """The same task with another model."""
        return replace(self, build=build)


def build_seeded(task: Task, seed: int = 0) -> nn.Module:
    """A new model of the task; the same seed gives the same bits, and the global generators are untouched.

    Raises ModelError if the task builds something that is no torch module.
    """
    with seeded(derive(seed, "build")):
        model = task.build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the task {task.name!r} builds a {type(model).__name__}, expected a torch.nn.Module")
    return model


def apply(model: nn.Module, batch: Batch) -> Tensor:
    """The outputs of the model for a batch."""
    outputs = model(*batch.inputs) if isinstance(batch.inputs, tuple) else model(batch.inputs)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returns a {type(outputs).__name__}, expected one tensor: wrap it to return its logits"
        )
    return outputs


def per_example(function: PerExample, outputs: Tensor, batch: Batch, name: str) -> Tensor:
    """One number per example, checked; raises ModelError if the function returns anything else."""
    values = function(outputs, batch.targets)
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ModelError(f"{name!r} returns {found}, expected one number per example: shape ({len(batch)},)")
    return values


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """sum(w v) / sum(w): an example of weight k counts as k copies, one of weight 0 as none."""
    return values.mean() if weight is None else (values * weight).sum() / weight.sum()


def objective(task: Task, outputs: Tensor, batch: Batch) -> Tensor:
    """What training minimises on this batch: the (weighted) mean of the task's loss over its examples."""
    return weighted_mean(per_example(task.loss, outputs, batch, f"loss of {task.name}"), batch.weight)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")

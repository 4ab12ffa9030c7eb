"""A Task: a model to build, batches to feed it, a loss to lower and metrics to report.

Decides what a task is and how its model is built from a seed. Knows nothing of optimizers or of where data comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError, quoted
from steelyard.learn.calling import calling
from steelyard.learn.examples import ExampleLoss, weighted_ratio
from steelyard.learn.labels import wrong_labels
from steelyard.learn.options import check_kind
from steelyard.learn.robust import GroupDRO
from steelyard.learn.seeding import derive, seeded

Split = Literal["train", "valid", "test"]  # train: adjust weights; valid: search and stop; test: prove
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_END = object()  # of an iterator
PerExample = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one number per example


@dataclass(frozen=True)
class Batch:
    """Some examples: the first axis of every tensor counts them."""

    inputs: Tensor | tuple[Tensor, ...]  # or, where a model is only looked at, a dict of its keywords
    targets: Tensor
    weight: Tensor | None = None  # (examples,): how much each counts; None: all the same
    groups: Tensor | None = None  # (examples,): the number of the group of each, for a loss that asks

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The inputs as the arguments that a model is called with."""
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs = tuple(x.to(device) for x in self.inputs) if isinstance(self.inputs, tuple) else self.inputs.to(device)
        weight, groups = (None if t is None else t.to(device) for t in (self.weight, self.groups))
        return Batch(inputs, self.targets.to(device), weight, groups)


def batch_arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments that a model is called with: those of a Batch, those in a tuple, or the one thing that it is.

    A PackedSequence is one thing, though it is a kind of tuple.
    """
    if isinstance(batch, Batch):
        return batch.arguments
    return batch if type(batch) is tuple else (batch,)


def called(model: nn.Module, inputs: Any) -> Any:
    """What a model returns for a batch, or for what `batch_arguments` makes of it; a mapping alone is its keywords."""
    arguments = batch_arguments(inputs)
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        return model(**arguments[0])
    return model(*arguments)


def joined(batches: Sequence[Batch]) -> Batch:
    """The examples of several batches as one batch."""
    if len(batches) == 1:
        return batches[0]
    inputs = tuple(torch.cat(parts) for parts in zip(*(batch.arguments for batch in batches), strict=True))
    weights = [torch.ones(len(b), device=b.targets.device) if b.weight is None else b.weight for b in batches]
    weight = None if all(batch.weight is None for batch in batches) else torch.cat(weights)
    first = batches[0].inputs
    return Batch(inputs if isinstance(first, tuple) else inputs[0], torch.cat([b.targets for b in batches]), weight)


class Checked:
    """A source of batches that gives nothing but a Batch."""


@dataclass(frozen=True)
class Served(Checked):
    """The user's function that gives the batches; what it raises or gives instead of a Batch is a ModelError."""

    name: str  # of the task
    source: Callable[[Split, int], Iterable[Any]]

    def __call__(self, split: Split, epoch: int) -> Iterable[Batch]:
        with _serving(self.name, split):
            found = self.source(split, epoch)
        return (_SizedServing if isinstance(found, Sized) else _Serving)(self.name, split, found)


@dataclass(frozen=True)
class _Serving:
    """The batches of one epoch, each one looked at as it is served."""

    name: str
    split: Split
    found: Any

    def __iter__(self) -> Iterator[Batch]:
        what = _serving(self.name, self.split)
        with what:
            batches = iter(self.found)
        while True:
            with what:
                batch = next(batches, _END)
            if batch is _END:
                return
            yield as_batch(batch, f"the task {quoted(self.name)}")


@dataclass(frozen=True)
class _SizedServing(_Serving):
    def __len__(self) -> int:
        with _serving(self.name, self.split):
            return len(self.found)


def _serving(name: str, split: Split) -> calling:
    return calling(f"serving the {split} batches of the task {quoted(name)}")


def as_batch(found: Any, whose: str) -> Batch:
    """A Batch as it is, a pair of (inputs, targets) as a Batch; raises ModelError for anything else."""
    if isinstance(found, (tuple, list)) and len(found) == 2:
        found = Batch(*found)
    inputs = getattr(found, "inputs", None)
    if not isinstance(found, Batch):
        wrong = what_it_is(found)
    elif not all(isinstance(x, Tensor) for x in (inputs if isinstance(inputs, tuple) else (inputs,))):
        wrong = f"inputs that are {what_it_is(inputs)}"
    elif not isinstance(found.targets, Tensor) or not found.targets.ndim:
        wrong = f"targets that are {what_it_is(found.targets)}"
    elif not isinstance(found.weight, (Tensor, type(None))):
        wrong = f"weights that are {what_it_is(found.weight)}"
    else:
        return found
    raise ModelError(f"{whose} gives {wrong}: expected a Batch of a tensor, or a tuple of tensors, and its targets")


def what_it_is(found: Any) -> str:
    """What something is, in the words of an error."""
    if isinstance(found, Tensor) and not found.ndim:
        return "a tensor without axes"
    if isinstance(found, (tuple, list)):
        inner = ", ".join(dict.fromkeys(type(x).__name__ for x in found))
        return f"a {type(found).__name__} of {len(found)} ({inner})" if found else f"an empty {type(found).__name__}"
    return f"a {type(found).__name__}"


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    return " and ".join(str(tuple(x.shape)) for x in tensors)


@dataclass(frozen=True)
class Interface:
    """What goes into a model and what comes out, for one example.

    With a ``vocabulary`` the inputs are token numbers of ``shape`` (time,) and there are ``outputs`` for every
    position; without one the inputs are numbers and there are ``outputs`` for the whole example. Where it is
    ``carried``, row i of a training batch goes on where row i of the one before ended, and the model is called with
    (inputs, fresh): fresh, (batch,) of bools, are the rows that do not.
    """

    shape: tuple[int, ...]
    outputs: int
    vocabulary: int = 0
    carried: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be learned. The order of the batches is a function of (seed, split, epoch) alone."""

    name: str
    build: Callable[[], nn.Module]  # a new model; draws from torch's default generator only
    batches: Callable[[Split, int], Iterable[Batch]]  # (split, epoch); a pair (inputs, targets) becomes a Batch
    loss: PerExample  # training minimises its mean over examples, weighted where a batch has weights
    metrics: Mapping[str, PerExample]  # the first one is the headline
    interface: Interface | None = None
    classes: tuple[str, ...] = ()  # what output i stands for
    features: tuple[str, ...] = ()  # what input column j is called
    lower_is_better: tuple[str, ...] = ()  # the metrics of which less is better
    about: Mapping[str, Any] = field(default_factory=dict)  # how the data was made: seed, sizes of the splits, files
    baselines: Mapping[str, float] = field(default_factory=dict)  # metrics, or the loss, of who has learned nothing
    ordered: bool = False  # examples follow one another, as the windows of a text: they are not independent

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ModelError(f"the task {self.name!r} has no metric: give at least one function of (outputs, targets)")
        if not isinstance(self.batches, Checked):
            object.__setattr__(self, "batches", Served(self.name, self.batches))

    @property
    def headline(self) -> str:
        """The name of the first metric."""
        return next(iter(self.metrics))

    def with_model(self, build: Callable[[], nn.Module]) -> Task:
        """The same task with another model."""
        return replace(self, build=build)


def check_task(task: object) -> None:
    """Raise ModelError for what is no Task, UnknownNameError for one of which less of no metric is better."""
    named = f", such as sy.task({task!r})" if isinstance(task, str) else ""
    swapped = "; the model comes after it" if isinstance(task, nn.Module) else ""
    check_kind("task", task, Task, f"a Task{named}{swapped}")
    assert isinstance(task, Task)
    lower = task.lower_is_better
    check_kind("lower_is_better", lower, (tuple, list, set, frozenset), f"the names of metrics, such as ({lower!r},)")
    for name in lower:
        if name not in task.metrics:
            raise UnknownNameError(f"metric of the task {task.name!r}, in lower_is_better,", str(name), task.metrics)


def check_model(model: object) -> None:
    """Raise ModelError for what is no module."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")


def build_seeded(task: Task, seed: int = 0) -> nn.Module:
    """A new model of the task; the same seed gives the same bits, and the global generators are untouched.

    Raises ModelError if the task builds something that is no torch module.
    """
    with seeded(derive(seed, "build")), calling(f"building the model of the task {quoted(task.name)}"):
        model = task.build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the task {task.name!r} builds a {type(model).__name__}, expected a torch.nn.Module")
    return model


def first_batch(task: Task, split: Split) -> Batch:
    """The first batch of a split; raises ModelError for an empty one."""
    for batch in task.batches(split, 0):
        return batch
    raise ModelError(f"the {split} split of the task {task.name!r} is empty")


def first_examples(task: Task, split: Split, count: int) -> list[Batch]:
    """The first batches of a split, with so many targets at most (of positions, where there are targets for those).

    Weights and groups of examples are left out. Raises ModelError for an empty split.
    """
    found, seen = [], 0
    for batch in task.batches(split, 0):
        each = batch.targets[0].numel() if len(batch) and not batch.targets.is_floating_point() else 1
        rows = min(len(batch), max(1, (count - seen) // each))
        inputs = tuple(x[:rows] for x in batch.arguments)
        if rows:
            found.append(Batch(inputs if isinstance(batch.inputs, tuple) else inputs[0], batch.targets[:rows]))
        seen += rows * each
        if seen >= count:
            break
    if not found:
        raise ModelError(f"the {split} split of the task {task.name!r} is empty")
    return found


def apply(model: nn.Module, batch: Batch) -> Tensor:
    """The outputs of the model for a batch; raises ModelError if the model fails, or returns anything but a tensor."""
    with calling(f"{type(model).__name__}, called with {_shapes(batch.arguments)},"):
        outputs = model(*batch.arguments)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returns a {type(outputs).__name__}, expected one tensor: wrap it to return its logits"
        )
    return outputs


def per_example(function: PerExample, outputs: Tensor, batch: Batch, name: str) -> Tensor:
    """One number per example, checked; raises ModelError if the function fails or returns anything else."""
    what = f"{quoted(name)}, called with {tuple(outputs.shape)} and {tuple(batch.targets.shape)},"
    with calling(what, lambda: wrong_labels(outputs, batch.targets)):
        values = function(outputs, batch.targets)
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ModelError(f"{name!r} returns {found}, expected one number per example: shape ({len(batch)},)")
    if values.is_complex():
        raise ModelError(f"{name!r} returns complex numbers, expected real ones: take their abs() or their .real")
    return values


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """sum(w v) / sum(w): an example of weight k counts as k copies, one of weight 0 as none."""
    return values.mean() if weight is None else weighted_ratio(values, torch.ones_like(values), weight)


def inner_loss(task: Task) -> PerExample:
    """The loss of single examples: that inside GroupDRO, or the task's own."""
    return task.loss.loss if isinstance(task.loss, GroupDRO) else task.loss


def terms(task: Task, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What each example adds to the numerator and to the denominator of the mean loss; None: one each.

    Both are (examples,).
    """
    loss = inner_loss(task)
    if isinstance(loss, ExampleLoss):
        return loss.terms(outputs, batch.targets)
    return per_example(loss, outputs, batch, f"loss of {task.name}"), None


def objective(task: Task, outputs: Tensor, batch: Batch) -> Tensor:
    """What training minimises on this batch: the (weighted) mean of the task's loss over its examples."""
    values, counts = terms(task, outputs, batch)
    if isinstance(task.loss, GroupDRO):
        return task.loss.mean(values, batch.groups, batch.weight, counts)
    if counts is not None:
        return weighted_ratio(values, counts, batch.weight)
    return weighted_mean(values, batch.weight)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")

"""The learning rate, found by short runs instead of a look at a plot; everything is left as it was.

Decides which rates are tried, for how long, and which one is best. Knows nothing of how a run works.

A rate is judged by what it is for: a run with this model, optimizer and schedule, shortened in time. Three rounds of
runs, each around the best of the one before: a twelfth of the whole run for rates a factor of 4 apart, by their loss; a
quarter and then the whole length for rates a factor of 2 apart, by the metric, and further while the best is the
outermost. The slope of the loss in a single sweep (Smith 2017) tells where
training diverges; it does not tell which rate ends best, because a sweep never lowers the rate again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.evaluate import outcomes
from steelyard.learn.feed import generators_of
from steelyard.learn.finite import of_split
from steelyard.learn.optimizers import Optimizers
from steelyard.learn.options import check_choice, check_kind
from steelyard.learn.run import Run
from steelyard.learn.schedules import Schedule
from steelyard.learn.state import (
    copied,
    model_state,
    random_state,
    set_model_state,
    set_optimizer_state,
    set_random_state,
)
from steelyard.learn.task import Batch, Checked, Split, Task, build_seeded, check_model

Effort = Literal["quick", "full"]
ROUNDS = {"quick": (1 / 12, 1 / 4), "full": (1 / 12, 1 / 4, 1.0)}  # lengths, as fractions of the run
STEPS = 20  # at least, of any run: fewer say nothing
LADDER = tuple(4.0**k for k in range(-10, 2))  # the rates of the first round: 1e-6 to 4
WIDTH = 2  # factors of 2 on either side, in the rounds after it
TOLERANCE = 0.5  # standard errors within which rates are equally good


def find_lr(
    model: nn.Module | None,
    data: Task | Iterable[Any],
    optimizer: str | Optimizers | torch.optim.Optimizer = "adamw",
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    valid: Iterable[Any] = (),
    epochs: int = 20,
    schedule: str | Schedule = "one-cycle",
    weight_decay: float = 0.01,
    seed: int = 0,
    effort: Effort = "full",
) -> Table:
    """The learning rate with which a run ends best: ``meta["rate"]``, and a row for each run that was tried.

    model: left as it is (None: a new one of the task). data: a Task, or batches (inputs, targets) that can be iterated
    again and again, a DataLoader say; then ``loss`` is a function of (outputs, targets), the mean over the batch, and
    ``valid`` more such batches. optimizer, epochs, schedule, weight_decay, seed: those of the run that is meant.

    Judged by the task's first metric on validation examples, equal values by the loss; by the training loss of the
    last quarter of the steps where there are none. Of the rates that are within half a standard error of the best, the
    (geometric) middle is returned: a run with another seed should not fall off an edge. effort: "full" costs about
    eight runs, "quick", whose longest runs are a quarter, three; ``meta["cost"]`` says it, in steps over the steps of
    a run. Any trial makes 20 steps at least, so that for a run of few steps it is more, up to twenty runs.

    Parameters, buffers, gradients, modes, the optimizer, the generators of Python, numpy and torch, and those of a
    DataLoader are put back bit for bit, also after an error or Ctrl-C. Raises ModelError if no rate trains.

    >>> from steelyard.learn.tasks import task
    >>> found = find_lr(None, task("breast-cancer"), "sgd", epochs=4, effort="quick")
    >>> 1e-3 < found.meta["rate"] < 4
    True
    """
    check_choice("effort", effort, get_args(Effort))
    if model is not None:
        check_model(model)
    task = data if isinstance(data, Task) else _task(data, valid, loss)
    if model is None:
        model = build_seeded(task, seed)
    options = {"schedule": schedule, "weight_decay": weight_decay, "seed": seed}
    tried: list[Trial] = []
    rate = 1.0
    with unchanged(model, optimizer, data, valid):
        bench = _Bench(model, task, optimizer, epochs, options)
        for i, length in enumerate(ROUNDS[effort]):
            found = bench.first(length) if i == 0 else bench.around(rate, length)
            tried += found
            rate = best_rate(found, lower=bench.lower or i == 0)
    columns = [
        Column("rate"),
        Column("length", "%", "of the run that is meant"),
        Column("judged by"),
        Column("value", "", "of that at the end; none where training diverged"),
        Column("standard error"),
        Column("steps"),
    ]
    rows = [
        {"rate": t.rate, "length": t.length, "judged by": t.metric, "standard error": t.error, "steps": t.steps,
         "value": t.value if math.isfinite(t.value) else None} for t in tried
    ]  # fmt: skip
    meta = {"rate": rate, "cost": sum(t.steps for t in tried) / bench.steps, "optimizer": bench.optimizer_name}
    return Table.of(f"learning rates for {task.name}", columns, rows, meta | {"epochs": epochs, "effort": effort})


@dataclass(frozen=True)
class Trial:
    """One run at one rate and how it ended."""

    rate: float
    length: float  # a fraction of the run that is meant
    steps: int
    metric: str
    value: float  # of the metric; infinitely bad where training diverged
    error: float = 0.0  # the standard error of the value
    loss: float = math.inf  # tells rates apart whose values are the same
    failure: ModelError | None = None


def best_rate(trials: Sequence[Trial], *, lower: bool) -> float:
    """The geometric middle of the rates whose value is within `TOLERANCE` standard errors of the best.

    Raises the ModelError of the lowest rate if none has a value.

    >>> found = {0.1: 0.90, 0.2: 0.95, 0.4: 0.955}
    >>> round(best_rate([Trial(r, 1, 9, "accuracy", v, 0.02) for r, v in found.items()], lower=False), 3)
    0.283
    """
    best = _best(trials, lower)
    sign = -1.0 if lower else 1.0
    near = [t.rate for t in trials if sign * (best.value - t.value) <= TOLERANCE * best.error]
    return math.exp(sum(map(math.log, near)) / len(near))


def _best(trials: Sequence[Trial], lower: bool) -> Trial:
    best = min(trials, key=lambda t: (t.value if lower else -t.value, t.loss))
    if not math.isfinite(best.value):
        raise trials[0].failure or ModelError("no learning rate trains this model")
    return best


class _Bench:
    """Runs of one model from one start, each at another rate."""

    def __init__(self, model: nn.Module, task: Task, optimizer: Any, epochs: int, options: dict[str, Any]):
        self.model, self.task, self.optimizer, self.epochs, self.options = model, task, optimizer, epochs, options
        self.start = copied(model_state(model))
        given = isinstance(optimizer, torch.optim.Optimizer)
        self.optimizer_start = copied(optimizer.state_dict()) if given else None
        self.optimizer_name = type(optimizer).__name__ if given else str(getattr(optimizer, "__name__", optimizer))
        self.per_epoch = sum(1 for _ in task.batches("train", 0))
        if not self.per_epoch:
            raise ModelError(f"the train split of the task {task.name!r} is empty")
        self.valid = any(True for _ in task.batches("valid", 0))
        self.metric = task.headline if self.valid else "loss"
        self.lower = self.metric == "loss" or self.metric in task.lower_is_better
        self.steps = epochs * self.per_epoch

    def first(self, length: float) -> list[Trial]:
        """The rates of the ladder, judged by the loss."""
        return [self.trial(rate, length, "loss") for rate in LADDER]

    def around(self, rate: float, length: float) -> list[Trial]:
        """Rates around that one, judged by the metric; more of them while the best is the outermost."""
        found = [self.trial(rate * 2.0**k, length, self.metric) for k in range(-WIDTH, WIDTH + 1)]
        while True:
            best = _best(found, self.lower)
            if best is found[0] and best.rate > LADDER[0]:
                found.insert(0, self.trial(best.rate / 2, length, self.metric))
            elif best is found[-1] and best.rate < LADDER[-1]:
                found.append(self.trial(best.rate * 2, length, self.metric))
            else:
                return found

    def trial(self, rate: float, length: float, metric: str) -> Trial:
        """A run of that length, from the start, judged by that metric at the end."""
        set_model_state(self.model, self.start)
        optimizer = self.optimizer
        if self.optimizer_start is not None:
            set_optimizer_state(optimizer, self.optimizer_start)
            top = max(group["lr"] for group in optimizer.param_groups) or 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * (group["lr"] / top if group["lr"] else 1.0)
        length = max(length, min(STEPS / self.steps, 1.0))
        epochs = max(1, round(self.epochs * length))
        count = max(1, min(self.per_epoch, round(self.steps * length / epochs)))
        task = replace(self.task, batches=_First(self.task, count))
        failure: ModelError | None = None
        run = Run(task, self.model, optimizer=optimizer, rate=rate, epochs=epochs, keep="last", **self.options)
        try:
            with run:
                for _ in run:
                    pass
            found, losses = self._judged(run, metric)
        except ModelError as error:
            found, failure = np.array([np.nan]), error
        if not np.isfinite(found).all():
            failure = failure or (ModelError(of_split(self.task, "valid")) if self.valid else None)
            worst = math.inf if metric == "loss" or self.lower else -math.inf
            return Trial(rate, length, len(run.log), metric, worst, failure=failure)
        spread = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        return Trial(rate, length, len(run.log), metric, float(found.mean()), spread, float(losses.mean()))

    def _judged(self, run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each validation example, or each of the last steps, the metric and the loss."""
        if self.valid:
            measured = outcomes(self.model, self.task, "valid")
            return measured[metric], measured["loss"]
        losses = np.array([row["loss"] for row in run.log[-math.ceil(len(run.log) / 4) :]])
        return losses, losses


@dataclass(frozen=True)
class _First(Checked):
    """The first batches of each training epoch of a task; nothing to validate on."""

    task: Task
    count: int

    def __call__(self, split: Split, epoch: int) -> Iterable[Batch]:
        return _Sized(self.task.batches(split, epoch), self.count) if split == "train" else ()


@dataclass(frozen=True)
class _Sized:
    """So many batches of a source. ``found`` is where a run looks for the generators that its order is drawn from."""

    found: Iterable[Batch]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.found), self.count)


def _task(data: Iterable[Any], valid: Iterable[Any], loss: Callable[[Tensor, Tensor], Tensor] | None) -> Task:
    """A loader and a loss as a Task."""
    check_kind("data", data, Iterable, "a Task, or batches (inputs, targets); the model comes before them")
    if loss is None:
        raise ModelError("batches need a loss: find_lr(model, batches, optimizer, loss=nn.functional.cross_entropy)")
    for batches in (data, valid):
        if isinstance(batches, Iterator):
            raise ModelError("the batches can be iterated only once: give a list or a DataLoader")

    def spread(outputs: Tensor, targets: Tensor) -> Tensor:
        found = loss(outputs, targets)
        return found.expand(len(targets)) if isinstance(found, Tensor) and not found.ndim else found

    def batches_of(split: Split, epoch: int) -> Iterable[Any]:  # noqa: ARG001 - the same in each epoch
        return data if split == "train" else valid if split == "valid" else ()

    return Task("the batches", nn.Identity, batches_of, spread, {"loss": spread}, lower_is_better=("loss",))


@contextmanager
def unchanged(model: nn.Module, optimizer: object, *batches: object) -> Iterator[None]:
    """After the block everything is as it was before, bit for bit, however the block ends.

    Parameters, buffers, gradients and modes of the model, the state of an optimizer, the generators of random numbers
    of Python, numpy, torch and of the given loaders.
    """
    tensors, drawn = copied(model_state(model)), random_state()
    gradients = [(p, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    state = copied(optimizer.state_dict()) if isinstance(optimizer, torch.optim.Optimizer) else None
    loaders = [(g, g.get_state()) for source in batches for g in generators_of(source)]
    try:
        yield
    finally:
        set_model_state(model, tensors)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        if state is not None and isinstance(optimizer, torch.optim.Optimizer):
            set_optimizer_state(optimizer, state)
        for generator, was in loaders:
            generator.set_state(was)
        set_random_state(drawn)

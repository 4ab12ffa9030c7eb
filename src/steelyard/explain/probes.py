"""What each layer knows: how well a linear model reads the targets off what the layer hands on, once and over time.

Decides what a layer hands on (what the first layer that it feeds is given, with the activation, norm or pooling in
between; the model's outputs for a last layer), on which examples probes are fitted and on which they are judged.
Knows nothing of why a layer knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.layers import differentiable
from steelyard.explain.ridge import fit_ridge
from steelyard.kernels.sketch import sketch
from steelyard.learn.gauges import plain_name
from steelyard.learn.intervals import student, wilson
from steelyard.learn.matrices import outermost
from steelyard.learn.measures import IGNORED
from steelyard.learn.options import check_whole
from steelyard.learn.passage import Call, Passage, tensors_of
from steelyard.learn.seeding import derive
from steelyard.learn.state import State, unwrapped
from steelyard.learn.step import Step
from steelyard.learn.task import Batch, Split, Task, apply, device_of, first_examples

INPUTS = "inputs"  # the row of what the model is given
SAMPLE = 256  # numbers of a tensor that the passage looks at: its scales are not used here


@dataclass(frozen=True)
class Settings:
    """On what probes are fitted and judged."""

    fit: Split = "train"
    on: Split = "valid"
    examples: int = 1000
    width: int = 512


def probe(
    model: nn.Module,
    task: Task,
    layers: Sequence[str] | None = None,
    *,
    fit: Split = "train",
    on: Split = "valid",
    examples: int = 1000,
    width: int = 512,
) -> Table:
    """How well each layer's output, as the next layer is given it, predicts the targets linearly, on held-out examples.

    A probe is a ridge regression onto the targets (one column for each class), its strength chosen by leaving each
    fitted example out once. For classes the table has the accuracy with Wilson's interval, otherwise R², the share of
    the variance that is explained. The first row is the inputs themselves: what can be read without any layer.

    Args:
        model: left as it was, random generators included.
        task: whose examples and targets are used; where there are targets for every position, each is an example.
        layers: the names of weighted layers; None: all, in the order in which they run.
        fit, on: the splits on which probes are fitted and judged.
        examples: of each split at most, the first that the task serves.
        width: a layer that hands on more numbers than that is read through a sketch of so many (`kernels.sketch`),
            which keeps distances between examples to 1 / sqrt(2 width).

    Raises UnknownNameError for a layer that is not there or not called, ModelError for an empty split.

    Source: Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016.

    >>> from steelyard.learn.task import build_seeded
    >>> from steelyard.learn.tasks import task
    >>> digits = task("digits", model="mlp", augment=False)
    >>> probe(build_seeded(digits), digits, examples=300).column("layer")
    ['inputs', 'fc1', 'fc2', 'head']
    """
    probes = Probes(task, model, layers, fit=fit, on=on, examples=examples, width=width)
    probes.update()
    rows = [{name: cell for name, cell in row.items() if name != "epoch"} for row in probes.rows]
    columns = [column for column in probes.columns if column.name != "epoch"]
    return Table.of(f"what each layer knows of {task.name}", columns, rows, probes.meta())


class Probes:
    """`probe` at several times of a training: as a gauge of a Run, or in a loop of your own::

        knows = sy.Probes(task)                              knows = sy.Probes(task, model)
        sy.train(task, gauges=[knows])                       for epoch in range(10):
        knows.table()                                            knows.update(epoch)
                                                                 ...

    As a gauge it probes before the first step, after 1, 2, 4, 8, ... epochs (or after the epochs ``at``), and once more
    what the training has ended with, when the table is asked for. The examples are the same each time, held in memory;
    the training and its random numbers are as they were. (Running statistics are those after the first batch of the
    next epoch.)

    Args:
        at: after which epochs; 0 is before the first step. None: 0, 1, 2, 4, 8, ...
        others: as those of `probe`.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module | None = None,
        layers: Sequence[str] | None = None,
        *,
        at: Sequence[int] | None = None,
        fit: Split = "train",
        on: Split = "valid",
        examples: int = 1000,
        width: int = 512,
    ):
        check_whole(examples=examples, width=width)
        self.task, self.model, self.layers = task, model, layers
        self.at = None if at is None else frozenset(at)
        self.settings = Settings(fit, on, examples, width)
        self.rows: list[dict[str, Any]] = []
        self._data: dict[Split, list[Batch]] = {}
        self._epoch, self._stale = -1, False  # of the last step; whether steps were made since the last probe

    def __call__(self, step: Step) -> Mapping[str, float]:
        """As a gauge: at the first step of an epoch, probe the weights before it."""
        if self.model is None:
            self.model = step.model
        elif unwrapped(step.model) is not unwrapped(self.model):
            raise ModelError("these probes look into another model: make others for each run, sy.Probes(task)")
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            if step.epoch in self.at if self.at is not None else step.epoch & (step.epoch - 1) == 0:
                with _as_before(step):
                    self.update(step.epoch)
        self._stale = True
        return {}

    def update(self, epoch: int = 0) -> None:
        """Probe the model as it is, after so many epochs."""
        if self.model is None:
            raise ModelError("there is no model to probe yet: sy.Probes(task, model) before the loop")
        self._stale = False
        self.rows += [{"epoch": epoch, **row} for row in self._measured(self.model)]

    def table(self) -> Table:
        """A row for each time and layer.

        A picture of it is ``steelyard.report.plots.Line(table, "epoch", ("known",), by="layer")``.
        """
        if self._stale:
            self.update(self._epoch + 1)
        return Table.of(f"what each layer knows of {self.task.name}, by epoch", self.columns, self.rows, self.meta())

    def state(self) -> State:
        """What `load` goes on from; a Run writes it with its checkpoint."""
        return {"rows": self.rows, "epoch": self._epoch, "stale": self._stale}

    def load(self, state: State, model: nn.Module | None = None) -> None:
        """Go on from a state that `state` gave, with that model if there was none yet."""
        self.model = self.model if self.model is not None else model
        self.rows, self._epoch, self._stale = list(state["rows"]), state["epoch"], state["stale"]

    @property
    def columns(self) -> list[Column]:
        """Of the table."""
        classes = self._classes
        return [
            Column("epoch", "", "0 is before the first step"),
            Column("layer", "", "what it hands on to the next"),
            Column("numbers", "", "that it hands on for an example"),
            Column("known", "%", "accuracy of a linear probe" if classes else "R² of a linear probe"),
            Column("low", "%", "of the 95 % interval"),
            Column("high", "%", "of the 95 % interval"),
            Column("strength", "", "of the ridge, chosen on the fitted examples"),
        ]

    def meta(self) -> dict[str, Any]:
        """Where the numbers come from; chance is what the most frequent class, or the mean, would get."""
        targets = {split: _targets(batches) for split, batches in self._data.items()}
        found: dict[str, Any] = {"task": self.task.name, "fitted on": self.settings.fit, "judged on": self.settings.on}
        if targets:
            y = targets[self.settings.on]
            chance = float(y.unique(return_counts=True)[1].max()) / len(y) if self._classes else 0.0
            found |= {"examples": len(y), "fitted examples": len(targets[self.settings.fit]), "chance": chance}
        return found | {"widest": self.settings.width, "probe": "ridge, leave-one-out"}

    @property
    def _classes(self) -> bool:
        return all(not b.targets.is_floating_point() for batches in self._data.values() for b in batches)

    def _measured(self, model: nn.Module) -> list[dict[str, Any]]:
        s = self.settings
        with differentiable(model):
            if not self._data:
                self._data = {split: first_examples(self.task, split, s.examples) for split in (s.fit, s.on)}
            fitted, judged = (_handed_on(model, self._data[split], s.width, self.layers) for split in (s.fit, s.on))
        y, truth = (_targets(self._data[split]) for split in (s.fit, s.on))
        rows = []
        for layer, x in fitted.features.items():
            row = {"layer": layer, "numbers": fitted.numbers[layer]}
            rows.append(row | _known(x, y, judged.features[layer], truth, classes=self._classes))
        return rows


@dataclass
class _Handed:
    """What each layer hands on: (examples, numbers) by name, and how many numbers there were before any sketch."""

    features: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def _handed_on(model: nn.Module, batches: Sequence[Batch], width: int, layers: Sequence[str] | None = None) -> _Handed:
    """What weighted layers hand on, all or those that are named, in the order in which they run; first the inputs."""
    parts: dict[str, list[Tensor]] = {}
    found = _Handed()
    for batch in batches:
        given: dict[str, Tensor] = {}

        def look(call: Call, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into = next(tensors_of((args, kwargs)), None)
            for maker in call.fed_by:
                if into is not None:
                    given.setdefault(passage.calls[maker].layer, into.detach())  # noqa: B023 - called in this turn only

        passage = Passage(outermost(model), SAMPLE, look=look)
        moved = batch.to(device_of(model))
        with passage.attached():
            outputs = apply(model, moved).detach()
        order = dict.fromkeys(call.layer for call in passage.calls)
        first = next(tensors_of(moved.inputs), None)
        wanted = {INPUTS: first} if first is not None else {}
        known = {plain_name(layer): given.get(layer, outputs) for layer in order}
        for layer in layers or ():
            if layer not in known:
                raise UnknownNameError("layer", layer, list(known))
        wanted |= {name: tensor for name, tensor in known.items() if layers is None or name in layers}
        for name, tensor in wanted.items():
            rows = _by_example(tensor, moved, name)
            found.numbers[name] = rows.shape[1]
            parts.setdefault(name, []).append(_narrow(rows, width))
    found.features = {name: torch.cat(rows) for name, rows in parts.items()}
    return found


def _by_example(x: Tensor, batch: Batch, layer: str) -> Tensor:
    """(examples, numbers): a row for each target, of each position where there are targets for positions."""
    positions = batch.targets.shape if not batch.targets.is_floating_point() else batch.targets.shape[:1]
    if x.shape[: len(positions)] != positions:
        raise ModelError(
            f"{layer!r} hands on {list(x.shape)} for targets {list(positions)}: expected the same first axes; "
            "choose other layers (layers=)"
        )
    rows = x.reshape(positions.numel(), -1)
    return rows[_counted(batch.targets)].float().cpu()


def _narrow(rows: Tensor, width: int) -> Tensor:
    """The rows, or sketches of them where they are long."""
    if rows.shape[1] <= width:
        return rows
    found = np.zeros((len(rows), width))
    seed = derive(0, "probe")
    for row, sums in zip(rows.contiguous().numpy(), found, strict=True):
        sketch(row, seed, sums)
    return torch.from_numpy(found).float()


def _known(x: Tensor, y: Tensor, held: Tensor, truth: Tensor, *, classes: bool) -> dict[str, Any]:
    """How well a ridge on (x, y) predicts the truth of the held-out rows."""
    if classes:
        labels, codes = y.unique(return_inverse=True)
        ridge = fit_ridge(x, nn.functional.one_hot(codes, len(labels)))
        hits = int((labels[ridge.predict(held).argmax(1)] == truth).sum())
        low, high = wilson(hits, len(truth))
        return {"known": hits / len(truth), "low": low, "high": high, "strength": ridge.strength}
    ridge = fit_ridge(x, y.reshape(len(y), -1))
    truth = truth.reshape(len(truth), -1).double()
    errors = (ridge.predict(held) - truth).square().sum(1).numpy()
    variance = float((truth - truth.mean(0)).square().sum(1).mean())
    if not variance:
        return {"known": None, "low": None, "high": None, "strength": ridge.strength}
    low, high = student(errors)
    known = {"known": 1 - float(errors.mean()) / variance, "low": 1 - high / variance, "high": 1 - low / variance}
    return known | {"strength": ridge.strength}


def _targets(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.targets.reshape(len(_counted(batch.targets)), -1)[_counted(batch.targets)].squeeze(-1)
                      for batch in batches]).cpu()  # fmt: skip


def _counted(targets: Tensor) -> Tensor:
    """Which rows of `_by_example` count: those of a position that is left out do not."""
    if targets.is_floating_point():
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    return (targets != IGNORED).reshape(-1)


@contextmanager
def _as_before(step: Step) -> Iterator[None]:
    """Within the block the parameters are those before the step."""
    own = dict(step.model.named_parameters())
    after = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        try:
            for name, p in own.items():
                p.copy_(step.before[name])
            yield
        finally:
            for name, p in own.items():
                p.copy_(after[name])

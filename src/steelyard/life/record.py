"""The record of a run: what every stage said and measured, and the tools that all stages share.

Decides what a row of the table of stages is and how the recipe's names become tasks and models. Knows nothing of what
the stages do.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, UnknownNameError, VerdictError
from steelyard.formats.module import from_module, into_module
from steelyard.init import start
from steelyard.learn import TASKS
from steelyard.learn.locate import locate
from steelyard.learn.models import model as make_model
from steelyard.learn.run import Run, train
from steelyard.learn.step import Gauge
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks import task as find_task
from steelyard.life.recipe import Named, Recipe, split_name


@dataclass(frozen=True)
class Chapter:
    """What one stage has to say: prose, tables, and figures for whoever draws them (by name)."""

    name: str
    text: str
    tables: tuple[Table, ...] = ()
    drawn: dict[str, Table] = field(default_factory=dict)  # tables that are better seen than read


@dataclass
class Life:
    """The record of one run, filled stage by stage."""

    recipe: Recipe
    task: Task
    out: Path
    say: Callable[[str], None]
    chapters: list[Chapter] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the table of stages
    failures: list[str] = field(default_factory=list)  # what was asked for and not reached

    @property
    def stages(self) -> Table:
        """What each stage left: bytes in a file that was written, the headline metric on held-out data, the time."""
        metric = self.task.headline
        unit = "%" if metric == "accuracy" else ""
        columns = [
            Column("stage"),
            Column("file"),
            Column("bytes", "B", "of the file that was written"),
            Column("ratio", "x", "of the bytes of weights.safetensors to these"),
            Column(metric, unit, "on the test split"),
            Column("low", unit, "of the 95 % interval"),
            Column("high", unit, "of the 95 % interval"),
            Column("seconds", "s", "that the stage took"),
        ]
        original = next((row["bytes"] for row in self.rows if row["stage"] == "trained"), None)
        rows = [row | {"ratio": original / row["bytes"] if original else None} for row in self.rows]
        return Table.of("Stages", columns, rows, {"task": self.task.name, "seed": self.recipe.seed})

    def score(self, stage: str) -> float:
        """The headline metric after a stage, on the test split."""
        found: float = next(row[self.task.headline] for row in self.rows if row["stage"] == stage)
        return found

    def verdict(self) -> None:
        """Raise VerdictError if something that the recipe asks for was not reached."""
        if self.failures:
            raise VerdictError("; ".join(self.failures))

    def add(self, stage: str, file: Path, measured: Table | dict[str, Any], since: float, name: str = "") -> None:
        """A row of the table of stages, for a file that lies on disk."""
        rows = measured["rows"] if isinstance(measured, dict) else measured.rows
        first = next(row for row in rows if row["metric"] == self.task.headline)
        size = file.stat().st_size
        row = {"stage": stage, "file": name or file.name, "bytes": size, self.task.headline: first["value"]}
        row |= {"low": first["low"], "high": first["high"], "seconds": time.perf_counter() - since}
        self.rows.append(row)
        self.say(f"{stage}: {size:,} bytes, {self.task.headline} {first['value']:.4f}")


def make_task(named: Named, model: Named | None, seed: int) -> Task:
    """The task that a recipe names, with the model that it names (None: the task's own).

    A factory that takes a seed gets the recipe's, unless its own options give one.
    """
    name, options = split_name(named)
    given: dict[str, Any] = {"seed": seed} if takes(name, "seed") else {}
    which, settings = (None, {}) if model is None else split_name(model)
    if which is not None and name.partition(":")[0] in TASKS and takes(name, "model"):
        given["model"] = which  # what a task serves may depend on its model
    task = find_task(name, **given | options)
    if which is None or (not settings and "model" in given and "model" not in options):
        return task
    if task.interface is None and ":" not in which:
        raise ModelError(
            f"the task {name!r} does not say its interface, so the built-in model {which!r} cannot be made for it: "
            "give the Task an Interface, or leave `model` out to take its own"
        )
    return task.with_model(partial(make_model, which, task.interface, **settings))


def takes(name: str, option: str) -> bool:
    """Whether the factory of the task `name` has a parameter of that name."""
    kind, colon, _ = name.partition(":")
    if kind not in TASKS and not colon:
        raise UnknownNameError("task", name, TASKS)
    factory = TASKS[kind] if kind in TASKS else locate(name)
    return callable(factory) and option in inspect.signature(factory).parameters


def fresh_start(task: Task, scheme: str | None, seed: int) -> nn.Module:
    """A new model of the task, its weights started by the seed and the scheme (None: as the model starts them)."""
    model = build_seeded(task, seed)
    if scheme is None:
        return model
    into_module(start(from_module(model), scheme, seed).settle(), model)
    return model


def trained_run(
    life: Life, task: Task, model: nn.Module, epochs: int, rate: float, gauges: Sequence[Gauge] = ()
) -> Run:
    """Train `model` in place with the recipe's optimizer, schedule, decay and seed."""
    told = life.recipe.train
    return train(
        task, model, optimizer=told.optimizer, rate=rate, epochs=epochs, schedule=told.schedule,
        weight_decay=told.weight_decay, seed=life.recipe.seed, gauges=gauges,
    )  # fmt: skip

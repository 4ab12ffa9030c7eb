"""The record of a run as tables: a row for each step, a row for each epoch. Knows nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.learn.task import Task


def steps_table(task: Task, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> Table:
    """A row for each step; a column for everything that any step has."""
    columns = {"step": "", "epoch": "", "loss": "", "rate": "", "seconds": "s"}
    columns.update({name: "" for row in rows for name in row if name not in columns})
    return Table.of(f"training on {task.name}, by step", columns, rows, meta)


def epochs_table(task: Task, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> Table:
    """A row for each epoch, from 0, which is before the first step."""
    columns = [
        Column("epoch", "", "0 is before the first step"),
        Column("train loss", "", "mean over the epoch's batches, each before its update"),
        Column("valid loss", "", "after the epoch"),
        Column(task.headline, "%" if task.headline == "accuracy" else "", "on the validation split"),
        Column("seconds", "s", "spent on updates so far"),
    ]
    return Table.of(f"training on {task.name}, by epoch", columns, rows, meta)


def objective_table(steps: Table) -> Table | None:
    """From the table of all steps, what was lowered at the last one of each epoch: data term + each penalty.

    None if nothing was penalised.
    """
    names = [c.name for c in steps.columns]
    if "objective" not in names:
        return None
    penalties = names[names.index("seconds") + 1 : names.index("objective")]
    columns = [
        Column("epoch"),
        Column("step"),
        Column("data term", "", "the mean loss of the batch, before its update"),
    ]
    columns += [*map(Column, penalties), Column("objective", "", "data term + each penalty")]
    last = {row["epoch"]: {**row, "epoch": row["epoch"] + 1, "data term": row["loss"]} for row in steps.rows}
    rows = [{c.name: row[c.name] for c in columns} for row in last.values()]
    return Table.of("objective at the last step of each epoch", columns, rows, steps.meta)

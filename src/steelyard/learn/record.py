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

"""The stage that says what trained weights mean: the first filters and the last linear layer, each checked by removal.

Composes what ``explain`` computes and puts it into sentences; computes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from steelyard.core.table import Table
from steelyard.errors import ModelError
from steelyard.explain.coefficients import coefficients, removal
from steelyard.explain.contributions import contributions
from steelyard.explain.filters import filter_removal, filters
from steelyard.learn.task import Task, first_batch
from steelyard.life.record import Chapter, Life


def explained(life: Life, model: nn.Module) -> None:
    """What the first filters and the last layer's large, small and negative weights mean."""
    told, since = life.recipe.explain, time.perf_counter()
    if told is None:
        return
    said: list[str] = []
    tables: list[Table] = []
    drawn: dict[str, Table] = {}
    try:
        _filters(model, life.task, said, tables, drawn)
    except ModelError as error:
        said.append(f"No filters are shown: {error}.")
    try:
        _coefficients(model, life.task, told.strongest, said, tables)
    except ModelError as error:
        said.append(f"No coefficients are shown: {error}.")
    life.say(f"explained ({time.perf_counter() - since:.1f} s)")
    life.chapters.append(Chapter("Explain", "\n\n".join(said), tuple(tables), drawn))


def _filters(model: nn.Module, task: Task, said: list[str], tables: list[Table], drawn: dict[str, Table]) -> None:
    found, without = filters(model, task), filter_removal(model, task)
    first, worst = found.rows[0], without.rows[0]
    agreement = without.meta["spearman of importance and loss"]
    said.append(
        f"The most important of the {len(found.rows)} filters of `{found.meta['layer']}` is filter {first['filter']}: "
        f"it responds most to '{first['class']}', and {first['selectivity']:.0%} of the variance of its response lies "
        f"between the classes. Without filter {worst['filter']} the held-out loss rises by {worst['loss']:.3g} and "
        f"{task.headline} changes by {100 * worst['metric']:+.1f} points, most for '{worst['worst class']}' "
        f"({100 * worst['worst']:+.1f}). The rank correlation of the estimated importance with the damage "
        f"measured by removal is {agreement:.2f} (1: the same order; 0: none)."
    )
    tables.append(without)
    drawn["filters"] = found


def _coefficients(model: nn.Module, task: Task, strongest: int, said: list[str], tables: list[Table]) -> None:
    found, without = coefficients(model, task), removal(model, task)
    chosen = pick(found.rows, strongest)
    title = f"the largest, the most negative and the nearest to zero of {found.title}"
    tables += [Table(title, found.columns, chosen, found.meta), without]
    up, down, least = chosen[0], chosen[len(chosen) // 3], chosen[-1]
    agreement, raw = (without.meta[f"spearman of {what} and outputs"] for what in ("effect", "|weight|"))
    said.append(
        f"In the linear layer `{found.meta['layer']}` a large weight counts for an output, a negative one against it, "
        f"one whose effect is near zero hardly matters. Input {up['input']} speaks most for '{up['output']}' (weight "
        f"{up['weight']:+.3f}, effect {up['effect']:+.3f} for one standard deviation); input {down['input']} most "
        f"against '{down['output']}' ({down['weight']:+.3f}, {down['effect']:+.3f}); input {least['input']} says next "
        f"to nothing about '{least['output']}' ({least['weight']:+.3f}, {least['effect']:+.5f}). The check is to hold "
        f"each input at its mean: the rank correlation with the change of the outputs is {agreement:.2f} for effects, "
        f"{raw:.2f} for raw weights."
    )
    one = contributions(model, first_batch(task, "test").inputs, found.meta["layer"])
    tables.append(Table(f"{one.title}, for the first held-out example", one.columns, one.rows[:strongest], one.meta))
    total, actual, error = (one.meta[what] for what in ("sum", "pre-activation", "relative error"))
    said.append(
        f"For the first held-out example the products w_j x_j and the bias add up to {total:.6g}; the layer's own "
        f"pre-activation is {actual:.6g} (relative error {error:.1g})."
    )


def pick(rows: Sequence[Any], strongest: int) -> tuple[Any, ...]:
    """The rows with the largest, the most negative, and the smallest effects: `strongest` of each, in this order."""
    by_effect = sorted(rows, key=lambda row: -row["effect"])
    by_size = sorted(rows, key=lambda row: -abs(row["effect"]))
    count = min(strongest, len(by_effect))
    return (*by_effect[:count], *by_effect[: -count - 1 : -1], *by_size[-count:])

"""The stage that carries what was learned to a new task: three ways to begin, on the same few examples."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.formats.module import from_module
from steelyard.learn.evaluate import evaluate
from steelyard.learn.finetune import finetune
from steelyard.learn.task import Task
from steelyard.life.recipe import Move
from steelyard.life.record import Chapter, Life, fresh_start, make_task, trained_run
from steelyard.shrinking.deep import lost

_WAYS = ("from scratch", "carried over, a new head trained", "carried over, everything trained")


def moved(life: Life, model: nn.Module) -> None:
    """Carry what was learned to a new task, against training it from scratch."""
    told, recipe, since = life.recipe.move, life.recipe, time.perf_counter()
    if told is None:
        return
    teacher = model
    if told.source is not None:
        source = make_task(told.source, recipe.model, recipe.seed)
        teacher = fresh_start(source, recipe.start.scheme, recipe.seed)
        trained_run(life, source, teacher, recipe.train.epochs, recipe.train.rate)
    target = make_task(told.target, recipe.model, recipe.seed)
    table, account = contest(life, told, from_module(teacher).settle(), target)
    scratch, *carried = table.rows
    best = min(carried, key=lambda row: lost(target, scratch[target.headline], row[target.headline]))
    reached = f"{best[target.headline]:.4f} ({best['start']}) against {scratch[target.headline]:.4f} from scratch"
    life.say(f"moved: {reached}, {time.perf_counter() - since:.1f} s")
    examples = sum(len(batch) for batch in target.batches("train", 0))
    text = (
        f"The new task has {examples} training examples. Every tensor of the trained net is accounted for in the "
        f"second table; its head starts anew. On held-out examples {target.headline} is {reached}. Same data, same "
        "seed, same number of epochs."
    )
    life.chapters.append(Chapter("Move", text, (table, account)))


def contest(life: Life, told: Move, learned: Weights, target: Task) -> tuple[Table, Table]:
    """A row for each way to begin, and the account of what was loaded."""
    recipe, rows = life.recipe, []
    for way in _WAYS:
        since, student = time.perf_counter(), fresh_start(target, recipe.start.scheme, recipe.seed)
        if way == "from scratch":
            trained_run(life, target, student, told.epochs, told.rate)
        else:
            frozen = "head" in way
            _, account = finetune(
                target, learned, student, freeze="body" if frozen else None, optimizer=recipe.train.optimizer,
                rate=told.head_rate if frozen else told.rate, epochs=told.epochs, schedule=recipe.train.schedule,
                weight_decay=recipe.train.weight_decay, seed=recipe.seed,
            )  # fmt: skip
        rows.append(_row(way, student, target) | {"seconds": time.perf_counter() - since})
    unit = "%" if target.headline == "accuracy" else ""
    columns = [Column("start"), Column("weights trained"), Column(target.headline, unit, "on the test split")]
    columns += [Column("low", unit, "of the 95 % interval"), Column("high", unit, "of the 95 % interval")]
    columns += [Column("examples", "", "of the test split"), Column("seconds", "s")]
    meta = {"target": str(told.target), "source": str(told.source or recipe.task), "epochs": told.epochs}
    return Table.of("Moved to a new task", columns, rows, meta), account


def _row(way: str, student: nn.Module, target: Task) -> dict[str, Any]:
    first = evaluate(student, target).rows[0]
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    found = {"start": way, "weights trained": trainable, target.headline: first["value"]}
    return found | {key: first[key] for key in ("low", "high", "examples")}

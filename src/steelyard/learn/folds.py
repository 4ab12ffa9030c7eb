"""Cross-validation: a task divided into folds, each of them once the test split, and what training on the rest gives.

Decides which example is in which fold, and which interval belongs to a mean over folds. Knows nothing of models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.intervals import resampled
from steelyard.learn.options import check_choice, check_whole
from steelyard.learn.pool import Pool
from steelyard.learn.run import train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.seeding import derive
from steelyard.learn.task import Split, Task

Division = Literal["stratified", "blocks", "groups"]
VALID = 0.15  # of the examples outside the fold


def folds(task: Task, count: int = 5, *, by: Division | None = None, seed: int = 0, valid: float = VALID) -> list[Task]:
    """The task `count` times, each time with another fold as its test split, and the rest to train and to validate.

    All examples of the task, whatever split they were in, are put into one pool (see `pool.in_memory`); each is in
    the test split exactly once, and never in two splits of one task.

    Args:
        by: "stratified": each class in the same proportion in every fold, where targets are classes, and at random
            otherwise; "blocks": consecutive examples, for texts and series, whose neighbours tell of each other;
            "groups": each group of ``Examples.groups`` in one fold as a whole (patients, speakers, ...).
            None: "blocks" where the examples of the task follow one another, and otherwise "stratified".
        seed: of the division and of the order of batches.
        valid: the share of the examples outside a fold that is for validation, divided in the same manner.

    What the task has fitted to its own training rows (the mean and spread of `breast-cancer`) is not fitted anew.

    Raises ModelError for fewer than 2 folds, or more than there are examples, or groups.

    >>> from steelyard.learn.tasks import task
    >>> [f.about["examples"]["test"] for f in folds(task("digits"), 5)]
    [360, 360, 359, 359, 359]
    """
    by = by or _usual(task)
    check_choice("division", by, get_args(Division))
    if not 0 < valid < 1:
        raise ModelError(f"valid={valid}: expected a share between 0 and 1")
    pool = Pool.of(task)
    every = torch.arange(len(pool.targets))
    found = []
    for number, test in enumerate(_divided(pool, every, count, by, seed, task.name)):
        rest = every[~torch.isin(every, test)]
        left = len(rest) if by != "groups" or pool.groups is None else len(pool.groups[rest].unique())
        if left < 2:
            raise ModelError(f"{count} folds of the task {task.name!r} leave nothing to train and to validate on: "
                             "give more examples, or groups")  # fmt: skip
        parts = _divided(pool, rest, min(max(2, round(1 / valid)), left), by, derive(seed, "valid", number), task.name)
        held = parts[-1]  # the last block, which is nearest to what comes after it
        rows: dict[Split, Tensor] = {"train": rest[~torch.isin(rest, held)], "valid": held, "test": test}
        data = pool.divided(rows, seed)
        about = {**task.about, "fold": number, "folds": count, "examples": data.sizes}
        found.append(replace(task, batches=data, about=about))
    return found


def cross_validate(
    task: Task,
    count: int = 5,
    *,
    model: nn.Module | None = None,
    by: Division | None = None,
    repeats: int = 1,
    confidence: float = 0.95,
    **options: Unpack[RunOptions],
) -> Table:
    """Train on each of `folds` and test on what was left out: a row for each, with the gap between train and test.

    ``meta`` has the mean, the spread (standard deviation over folds) and the interval of the mean for the test metric
    and for the gap. Folds share training examples, so that Student's interval would be too narrow: the variance of the
    mean is taken as (1 / J + test / train examples) s² for J trainings (Nadeau and Bengio 2003).

    Args:
        model: the start (None: a new one of the task for each fold, from the seed and the fold); left as it is.
        by: of `folds`. repeats: so many divisions, each with another seed.
        options: of `Run`; ``seed`` is that of the division, too, and of each training with its number added.

    >>> from steelyard.learn.tasks import task
    >>> found = cross_validate(task("breast-cancer"), 3, epochs=20)
    >>> found.column("fold"), found.meta["mean"] > 0.9
    ([0, 1, 2], True)
    """
    check_whole(repeats=repeats)
    if options.get("checkpoint") is not None:
        raise ModelError("a cross-validation is many runs, and a checkpoint holds one: leave checkpoint= out")
    seed = options.get("seed", 0)
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for fold in folds(task, count, by=by, seed=seed if not repeat else derive(seed, repeat)):
            told: RunOptions = {**options, "seed": seed + len(rows)}
            trained = train(fold, copy.deepcopy(model), progress=False, **told).model
            rows.append({"repeat": repeat, **_tested(trained, fold)})
    name, unit = task.headline, "%" if task.headline == "accuracy" else ""
    columns = [
        *([Column("repeat")] if repeats > 1 else []),
        *(Column("fold"), Column("train examples"), Column("test examples")),
        *(Column(f"train {name}", unit), Column(f"test {name}", unit)),
        Column("gap", "pp" if unit else "", "by how much the test is worse than the training"),
        *(Column("train loss"), Column("test loss")),
    ]
    meta = {"task": task.name, "folds": count, "repeats": repeats, "division": by or _usual(task)}
    shown = [{c.name: row[c.name] for c in columns} for row in rows]
    summary = _summary(rows, name, confidence)
    return Table.of(f"cross-validation on {task.name}", columns, shown, {**meta, "confidence": confidence, **summary})


def _tested(model: nn.Module, fold: Task) -> dict[str, Any]:
    """What a model that was trained on a fold does on its training and test examples."""
    name, sizes = fold.headline, fold.about["examples"]
    seen, unseen = (mean_outcomes(model, fold, split) for split in ("train", "test"))
    worse = 1 if name in fold.lower_is_better else -1
    row = {"fold": fold.about["fold"], "train examples": sizes["train"], "test examples": sizes["test"]}
    row |= {f"train {name}": seen[name], f"test {name}": unseen[name], "gap": worse * (unseen[name] - seen[name])}
    return row | {"train loss": seen["loss"], "test loss": unseen["loss"]}


def _summary(rows: Sequence[Mapping[str, Any]], name: str, confidence: float) -> dict[str, float]:
    """Mean, spread and interval of the test metric and of the gap."""
    ratio = float(np.mean([row["test examples"] / row["train examples"] for row in rows]))
    found: dict[str, float] = {}
    for prefix, column in (("", f"test {name}"), ("gap ", "gap")):
        values = np.array([row[column] for row in rows])
        low, high = resampled(values, ratio, confidence)
        found |= {f"{prefix}mean": float(values.mean()), f"{prefix}spread": float(values.std(ddof=1))}
        found |= {f"{prefix}low": low, f"{prefix}high": high}
    return found


def _usual(task: Task) -> Division:
    return "blocks" if task.ordered else "stratified"


def _divided(pool: Pool, rows: Tensor, count: int, by: Division, seed: int, name: str) -> list[Tensor]:
    """The rows in so many parts of about the same size, each in ascending order."""
    if not isinstance(count, int) or not 2 <= count <= len(rows):
        raise ModelError(f"{count} folds of the task {name!r}: expected 2 to {len(rows)}, the examples there are")
    random = np.random.default_rng([seed, 0xF01D])
    if by == "groups":
        return _by_groups(pool, rows, count, random, name)
    if by == "blocks":
        return list(rows.tensor_split(count))
    y = pool.targets[rows]
    kinds = y.numpy() if y.ndim == 1 and not y.is_floating_point() else np.zeros(len(y), np.int64)
    order = np.concatenate([random.permutation(np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) % count  # dealt like cards, class after class
    return [rows[torch.from_numpy(np.flatnonzero(place == part))] for part in range(count)]


def _by_groups(pool: Pool, rows: Tensor, count: int, random: np.random.Generator, name: str) -> list[Tensor]:
    """Whole groups, the largest first, each into the part that is smallest so far."""
    if pool.groups is None:
        raise ModelError(f"the task {name!r} has no groups: give Examples(..., groups=), or divide otherwise")
    own, groups = np.unique(pool.groups[rows].numpy(), return_inverse=True)
    sizes = np.bincount(groups)
    if len(own) < count:
        raise ModelError(f"{count} folds of the task {name!r}: expected 2 to {len(own)}, the groups there are")
    order = random.permutation(len(own))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, part = np.zeros(count, np.int64), np.empty(len(own), np.int64)
    for group in order:
        part[group] = int(filled.argmin())
        filled[part[group]] += sizes[group]
    return [rows[torch.from_numpy(np.flatnonzero(part[groups] == k))] for k in range(count)]

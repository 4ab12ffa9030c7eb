"""How a model does on what it was trained on, chosen by, and never saw; and on inputs that are spoilt.

Decides which parts are compared and with which interval. Changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from steelyard.core.table import Column, Table
from steelyard.learn.corrupt import CORRUPTIONS, corrupted
from steelyard.learn.evaluate import interval, outcomes, paired_interval
from steelyard.learn.intervals import apart
from steelyard.learn.task import SPLITS, Split, Task

GAPS: Mapping[str, tuple[Split, Split]] = {"gap, valid": ("train", "valid"), "gap, test": ("train", "test")}


def generalization(model: nn.Module, task: Task, *, confidence: float = 0.95) -> Table:
    """Each metric and the loss on the train, validation and test splits, and the gaps between them, with intervals.

    A gap is by how much the unseen split is worse than the training split: positive where the model overfits. The
    intervals speak of the examples, for this model: those of `evaluate` for each split, put together for a gap as
    Newcombe does (`intervals.apart`). How much another training would differ is what `cross_validate` tells.

    Training examples are measured as the task serves them in its first epoch, varied where it varies them.

    >>> from steelyard.learn.run import train
    >>> from steelyard.learn.tasks import task
    >>> digits = task("digits", model="mlp", augment=False, shots=20)
    >>> table = generalization(train(digits, epochs=10, progress=False).model, digits)
    >>> {r["part"]: r["value"] > 0.05 for r in table.rows if r["metric"] == "accuracy" and "gap" in r["part"]}
    {'gap, valid': True, 'gap, test': True}
    """
    found = {split: outcomes(model, task, split) for split in SPLITS}
    rows: list[dict[str, Any]] = []
    for metric in found["train"]:
        values = {split: found[split][metric] for split in SPLITS}
        means = {split: float(one.mean()) for split, one in values.items()}
        ends = {split: interval(one, confidence, task.ordered) for split, one in values.items()}
        for split, ((low, high), method) in ends.items():
            rows.append({"metric": metric, "part": split, "value": means[split], "low": low, "high": high})
            rows[-1] |= {"examples": len(values[split]), "method": method}
        worse = 1 if metric == "loss" or metric in task.lower_is_better else -1
        for name, (seen, unseen) in GAPS.items():
            low, high = sorted(worse * x for x in apart(means[seen], ends[seen][0], means[unseen], ends[unseen][0]))
            rows.append({"metric": metric, "part": name, "value": worse * (means[unseen] - means[seen])})
            rows[-1] |= {"low": low, "high": high, "examples": len(values[unseen]), "method": "Newcombe"}
    columns = [
        Column("metric"),
        Column("part", "", "a split, or by how much the unseen one is worse than the training split"),
        Column("value"),
        Column("low", "", f"of the {confidence:.0%} interval"),
        Column("high", "", f"of the {confidence:.0%} interval"),
        Column("examples"),
        Column("method", "", "of the interval"),
    ]
    return Table.of(f"{task.name}: seen and unseen", columns, rows, {"task": task.name, "confidence": confidence})


def robustness(
    model: nn.Module,
    task: Task,
    kinds: Sequence[str] | None = None,
    *,
    strengths: Mapping[str, Sequence[float]] | None = None,
    split: Split = "test",
    seed: int = 0,
    confidence: float = 0.95,
) -> Table:
    """The headline metric on spoilt inputs of a split, beside what they cost, for each kind and strength.

    The cost is paired, example by example, with the interval of `compare`.

    Args:
        kinds: of `corrupt.CORRUPTIONS`; None: those that fit the inputs (shift and rotate are for images).
        strengths: of a kind, in place of its usual ones.
        seed: of all randomness; the same spoilt examples for every model.

    Raises UnknownNameError for a kind that is not there, ModelError for one that does not fit.

    Source: Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions, 2019.
    """
    name, worse = task.headline, 1 if task.headline in task.lower_is_better else -1
    plain = outcomes(model, task, split)[name]
    fitting = [k for k, c in CORRUPTIONS.items() if c.fits(task)] if kinds is None else list(kinds)
    rows: list[dict[str, Any]] = [{"corruption": "none", "strength": 0.0, name: float(plain.mean()), "cost": 0.0}]
    rows[0] |= {"low": 0.0, "high": 0.0}
    for kind in fitting:
        for strength in (strengths or {}).get(kind) or CORRUPTIONS[kind].strengths:
            spoilt = outcomes(model, corrupted(task, kind, strength, splits=(split,), seed=seed), split)[name]
            ends, _ = paired_interval(plain, spoilt, confidence, task.ordered)
            low, high = sorted(worse * end for end in ends)
            row = {"corruption": kind, "strength": strength, name: float(spoilt.mean())}
            rows.append(row | {"cost": worse * float(np.mean(spoilt - plain)), "low": low, "high": high})
    units = ("%", "pp") if name == "accuracy" else ("", "")
    columns = [
        Column("corruption"),
        Column("strength", "", "; ".join(f"{k}: {CORRUPTIONS[k].unit}" for k in fitting)),
        Column(name, units[0]),
        Column("cost", units[1], "by how much worse than without"),
        Column("low", units[1], f"of the {confidence:.0%} interval of the cost"),
        Column("high", units[1], f"of the {confidence:.0%} interval of the cost"),
    ]
    meta = {"task": task.name, "split": split, "seed": seed, "examples": len(plain)}
    return Table.of(f"{task.name}: spoilt inputs", columns, rows, meta)

"""A regularisation path: what grows, shrinks and vanishes as a penalty becomes stronger.

Decides what is measured at each strength. Knows nothing of how a penalty acts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.decay import Decay
from steelyard.learn.evaluate import outcomes
from steelyard.learn.parameters import named_parameters
from steelyard.learn.penalties import L2, Penalty
from steelyard.learn.run import train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.task import SPLITS, Task, build_seeded

COLUMNS = (
    Column("strength", "", "of the penalty"),
    Column("penalty", "", "what it adds to the objective in the end"),
    Column("norm", "", "Euclidean, of all weights that decay by default"),
    Column("zeros", "%", "of these weights that are exactly zero"),
    Column("train loss", "", "the data term in evaluation mode"),
    Column("valid loss", "", "on the validation split"),
    Column("gap", "", "validation loss - training loss"),
)


def regularization_path(
    task: Task,
    strengths: Sequence[float],
    penalty: Callable[[float], Penalty | Decay] = L2,
    model: nn.Module | None = None,
    *,
    test: bool = False,
    **options: Unpack[RunOptions],
) -> Table:
    """A row for each strength: the norm and the zeros of the weights, training and validation loss, their gap.

    Each strength trains anew from the same start, with the same batches, so that only the penalty differs. The
    strength with the lowest validation loss is ``meta["best"]``. A picture of it is
    ``steelyard.report.plots.Line(path, "strength", ("train loss", "valid loss"))``.

    Args:
        strengths: ascending or not; 0 is without the penalty.
        penalty: strength -> penalty, such as ``sy.L1`` or ``lambda s: sy.ElasticNet(s, 0.9)``.
        model: the start (None: a new one of the task, from the seed); it is left as it is.
        test: also measure the task's headline on the test split, to report it, not to choose by it.
        options: of `Run`; unless told, no other decay, the last weights, and a cosine schedule.

    Raises ModelError for no strengths, or one that is no finite number, 0 or more.

    >>> from steelyard.learn.tasks import task
    >>> path = regularization_path(task("breast-cancer"), [0.0, 0.1], epochs=5)
    >>> norms = path.column("norm")
    >>> norms[1] < norms[0]
    True
    """
    if not strengths or not all(isinstance(s, (int, float)) and 0 <= s < math.inf for s in strengths):
        raise ModelError(f"strengths={list(strengths)!r}: expected one or more finite numbers, 0 or more")
    start = build_seeded(task, options.get("seed", 0)) if model is None else model
    told: RunOptions = {"weight_decay": 0.0, "keep": "last", "schedule": "cosine", **options}
    name = task.headline
    rows = []
    for strength in strengths:
        penalties = [*options.get("penalties", ()), penalty(strength)]
        run = train(task, copy.deepcopy(start), progress=False, **{**told, "penalties": penalties})
        row = {"strength": float(strength), "penalty": run.penalized.value(), **_weights(run.model)}
        measured = {split: outcomes(run.model, task, split) for split in (SPLITS if test else SPLITS[:2])}
        losses = {split: float(found["loss"].mean()) for split, found in measured.items()}
        row |= {"train loss": losses["train"], "valid loss": losses["valid"], "gap": losses["valid"] - losses["train"]}
        rows.append(row | {f"{split} {name}": float(found[name].mean()) for split, found in measured.items()})
    best = min(rows, key=lambda row: row["valid loss"])
    unit = "%" if name == "accuracy" else ""
    headline = [Column(f"{split} {name}", unit) for split in measured]
    meta = {"task": task.name, "best": best["strength"], "start": "the same for each strength"}
    return Table.of(f"regularisation path on {task.name}", (*COLUMNS, *headline), rows, meta)


def _weights(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        weights = [p.parameter.double() for p in named_parameters(model) if p.decays]
        count = sum(w.numel() for w in weights)
        norm = math.sqrt(sum(float(w.square().sum()) for w in weights))
        return {"norm": norm, "zeros": sum(int((w == 0).sum()) for w in weights) / count if count else 0.0}

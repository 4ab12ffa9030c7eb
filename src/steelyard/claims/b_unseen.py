"""Chapter B, learning: what was learned holds for unseen inputs, and what was learned by heart does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.learn.folds import cross_validate, folds
from steelyard.learn.generalization import generalization, robustness
from steelyard.learn.intervals import student
from steelyard.learn.pool import label_noise
from steelyard.learn.run import train
from steelyard.learn.task import SPLITS, Task

FOLDS, SEEDS, NOISE = 5, 5, (0.0, 0.2, 0.4)
SPOILT = {"noise": (1.0,), "missing": (0.5,), "shift": (1.5,), "rotate": (40.0,)}


def numbered(task: Task) -> Task:
    """The task with the number of the example, counted over all splits, in place of each image."""
    data: Any = task.batches
    ends = np.cumsum([0, *data.sizes.values()]).tolist()
    numbers = {split: torch.arange(*ends[i : i + 2]) for i, split in enumerate(SPLITS)}
    return replace(task, batches=replace(data, inputs=numbers))


def _division() -> dict[str, float]:
    parts: list[Any] = [fold.batches for fold in folds(numbered(digits()), FOLDS)]
    tested = torch.cat([part.inputs["test"] for part in parts]).bincount()
    shared = sum(int(torch.cat(list(part.inputs.values())).bincount().gt(1).sum()) for part in parts)
    return {"examples not tested once": int((tested != 1).sum()), "examples in two splits": shared}


def _by_noise() -> dict[str, float]:
    gaps: dict[float, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        few = digits(seed=seed, shots=30, batch_size=64)
        for share in NOISE:
            noisy = label_noise(few, share, seed=seed)
            model = train(noisy, epochs=50, rate=0.01, seed=seed, weight_decay=0.0, keep="last", progress=False).model
            rows = generalization(model, noisy).rows
            gap = next(r["value"] for r in rows if (r["metric"], r["part"]) == ("accuracy", "gap, test"))
            gaps.setdefault(share, []).append(float(gap))  # type: ignore[arg-type]
            if not share:
                for row in robustness(model, few, strengths=SPOILT, seed=seed).rows[1:]:
                    costs.setdefault(str(row["corruption"]), []).append(float(row["cost"]))  # type: ignore[arg-type]
    growth = [student(np.subtract(gaps[more], gaps[less]))[0] for less, more in pairwise(NOISE)]
    found = {"least growth of the gap, low": min(growth)}
    found |= {"least cost of spoilt inputs, low": min(student(np.array(cost))[0] for cost in costs.values())}
    return found | {f"gap at {share:.0%} wrong labels": float(np.mean(gap)) for share, gap in gaps.items()}


def _unseen() -> Mapping[str, float]:
    found = cross_validate(digits(batch_size=128), FOLDS, epochs=10, rate=0.01)
    measured = {
        f"{what} of 5 folds": float(found.meta[key]) for key, what in (("mean", "accuracy"), ("spread", "spread"))
    }
    ends = {f"accuracy of 5 folds, {end}": float(found.meta[end]) for end in ("low", "high")}
    return measured | _by_noise() | _division() | ends


B6 = Check(
    "B6",
    "what is learned generalises to unseen inputs",
    "an MLP on digits, 5 folds: mean and spread of the test accuracy; on 300 images with 0, 20 and 40 % wrong labels, "
    "5 seeds: the lower end of the 95 % interval of what the gap grows by; the same of what spoilt inputs cost",
    (
        Bar("accuracy of 5 folds", ">=", 0.95),
        Bar("spread of 5 folds", "<=", 0.02),
        Bar("examples not tested once", "==", 0),
        Bar("examples in two splits", "==", 0),
        Bar("least growth of the gap, low", ">=", 0.03),
        Bar("least cost of spoilt inputs, low", ">=", 0.03),
    ),
    _unseen,
)

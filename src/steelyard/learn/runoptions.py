"""The keywords of a Run, as a type: what `train`, `finetune` and others hand on. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from steelyard.learn.average import Ema, Swa
from steelyard.learn.decay import Decay
from steelyard.learn.gradients import Precision
from steelyard.learn.kept import Keep
from steelyard.learn.optimizers import Optimizers
from steelyard.learn.penalties import Penalty
from steelyard.learn.schedules import Schedule, Scheduler
from steelyard.learn.step import Gauge


class RunOptions(TypedDict, total=False):
    """The keywords of Run that `train` and `finetune` hand on."""

    optimizer: str | Optimizers | torch.optim.Optimizer
    rate: float
    epochs: int
    schedule: str | Schedule | Scheduler
    weight_decay: float
    penalties: Sequence[Penalty | Decay]
    seed: int
    gauges: Sequence[Gauge]
    keep: Keep
    average: Ema | Swa | str | None
    patience: int | None
    accumulate: int
    clip: float | None
    precision: Precision
    compiled: bool | Mapping[str, Any]
    after_step: Callable[[nn.Module], None] | None
    checkpoint: str | Path | None
    every: int | None
    resume: bool

"""Optimizers by name, over the groups of `decay_groups`. Knows nothing of schedules or data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from steelyard.errors import UnknownNameError
from steelyard.learn.parameters import decay_groups

Optimizers = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # parameter groups -> an optimizer

OPTIMIZERS: Mapping[str, Optimizers] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def optimizer_for(
    model: nn.Module, optimizer: str | Optimizers, rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of that name (or made by that function) for the model's trainable parameters.

    Raises UnknownNameError for a name that is not there, ModelError if the model has nothing to train.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
        optimizer = OPTIMIZERS[optimizer]
    return optimizer(decay_groups(model, weight_decay, lr=rate))

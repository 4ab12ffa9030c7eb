"""Optimizers by name, over parameter groups in which only tensors of two axes or more decay.

Decides which parameters are trained and which decay. Knows nothing of schedules or data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError

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
    return optimizer(parameter_groups(model, rate, weight_decay))


def parameter_groups(model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: those that decay (two axes or more), and biases, gains and codebooks.

    Decay pulls towards zero; for a bias, the gain of a normalisation or a codebook zero is no simpler than
    another value (Goodfellow et al. 2016, 7.1). Raises ModelError if every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("the model has nothing to train: it has no parameters, or all of them are frozen")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": rate, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

"""Optimizers by name, over the groups of `decay_groups`. Knows nothing of schedules or data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.parameters import decay_groups

Optimizers = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # parameter groups -> an optimizer

OPTIMIZERS: Mapping[str, Optimizers] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def optimizer_for(
    model: nn.Module, optimizer: str | Optimizers | torch.optim.Optimizer, rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of that name (or made by that function, or given) for the model's trainable parameters.

    Raises UnknownNameError for a name that is not there, ModelError if the model has nothing to train, or the
    optimizer holds parameters of something else, or lacks some.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return _checked(optimizer, model)
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
        optimizer = OPTIMIZERS[optimizer]
    return _checked(optimizer(decay_groups(model, weight_decay, lr=rate)), model)


def _checked(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    names = {id(p): name for name, p in model.named_parameters()}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    foreign = [p for number, p in held.items() if number not in names]
    if foreign:
        raise ModelError(f"the optimizer holds {len(foreign)} of {len(held)} parameters that the model does not have, "
                         f"the first of shape {tuple(foreign[0].shape)}: make it from the parameters of this model, "
                         "after the last change of its layers")  # fmt: skip
    lacking = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in held]
    if lacking:
        raise ModelError(f"the optimizer does not hold {lacking[0]}: give it every parameter that is to be trained, "
                         "and freeze the others (requires_grad_(False))")  # fmt: skip
    return optimizer

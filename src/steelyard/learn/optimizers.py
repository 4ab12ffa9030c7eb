"""Optimizers by name, over the groups of `decay_groups`. Knows nothing of schedules or data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.calling import calling
from steelyard.learn.options import check_kind
from steelyard.learn.parameters import decay_groups

Optimizers = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # parameter groups -> an optimizer

OPTIMIZERS: Mapping[str, Optimizers] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}

EXPECTED = "a name, a function from parameter groups to a torch optimizer, or an optimizer of the model"


def optimizer_for(
    model: nn.Module, optimizer: str | Optimizers | torch.optim.Optimizer, rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of that name (or made by that function, or given) for the model's trainable parameters.

    A function gets groups that carry ``lr`` (the rate) and ``weight_decay``, which go before what it says for all
    groups; if it says other numbers, that is refused.

    Raises UnknownNameError for a name that is not there, ModelError if the model has nothing to train, or the
    optimizer holds parameters of something else, or lacks some.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return _checked(optimizer, model)
    groups = decay_groups(model, weight_decay, lr=rate)
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
        optimizer = OPTIMIZERS[optimizer]
        return _checked(optimizer(groups), model)
    if not callable(optimizer):
        check_kind("optimizer", optimizer, torch.optim.Optimizer, EXPECTED)
    with calling("making the optimizer"):
        made = optimizer(groups)
    check_kind("what the optimizer's function returns", made, torch.optim.Optimizer, "a torch optimizer")
    _check_own(made, rate, weight_decay)
    return _checked(made, model)


def _check_own(optimizer: torch.optim.Optimizer, rate: float, weight_decay: float) -> None:
    """Raise ModelError for a rate or a decay that a function said and that those of its groups go before.

    What is the default of its class, or has none, was not said.
    """
    known = inspect.signature(type(optimizer)).parameters
    for key, option, value in (("lr", "rate", rate), ("weight_decay", "weight_decay", weight_decay)):
        said, default = optimizer.defaults.get(key), known[key].default if key in known else inspect.Parameter.empty
        if any(group.get(key) == said for group in optimizer.param_groups):
            continue  # of groups of its own
        if isinstance(said, Real) and default is not inspect.Parameter.empty and said not in (default, value):
            raise ModelError(f"the optimizer's function says {key}={said}, and the groups that it is given carry "
                             f"{key}={value:g}, which goes before it: leave it out there, and say "
                             f"{option}={said} beside optimizer=")  # fmt: skip


def _checked(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ModelError(f"{type(optimizer).__name__} evaluates the loss several times in a step, by a closure, which "
                         "a run does not give: use it in a loop of your own, or another optimizer here")  # fmt: skip
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

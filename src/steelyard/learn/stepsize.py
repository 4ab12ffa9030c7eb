"""How far an optimizer moves each element for a unit of gradient: what a proximal step needs to know of it.

Decides the step size of every optimizer of torch whose update is diagonal. Knows nothing of penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from steelyard.errors import ModelError

Group = Mapping[str, Any]
State = Mapping[str, Any]
Size = float | Tensor  # one number, or one for each element


def step_size(optimizer: Optimizer, group: Group, parameter: nn.Parameter) -> Size:
    """The step that `optimizer` has just made, for each unit of a gradient that stays the same.

    An update is w <- w - s g for a constant gradient g; s is the rate for SGD, rate / (1 - momentum) with momentum,
    and rate / (sqrt(v) + eps), one number for each element, for Adam and its like. A fixed point of the update
    followed by the proximal step of size s is where 0 is in g + (the subgradient of the penalty): the minimum of
    the stated objective, whatever the optimizer (Yun, Lozano & Yang 2021). Call it after ``optimizer.step()``.

    Raises ModelError for an optimizer whose update is not diagonal or not known.

    >>> weight = nn.Parameter(Tensor([1.0, 1.0]))
    >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
    >>> round(step_size(optimizer, optimizer.param_groups[0], weight), 6)
    1.0
    """
    return _rule(optimizer)(group, optimizer.state.get(parameter, {}))


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ModelError, with what to do instead, if the step size of this optimizer is not known."""
    _rule(optimizer)


def rate(group: Group) -> float:
    """The learning rate of a group as a number."""
    return float(group["lr"])


def _rule(optimizer: Optimizer) -> Callable[[Group, State], Size]:
    for kind in type(optimizer).__mro__:
        if kind in RULES:
            return RULES[kind]
    raise ModelError(
        f"the step size of {type(optimizer).__name__} for each weight is not known; known are those of "
        f"{', '.join(sorted(k.__name__ for k in RULES))} and what derives from them: "
        'say metric="rate" to shrink by the learning rate alone'
    )


def _sgd(group: Group, state: State) -> float:  # noqa: ARG001 - the signature of a rule
    momentum = float(group["momentum"])
    kept = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
    return rate(group) * kept


def _adam(group: Group, state: State) -> Tensor:
    second: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return rate(group) / (second.sqrt() / math.sqrt(1 - group["betas"][1] ** _steps(state)) + group["eps"])


def _nadam(group: Group, state: State) -> Tensor:
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** _steps(state))
    return rate(group) / (corrected.sqrt() + group["eps"])


def _radam(group: Group, state: State) -> Size:
    beta, steps = group["betas"][1], _steps(state)
    longest, correction = 2 / (1 - beta) - 1, 1 - beta**steps
    length = longest - 2 * steps * beta**steps / correction
    if length <= 5:
        return rate(group)
    part = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return rate(group) * math.sqrt(part * correction) / (state["exp_avg_sq"].sqrt() + group["eps"])


def _adamax(group: Group, state: State) -> Tensor:
    return rate(group) / state["exp_inf"]


def _adagrad(group: Group, state: State) -> Tensor:
    decayed = rate(group) / (1 + (_steps(state) - 1) * group["lr_decay"])
    return decayed / (state["sum"].sqrt() + group["eps"])


def _rmsprop(group: Group, state: State) -> Tensor:
    second = state["square_avg"]
    if group["centered"]:
        second = (second - state["grad_avg"].square()).clamp_min(0)
    return rate(group) / (1 - group["momentum"]) / (second.sqrt() + group["eps"])


def _steps(state: State) -> float:
    return float(state["step"])


RULES: Mapping[type[Optimizer], Callable[[Group, State], Size]] = {
    SGD: _sgd,
    Adam: _adam,
    NAdam: _nadam,
    RAdam: _radam,
    Adamax: _adamax,
    Adagrad: _adagrad,
    RMSprop: _rmsprop,
}

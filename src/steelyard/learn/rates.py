"""Parameter groups in which parameters have rates of their own, for any torch optimizer.

Decides how an optimizer's step depends on the size of the gradient, and what becomes of a group that is split. Knows
nothing of why rates differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from steelyard.errors import ModelError
from steelyard.learn.optimizers import Optimizers

Rule = Literal["sgd", "adam"]  # how a step depends on the size of the gradient: in proportion, or not at all

RULES: Mapping[Rule, tuple[type[torch.optim.Optimizer], ...]] = {
    "sgd": (torch.optim.SGD, torch.optim.ASGD),
    "adam": (
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.SparseAdam,
    ),
}


def rule_of(optimizer: Optimizers) -> Rule:
    """Whether an optimizer's step is in proportion to the gradient or independent of its size.

    >>> from steelyard.learn.optimizers import OPTIMIZERS
    >>> rule_of(torch.optim.AdamW), rule_of(OPTIMIZERS["sgd"])
    ('adam', 'sgd')

    Raises ModelError for one that is not known here.
    """
    kind = optimizer.func if isinstance(optimizer, partial) else optimizer
    for rule, kinds in RULES.items():
        if isinstance(kind, type) and issubclass(kind, kinds):
            return rule
    raise ModelError(
        f"whether {getattr(kind, '__name__', kind)} follows the size of the gradient is not known here: "
        "say rule='sgd' if a gradient twice as large gives a step twice as large, rule='adam' if it gives the same"
    )


def split_by_rate(
    groups: Iterable[Any], factor: Callable[[Tensor], float], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Parameter groups of torch, each one split by `factor`: the rate times it, the weight decay divided by it.

    So rate times decay, which is what a step takes off a weight, stays as it was. All other options are kept.

    Args:
        groups: what torch's optimizers take: parameters, (name, parameter), or groups of them with options.
        factor: of the rate of a parameter.
        defaults: ``lr`` and ``weight_decay`` for groups without them.

    Raises ModelError for a parameter that is there twice.
    """
    given = list(groups)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    seen: set[int] = set()
    split: list[dict[str, Any]] = []
    for group in given:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        by_factor: dict[float, list[Any]] = {}
        for member in members:
            parameter = member[1] if isinstance(member, tuple) else member
            if id(parameter) in seen:
                raise ModelError(f"a parameter of shape {tuple(parameter.shape)} is in the groups twice")
            seen.add(id(parameter))
            by_factor.setdefault(factor(parameter), []).append(member)
        options = {**defaults, **group}
        for times, part in by_factor.items():
            scaled = {"params": part, "lr": options["lr"] * times}
            if "weight_decay" in options:
                scaled["weight_decay"] = options["weight_decay"] / times
            split.append({**group, **scaled})
    return split


def default_of(optimizer: Optimizers, option: str) -> Any:
    """What an optimizer takes for an option that is not given; None if it has no such option."""
    found = inspect.signature(optimizer).parameters.get(option)
    return None if found is None or found.default is inspect.Parameter.empty else found.default

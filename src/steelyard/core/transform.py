"""Transforms: functions from Weights to Weights, pure and lazy. What is built here reads nothing.

A transform that is also data (it can be written into a recipe and read back) is a `Step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where

Transform = Callable[[Weights], Weights]


class Step(ABC):
    """A transform with a name and a configuration. Final subclasses are frozen dataclasses."""

    name: ClassVar[str]  # its row in the table of steps

    @abstractmethod
    def __call__(self, weights: Weights) -> Weights: ...


@dataclass(frozen=True)
class Chain(Step):
    """One transform after the other."""

    name: ClassVar[str] = "chain"
    steps: tuple[Transform, ...]

    def __call__(self, weights: Weights) -> Weights:
        for step in self.steps:
            weights = step(weights)
        return weights


@dataclass(frozen=True)
class On(Step):
    """A transform of the chosen weights; the others pass through unread, each in its place."""

    name: ClassVar[str] = "on"
    where: Where
    step: Transform

    def __call__(self, weights: Weights) -> Weights:
        chosen = weights.select(self.where)
        changed = self.step(chosen)
        return _merge(weights, chosen, changed)


def _merge(weights: Weights, chosen: Weights, changed: Weights) -> Weights:
    """Put `changed` where `chosen` stood: in place one by one, or as a block where their number differs."""
    new = list(changed.values())
    in_place = len(new) == len(chosen)
    items: list[Weight] = []
    for name, item in weights.items():
        if name not in chosen:
            items.append(item)
        elif in_place:
            items.append(new.pop(0))
        else:
            items, new = items + new, []
    here = {item.name for item in items}
    kept = {a: n for a, n in weights.ties.items() if n not in chosen and n in here and a not in here}
    return Weights(items, {**kept, **changed.ties}, {**weights.meta, **changed.meta})


def chain(*steps: Transform) -> Chain:
    """One transform that applies `steps` in order.

    >>> import numpy as np
    >>> double = each(lambda w: w.then(lambda x: 2 * x))
    >>> float(chain(double, double)(Weights.of({"a": np.float32([1])}))["a"].array()[0])
    4.0
    """
    return Chain(steps)


def on(where: Where, *steps: Transform) -> On:
    """Apply `steps` to the weights that `where` chooses, and leave the rest untouched."""
    return On(where, steps[0] if len(steps) == 1 else Chain(steps))


def each(function: Callable[[Weight], Weight | None]) -> Transform:
    """A transform that treats every weight by itself; None drops it."""

    def apply(weights: Weights) -> Weights:
        results: Iterable[Weight | None] = (function(item) for item in weights.values())
        return weights.with_items(item for item in results if item is not None)

    return apply

"""What is known while the operations of a trace are gone through, and what every rule needs.

Decides nothing about single operations, except that one without a rule keeps all that it reads as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from steelyard.graph.labels import Axes, Labels, fixed


@dataclass(frozen=True)
class Cost:
    """Multiplications: `constant` times the number of indices that are left along each of the loops."""

    constant: float
    loops: tuple[np.ndarray, ...]  # the labels along each


@dataclass
class State:
    """What is known while the operations are gone through."""

    labels: Labels
    keep_whole: frozenset[str] = frozenset()  # operations that cut an axis in fixed places: nothing of it may go
    cutting: dict[str, list[np.ndarray]] = field(default_factory=dict)  # operations that cut an axis -> its labels
    costs: list[Cost] = field(default_factory=list)
    inexact: list[np.ndarray] = field(default_factory=list)  # labels along which means are taken

    def cut(self, node: fx.Node, labels: np.ndarray) -> bool:
        """Note that `node` cuts this axis into parts; whether that is believed to work for other sizes."""
        self.cutting.setdefault(node.name, []).append(labels)
        if node.name in self.keep_whole:
            self.labels.stay(labels)
            return False
        return True


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of what a node computes; () for what is no tensor."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def value_of(node: Any) -> Any:
    return node.meta["val"]


def first_of(node: fx.Node, first: Axes) -> Any:
    """`first` as the result, or as the first of several of which the others may not lose anything."""
    value = value_of(node)
    if not isinstance(value, (list, tuple)):
        return first
    return [first, *(fixed(shape_of(v)) for v in value[1:])]


def every_axis(given: Any) -> list[np.ndarray]:
    if isinstance(given, np.ndarray):
        return [given]
    return [a for part in given for a in every_axis(part)] if isinstance(given, (list, tuple)) else []


def unknown(state: State, node: fx.Node, given: list[Any]) -> Any:
    for labels in every_axis(given):
        state.labels.stay(labels)
    value = value_of(node)
    return [fixed(shape_of(v)) for v in value] if isinstance(value, (list, tuple)) else fixed(shape_of(value))


def tensors(given: Sequence[Any]) -> list[Axes]:
    return [g for g in given if isinstance(g, tuple)]


def broadcast(state: State, inputs: list[Axes], shape: tuple[int, ...]) -> Axes:
    found: list[np.ndarray] = []
    for back in range(len(shape), 0, -1):  # the axis -back
        size, here = shape[-back], [axes[-back] for axes in inputs if len(axes) >= back]
        whole = [labels for labels in here if len(labels) == size]
        for labels in here:
            if len(labels) != size:
                state.labels.stay(labels)
        for labels in whole[1:]:
            state.labels.join(whole[0], labels)
        found.append(whole[0] if whole else np.zeros(size, np.int64))
    return tuple(found)


def rows_together(state: State, labels: np.ndarray, groups: int) -> None:
    """Index i of every one of `groups` consecutive parts belongs together."""
    rows = labels.reshape(groups, -1)
    for row in rows[1:]:
        state.labels.join(rows[0], row)

"""Examples in memory, split by purpose, served in batches.

Decides the order of the batches (a function of seed, split and epoch alone) and how examples are split.
Knows nothing of where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from steelyard.errors import ModelError
from steelyard.learn.balance import balanced_order
from steelyard.learn.seeding import generator
from steelyard.learn.task import SPLITS, Batch, Checked, Split

Augment = Callable[[Tensor, torch.Generator], Tensor]  # a batch of inputs -> the same batch, varied
Inputs: TypeAlias = Tensor | tuple[Tensor, ...]  # several for a model of several arguments


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch; sized, and iterable as often as needed."""

    inputs: Inputs
    targets: Tensor
    order: Tensor  # (examples,)
    size: int
    weight: Tensor | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.order), self.size):
            rows = self.order[start : start + self.size]
            weight, groups = (None if t is None else t[rows] for t in (self.weight, self.groups))
            yield Batch(chosen(self.inputs, rows), self.targets[rows], weight, groups)


@dataclass(frozen=True)
class Examples(Checked):
    """Inputs and targets of the three splits. Called with (split, epoch) it gives that epoch's batches."""

    inputs: Mapping[Split, Inputs]
    targets: Mapping[Split, Tensor]
    batch_size: int
    seed: int
    augment: Augment | None = None  # applied to the training inputs, anew in each epoch
    weight: Mapping[Split, Tensor] = field(default_factory=dict)  # (examples,): how much each counts
    groups: Mapping[Split, Tensor] = field(default_factory=dict)  # (examples,): the number of the group of each
    balance: Tensor | None = None  # (training examples,): an epoch serves each of these groups equally often

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ModelError(f"the batch size is {self.batch_size}, expected at least 1")
        given = {**{f"weights of {s}": (s, t) for s, t in self.weight.items()},
                 **{f"groups of {s}": (s, t) for s, t in self.groups.items()}}  # fmt: skip
        if self.balance is not None:
            given["balance"] = ("train", self.balance)
        for what, (split, tensor) in given.items():
            if split not in self.targets or tensor.shape != self.targets[split].shape[:1]:
                raise ModelError(f"{what}: shape {list(tensor.shape)}, expected one number for each example of {split}")

    def __call__(self, split: Split, epoch: int) -> Batches:
        if split not in self.inputs:
            raise ModelError(f"there is no split {split!r}: the splits are {', '.join(SPLITS)}")
        inputs, targets = self.inputs[split], self.targets[split]
        if split != "train":
            return self._batches(split, inputs, torch.arange(len(targets)), max(self.batch_size, 256))
        if self.augment is not None:
            if not isinstance(inputs, Tensor):
                raise ModelError(
                    "augment varies a single tensor of inputs, and there are several: vary them in the task"
                )
            inputs = self.augment(inputs, generator(self.seed, "augment", epoch))
        if self.balance is not None:
            order = balanced_order(self.balance, self.seed, epoch)
        else:
            order = torch.randperm(len(targets), generator=generator(self.seed, "order", epoch))
        return self._batches(split, inputs, order, self.batch_size)

    def _batches(self, split: Split, inputs: Inputs, order: Tensor, size: int) -> Batches:
        return Batches(inputs, self.targets[split], order, size, self.weight.get(split), self.groups.get(split))

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each split has."""
        return {split: len(self.targets[split]) for split in SPLITS}


def chosen(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some examples of the inputs."""
    return tuple(x[rows] for x in inputs) if isinstance(inputs, tuple) else inputs[rows]


def stratified(
    labels: np.ndarray,  # (examples,) class numbers
    seed: int,
    valid: float = 0.15,
    test: float = 0.25,
) -> dict[Split, np.ndarray]:
    """Row numbers of the three splits; each class is divided in the same proportions, up to one example.

    >>> parts = stratified(np.repeat([0, 1], 20), seed=0)
    >>> {name: len(rows) for name, rows in parts.items()}
    {'train': 24, 'valid': 6, 'test': 10}
    """
    random = np.random.default_rng([seed, 0x5911])
    parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    order: tuple[Split, ...] = ("test", "valid", "train")
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        first, second = round(len(rows) * test), round(len(rows) * test) + round(len(rows) * valid)
        for split, part in zip(order, np.split(rows, [first, second]), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(found)) for split, found in parts.items()}


def few(rows: np.ndarray, labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """``shots`` of the rows for each class, chosen by the seed; raises ModelError if a class has fewer.

    rows: (n,) row numbers; labels: (examples,) class numbers.
    """
    random = np.random.default_rng([seed, 0x5407])
    chosen = []
    for label in np.unique(labels[rows]):
        those = rows[labels[rows] == label]
        if not 1 <= shots <= len(those):
            raise ModelError(
                f"shots={shots}: class {label} has {len(those)} examples to train on, choose 1 to {len(those)}"
            )
        chosen.append(random.permutation(those)[:shots])
    return np.sort(np.concatenate(chosen))

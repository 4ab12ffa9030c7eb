"""All examples of a task in memory, to be divided or labelled anew.

Decides how the splits of any task are put together. Knows nothing of folds or noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steelyard.errors import ModelError
from steelyard.learn.data import Examples, Inputs, chosen
from steelyard.learn.seeding import generator
from steelyard.learn.task import SPLITS, Split, Task


def in_memory(task: Task) -> Task:
    """The same task with its batches of epoch 0 held in memory as `Examples`; a task that holds them is as it is.

    The training examples of another task are those of its first epoch, with whatever varies them in it; batches are as
    large as the largest of it. Raises ModelError for a task without training examples, or one whose batches go on from
    one another.
    """
    if isinstance(task.batches, Examples):
        return task
    if task.interface is not None and task.interface.carried:
        raise ModelError(f"each batch of the task {task.name!r} goes on where the last one ended, so that its examples "
                         "cannot be divided anew: make it with carry=False")  # fmt: skip
    inputs: dict[Split, Inputs] = {}
    targets: dict[Split, Tensor] = {}
    extra: dict[str, dict[Split, Tensor]] = {"weight": {}, "groups": {}}
    size = 0
    for split in SPLITS:
        batches = [batch for batch in task.batches(split, 0) if len(batch)]
        if not batches:
            continue
        size = size or max(len(batch) for batch in batches)
        parts = [torch.cat(part) for part in zip(*(batch.arguments for batch in batches), strict=True)]
        inputs[split] = tuple(parts) if isinstance(batches[0].inputs, tuple) else parts[0]
        targets[split] = torch.cat([batch.targets for batch in batches])
        for name, found in extra.items():
            values = [getattr(batch, name) for batch in batches]
            if all(value is not None for value in values):
                found[split] = torch.cat(values)
    if "train" not in targets:
        raise ModelError(f"the train split of the task {task.name!r} is empty")
    for split in SPLITS:
        inputs.setdefault(split, chosen(inputs["train"], torch.zeros(0, dtype=torch.long)))
        targets.setdefault(split, targets["train"][:0])
    data = Examples(inputs, targets, size, 0, weight=extra["weight"], groups=extra["groups"])
    return replace(task, batches=data)


@dataclass(frozen=True)
class Pool:
    """The examples of all splits one after the other, training first: (examples, ...) each."""

    inputs: Inputs
    targets: Tensor
    weight: Tensor | None
    groups: Tensor | None
    data: Examples

    @staticmethod
    def of(task: Task) -> Pool:
        """Those of a task."""
        data: Any = in_memory(task).batches
        if data.balance is not None:
            raise ModelError(f"the task {task.name!r} balances its training examples by row, and the rows are divided "
                             "anew: give it weights (weight=) instead")  # fmt: skip
        several = isinstance(data.inputs["train"], tuple)
        parts = [data.inputs[s] if several else (data.inputs[s],) for s in SPLITS]
        inputs = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        targets = torch.cat([data.targets[split] for split in SPLITS])
        sizes = data.sizes
        weight = [data.weight.get(split, torch.ones(sizes[split])) for split in SPLITS]
        known = all(split in data.groups or not sizes[split] for split in SPLITS)
        groups = torch.cat([data.groups[s] for s in SPLITS if s in data.groups]) if known and data.groups else None
        whole = inputs if several else inputs[0]
        return Pool(whole, targets, torch.cat(weight) if data.weight else None, groups, data)

    def divided(self, rows: Mapping[Split, Tensor], seed: int) -> Examples:
        """The examples of each split by their row numbers."""
        weight, groups = ({} if t is None else {s: t[r] for s, r in rows.items()} for t in (self.weight, self.groups))
        inputs = {split: chosen(self.inputs, r) for split, r in rows.items()}
        targets = {split: self.targets[r] for split, r in rows.items()}
        return Examples(inputs, targets, self.data.batch_size, seed, self.data.augment, weight, groups)


def label_noise(task: Task, share: float, *, splits: tuple[Split, ...] = ("train",), seed: int = 0) -> Task:
    """The task with a share of its labels, drawn by the seed, replaced by another class, each as likely.

    The wrong labels are the same in every epoch, and a higher share keeps those of a lower one. The other splits keep
    their labels: what is measured on them is what was learned in spite of the noise.

    Raises ModelError for a share outside [0, 1], and for targets that are not one class for each example.

    Source: Zhang et al., Understanding deep learning requires rethinking generalization, 2017.

    >>> from steelyard.learn.tasks import task
    >>> plain = task("breast-cancer")
    >>> noisy = label_noise(plain, 0.25)
    >>> wrong = plain.batches.targets["train"] != noisy.batches.targets["train"]
    >>> int(wrong.sum()), len(wrong)
    (85, 341)
    """
    if not 0 <= share <= 1:
        raise ModelError(f"share={share}: expected a share of the labels, from 0 to 1")
    task = in_memory(task)
    data: Any = task.batches
    classes = len(task.classes) or 1 + max(int(t.max()) for t in data.targets.values() if len(t))
    targets = dict(data.targets)
    for split in splits:
        y = targets[split]
        if y.ndim != 1 or y.is_floating_point() or classes < 2:
            raise ModelError(f"the targets of the task {task.name!r} are not one class for each example: "
                             "noise in labels is for classes")  # fmt: skip
        draw = generator(seed, "label noise", split)
        order, away = torch.randperm(len(y), generator=draw), torch.randint(1, classes, (len(y),), generator=draw)
        wrong = order[: round(share * len(y))]
        targets[split] = y.clone()
        targets[split][wrong] = (y[wrong] + away[wrong].to(y.dtype)) % classes
    about = {**task.about, "label noise": share, "label noise seed": seed}
    return replace(task, batches=replace(data, targets=targets), about=about)

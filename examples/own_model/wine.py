"""A model and a task of your own: three kinds of wine from thirteen chemical measurements.

`steelyard run wine.yaml` in this folder starts, trains, explains, shrinks and ships it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch import nn

from steelyard.learn.task import Batch, Split, Task


def net() -> nn.Module:
    """The model: any factory of any nn.Module."""
    return nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 3))


def wine() -> Task:
    """The task: the model, batches of three splits, a loss and metrics with one number for each example."""
    data = load_wine()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    rest, test = train_test_split(torch.arange(len(y)), test_size=0.3, stratify=y, random_state=0)
    train, valid = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=0)
    rows = {"train": train, "valid": valid, "test": test}
    x = (x - x[train].mean(0)) / x[train].std(0)  # standardised by what the training rows say

    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        chosen = rows[split]
        if split == "train":  # the order is a function of the epoch alone, so a run can be repeated
            chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(epoch))]
        for part in chosen.split(32):
            yield Batch(x[part], y[part])

    return Task(
        name="wine",
        build=net,
        batches=batches,
        loss=nn.CrossEntropyLoss(reduction="none"),
        metrics={"accuracy": lambda outputs, targets: (outputs.argmax(-1) == targets).float()},
        classes=tuple(map(str, data.target_names)),
        features=tuple(data.feature_names),
    )

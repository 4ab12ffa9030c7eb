"""A small task of classes: normal clouds around random centres."""

from __future__ import annotations

import torch
from torch import nn

from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.task import SPLITS, Task


def blobs(examples: int = 1200, classes: int = 4) -> Task:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 20, generator=g) * 0.9
    y = {split: torch.arange(examples) % classes for split in SPLITS}
    x = {split: centres[y[split]] + torch.randn(examples, 20, generator=g) for split in SPLITS}
    return Task(
        "blobs",
        lambda: nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, classes)),
        Examples(x, y, 64, 0),
        cross_entropy,
        {"accuracy": accuracy},
    )

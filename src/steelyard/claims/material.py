"""What several checks need: the digits without augmentation, and small networks trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steelyard.learn.run import train
from steelyard.learn.task import Split, Task
from steelyard.learn.tasks import task


def digits(model: str = "mlp", **options: Any) -> Task:
    """The built-in task, its training images as they are."""
    return task("digits", model=model, augment=False, **options)


def trained(data: Task, epochs: int, seed: int = 0, rate: float = 3e-3) -> nn.Module:
    """A new model of the task after `epochs`."""
    return train(data, epochs=epochs, seed=seed, rate=rate, progress=False).model


def inputs_of(data: Task, split: Split) -> Tensor:
    """All inputs of a split: (examples, ...)."""
    return torch.cat([batch.inputs for batch in data.batches(split, 0)])  # type: ignore[misc]

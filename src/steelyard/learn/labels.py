"""Targets that are no class numbers, told with the example: what losses of torch say without it.

Decides what a class number is. Knows nothing of losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # a target that does not count, as in torch's cross_entropy


def wrong_labels(outputs: Tensor, targets: Tensor, *, axis: int = 1, ignored: int = IGNORED) -> str:
    """Why targets are no class numbers for outputs with an axis of classes, and what to do; '' if they are.

    Targets have the shape of the outputs without that axis, else nothing is said.

    >>> wrong_labels(torch.zeros(2, 3), torch.tensor([0, 3]))
    'the targets have the labels 3, the first in example 1 of the batch; the model has outputs for ...'
    """
    if not outputs.ndim > 1 or outputs.movedim(axis, -1).shape[:-1] != targets.shape:
        return ""
    if targets.dtype != torch.int64:
        return wrong_type(targets)
    return out_of_range(targets, outputs.shape[axis], ignored)


def wrong_type(targets: Tensor) -> str:
    """What is said of targets that are no class numbers by their type."""
    kind = str(targets.dtype).removeprefix("torch.")
    remedy = "targets.long() for classes, or for numbers a loss such as mse and a model with one output"
    return f"the targets are {kind}, and class numbers are int64: give {remedy}"


def out_of_range(targets: Tensor, classes: int, ignored: int = IGNORED) -> str:
    """What is said of class numbers of which some are not from 0 to `classes` - 1; '' if all are."""
    wrong = ((targets < 0) & (targets != ignored)) | (targets >= classes)
    if not bool(wrong.any()):
        return ""
    labels = ", ".join(map(str, targets[wrong].unique().tolist()[:5]))
    row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
    return (f"the targets have the labels {labels}, the first in example {row} of the batch; the model has outputs for "
            f"the classes 0 to {classes - 1}: number the classes from 0, or give the model more outputs")  # fmt: skip

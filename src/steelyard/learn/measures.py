"""Losses and metrics: (outputs, targets) -> one number per example. Knows nothing of models or data."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from steelyard.errors import ModelError


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)[target] in nats; the mean over positions where an example has several.

    outputs: (examples, ..., classes) logits; targets: (examples, ...) class numbers. Raises ModelError for a target
    that is no class.
    """
    _match(outputs, targets)
    try:
        flat = functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction="none")
    except IndexError:
        classes = outputs.shape[-1]
        wrong = targets[(targets < 0) | (targets >= classes)].unique().tolist()
        raise ModelError(f"the targets have the labels {', '.join(map(str, wrong[:5]))}, the model's outputs are the "
                         f"classes 0 to {classes - 1}: number the classes from 0, or give the model more outputs"
                         ) from None  # fmt: skip
    return flat.reshape(targets.shape[0], -1).mean(1)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target, 0 elsewhere; the mean over positions where there are several."""
    _match(outputs, targets)
    hit = (outputs.argmax(-1) == targets).to(outputs.dtype)
    return hit.reshape(targets.shape[0], -1).mean(1)


def bits_per_character(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in bits."""
    return cross_entropy(outputs, targets) / math.log(2)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """(output - target)^2, the mean over outputs; outputs: (examples, outputs), targets: (examples,) or the same."""
    return _residual(outputs, targets).square().mean(1)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """|output - target|, the mean over outputs."""
    return _residual(outputs, targets).abs().mean(1)


def _residual(outputs: Tensor, targets: Tensor) -> Tensor:
    a, b = outputs.reshape(outputs.shape[0], -1), targets.reshape(targets.shape[0], -1)
    if a.shape != b.shape:
        raise ModelError(f"the model returns {tuple(outputs.shape)} for targets of {tuple(targets.shape)}")
    return a - b


def _match(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape[:-1] != targets.shape:
        raise ModelError(
            f"the model returns {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: "
            "expected one more axis, the classes"
        )

"""Losses and metrics: (outputs, targets) -> one number per example. Knows nothing of models or data."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.learn.labels import IGNORED, wrong_labels


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)[target] in nats; the mean over positions where an example has several.

    outputs: (examples, ..., classes) logits; targets: (examples, ...) class numbers, or -100 at a position that does
    not count. Raises ModelError for a target that is no class, with its example.
    """
    _match(outputs, targets)
    try:
        flat = functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction="none")
    except (IndexError, RuntimeError) as error:
        if found := wrong_labels(outputs, targets, axis=-1):
            raise ModelError(found) from error
        raise
    return _mean(flat, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target, 0 elsewhere; the mean over positions where there are several.

    Positions with the target -100 do not count.
    """
    _match(outputs, targets)
    return _mean((outputs.argmax(-1) == targets).to(outputs.dtype), targets)


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


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    """For each example the mean over the positions that count; values are 0 at the others."""
    values = values.reshape(targets.shape[0], -1)
    if targets.ndim == 1 or not (ignored := targets.reshape(targets.shape[0], -1) == IGNORED).any():
        return values.mean(1)
    return values.sum(1) / (~ignored).sum(1).clamp_min(1)


def _match(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape[:-1] != targets.shape:
        raise ModelError(
            f"the model returns {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: "
            "expected one more axis, the classes"
        )

"""A model that is looked at, or started, and left as it was: parameters where it fails, and all else in any case.

Knows nothing of what is done to the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Within the block parameters may change; where it fails, they are as before. All else is as `unmoved` says."""
    before: list[tuple[Tensor, Tensor]] = [(p.detach(), p.detach().clone()) for p in model.parameters()]
    with unmoved(model), torch.inference_mode(False):
        try:
            yield
        except BaseException:
            for now, then in before:
                if not torch.equal(now, then):
                    now.copy_(then)
            raise


@contextmanager
def unfrozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block all of these have gradients; after it those that were frozen are so again."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """After the block buffers, the modes of all layers and the random numbers of torch, numpy and Python are as before.

    A buffer that was replaced by another tensor is the old one again. Within it autocast is off: its cache of cast
    weights would hide that they change.
    """
    import numpy as np

    buffers = [(layer, name, b, _copy(b)) for layer in model.modules() for name, b in layer._buffers.items()]
    modes = {layer: layer.training for layer in model.modules()}
    chance = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), _full_precision():
            yield
    finally:
        random.setstate(chance[0])
        np.random.set_state(chance[1])
        for layer, mode in modes.items():
            layer.training = mode
        with torch.no_grad():
            for layer, name, buffer, values in buffers:
                layer._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)


@contextmanager
def _full_precision() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _copy(buffer: Tensor | None) -> Tensor | None:
    """The values of a buffer; None where there are none yet."""
    if buffer is None or isinstance(buffer, nn.parameter.UninitializedTensorMixin):
        return None
    return buffer.detach().clone()

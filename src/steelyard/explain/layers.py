"""The layers of a model by name, and what goes into one and comes out of it while the model runs.

Decides how a model is called and watched; knows nothing of tasks, losses or what a layer means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError

# Layers whose output is a sum of weights times inputs, in whole or in parts.
WEIGHTED = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Call:
    """One call of one layer: what it was given and what it returned."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer called `name` in ``model.named_modules()``; raises UnknownNameError with the nearest name."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise UnknownNameError("layer", name, [n for n in modules if n])
    return modules[name]


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply inputs by weights, by name, in the order of registration."""
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) and n)
    return {n: m for n, m in model.named_modules() if isinstance(m, WEIGHTED) and not n.startswith(inside or ("\0",))}


def forward(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs; a tuple of inputs is several arguments."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every layer's own mode is restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path calls no layer, so nothing could be watched
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def record(model: nn.Module, inputs: Any, names: Iterable[str]) -> dict[str, Call]:
    """The first call of each named layer in one forward pass, without gradients and in evaluation mode.

    Raises UnknownNameError for a layer that is not there and ModelError for one that the pass does not reach.
    """
    layers = {name: find_layer(model, name) for name in names}
    calls: dict[str, Call] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in calls:
                calls[name] = Call(layer, _copied(args), _copied(kwargs), _copied(output))

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in layers if name not in calls]
    if missed:
        raise ModelError(f"the layer {missed[0]!r} is not called when the model runs on these inputs")
    return calls


def _copied(value: Any) -> Any:
    """Tensors cloned, because a later in-place operation (ReLU(inplace=True)) would change them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(v) for v in value)
    return value

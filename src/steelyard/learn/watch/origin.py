"""Where numbers stop being finite: the first layer, found by running the model once more on the batch that showed it.

Decides how the first place is found, forwards and then backwards. The model's buffers and torch's generators are as
before afterwards. Knows nothing of logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.learn.gauges import plain_name
from steelyard.learn.passage import tensors_of


@dataclass
class _Calls:
    """The modules without modules inside, in the order in which they ran, and the first one that broke."""

    order: list[str] = field(default_factory=list)
    first: tuple[str, str] | None = None


@torch.no_grad()
def origin(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """The first layer at which a number is not finite, and how: call it while the weights are those of the batch.

    Returns the layer's name and what is wrong there; the name is "inputs" for the batch itself, and "loss" where the
    model and its gradients are finite up to its end. What breaks between two layers is of the one that ran before.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with torch.no_grad(): _ = model[1].weight.fill_(torch.nan)
    >>> origin(model, (torch.ones(1, 2),), {})
    ('1', 'its weight holds numbers that are not finite')
    """
    if not all(map(_finite, tensors_of((args, kwargs)))):
        return "inputs", "the inputs of the batch hold numbers that are not finite"
    calls = _Calls()
    with _untouched(model), _hooked(model, calls):
        model(*args, **kwargs)
    if calls.first is not None:
        return calls.first
    broken = {layer for layer, module in _layers(model) if not all(map(_finite, _gradients(module)))}
    last = next((name for name in reversed(calls.order) if name in broken), None)
    learning = [name for name in calls.order if any(True for _ in _gradients(dict(_layers(model))[name]))]
    after = calls.order[len(calls.order) - calls.order[::-1].index(last) :] if last is not None else calls.order
    breaking = _breaking(model, args, kwargs, after)
    if breaking is not None:
        return breaking, "its derivative is the first that is not finite on the way back; its inputs and outputs are"
    if last is None or last == learning[-1]:
        return "loss", "all outputs of the model are finite, and the gradient of the loss is not"
    return last, "its gradient is the first that is not finite on the way back, after finite outputs of every layer"


def _breaking(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], layers: Sequence[str]) -> str | None:
    """The last of these layers whose own derivative, with respect to its inputs, is not finite; None if all are.

    It may be finite for the weights behind it, and break those before it: the root of zero, say.
    """
    found: list[str] = []

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, given: Any, _output: Any) -> None:
            inputs = [x.detach().requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()]
            if not inputs or len(inputs) != len(given):
                return
            with torch.enable_grad():  # + 0: a module that works in place may not do so on a leaf
                outputs = [x for x in tensors_of(module.forward(*(x + 0 for x in inputs))) if x.requires_grad]
                total = sum(x.sum() for x in outputs)
                slopes = torch.autograd.grad(total, inputs, allow_unused=True) if outputs else ()
            if not all(_finite(slope) for slope in slopes if slope is not None):
                found.append(name)

        return hook

    wanted = set(layers)
    handles = [m.register_forward_hook(watcher(name)) for name, m in _layers(model) if name in wanted]
    try:
        with _untouched(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have no modules inside but those that make their own weights, by their plain names."""
    for name, module in model.named_modules():
        inside = [child for n, child in module.named_children() if n != "parametrizations"]
        if (not inside or isinstance(module, nn.MultiheadAttention)) and ".parametrizations" not in f".{name}":
            yield plain_name(name), module


@contextmanager
def _hooked(model: nn.Module, calls: _Calls) -> Iterator[None]:
    handles = [module.register_forward_hook(_watcher(name, calls)) for name, module in _layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(name: str, calls: _Calls) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.order.append(name)
        if calls.first is None and not all(map(_finite, tensors_of(output))):
            calls.first = _first(name, module, args, calls.order[:-1])

    return hook


def _first(name: str, module: nn.Module, args: Any, before: Sequence[str]) -> tuple[str, str]:
    """Where and how it broke, at the first module whose outputs are not finite, after others that ran before."""
    broken = [n for n, p in module.named_parameters() if not _finite(p)]
    if broken:
        return name, f"its {plain_name(broken[0])} holds numbers that are not finite"
    if all(map(_finite, tensors_of(args))):
        return name, "its outputs are the first that are not finite, its weights and inputs are"
    if not before:
        return name, "its inputs are the first that are not finite: what the model does before it made them so"
    text = f"its outputs are finite, and what {name} is given, which runs next, is not"
    return before[-1], f"{text}: what the model does between the two made it so"


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    held = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=sorted({b.device.index for b, _ in held if b.device.type == "cuda"})):
            yield
    finally:
        for buffer, before in held:
            buffer.copy_(before)


def _gradients(module: nn.Module) -> Iterator[Tensor]:
    for p in module.parameters():
        if p.grad is not None:
            yield p.grad


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach().coalesce().values() if x.is_sparse else x.detach()).all())

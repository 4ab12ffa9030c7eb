"""The layers of a model by name, and what goes into one and comes out of it while the model runs.

Decides how a model is called and watched; knows nothing of tasks, losses or what a layer means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.evaluate import evaluating, unfused
from steelyard.learn.matrices import outermost
from steelyard.learn.passage import check_values
from steelyard.learn.task import Split, Task, apply, called, first_batch
from steelyard.learn.unharmed import unfrozen, unmoved


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


def forward(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs; a tuple of inputs is several arguments, a dict is keywords."""
    return called(model, inputs)


@contextmanager
def watching(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks (layer, args, kwargs, output) on the named layers, in evaluation mode, within the block.

    Raises UnknownNameError for a layer that is not there.
    """
    layers = {name: find_layer(model, name) for name in hooks}
    handles = [layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        with unfused(), evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients for every parameter, frozen or not; after it the model is as it was.

    Raises ModelError for parameters without values.
    """
    check_values(model)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    with unmoved(model), unfused(), torch.enable_grad(), unfrozen(floats):
        model.eval()
        yield


def record(model: nn.Module, inputs: Any, names: Iterable[str]) -> dict[str, Call]:
    """The first call of each named layer in one forward pass, without gradients and in evaluation mode.

    Raises UnknownNameError for a layer that is not there and ModelError for one that the pass does not reach.
    """
    names = list(names)
    calls: dict[str, Call] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in calls:
                calls[name] = Call(layer, _copied(args), _copied(kwargs), _copied(output))

        return hook

    with watching(model, {name: watch(name) for name in names}):
        forward(model, inputs)
    missed = [name for name in names if name not in calls]
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


def execution_order(model: nn.Module, inputs: Any) -> list[str]:
    """The names of the weighted layers, in the order in which a forward pass reaches them."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    with watching(model, {name: note(name) for name in outermost(model)}):
        forward(model, inputs)
    return list(order)


def collect(model: nn.Module, task: Task, layer: str, split: Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What goes into a layer, what it returns, the model's outputs and the targets, over a split in evaluation mode.

    Raises ModelError for an empty split or a layer that is not called once for each batch.
    """
    first_batch(task, split)
    into: list[Tensor] = []
    out: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        into.append(args[0].detach().clone())
        out.append(output.detach().clone())

    results, targets = [], []
    with watching(model, {layer: hook}):
        for batch in task.batches(split, 0):
            results.append(apply(model, batch))
            targets.append(batch.targets)
    if len(into) != len(results):
        raise ModelError(
            f"the layer {layer!r} is called {len(into)} times for {len(results)} batches, expected once each"
        )
    return torch.cat(into), torch.cat(out), torch.cat(results), torch.cat(targets)

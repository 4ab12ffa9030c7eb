"""Which axes of which parameters grow with the width of a model.

From a factory: by the shapes at two widths, which never need memory. From one model: by what feeds what on a batch.
Decides what counts as width; knows nothing of rates or starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.calling import calling
from steelyard.learn.matrices import CONVOLUTIONS, RECURRENT, TRANSPOSED, layers, parameter_axes
from steelyard.learn.seeding import derive, seeded
from steelyard.learn.task import called
from steelyard.learn.unharmed import unfrozen

GROUPED = (*CONVOLUTIONS, *TRANSPOSED)
Factory = Callable[[int], nn.Module]  # width -> a model


@dataclass(frozen=True)
class Growth:
    """The shape of one parameter beside the one it has at the base width."""

    shape: tuple[int, ...]
    base: tuple[int, ...]
    axes: tuple[int, ...]  # those that grow
    ratios: tuple[float, ...]  # by what, for each axis; 1 for those that do not grow

    def ratio(self, axes: Iterable[int]) -> float:
        """By how much the product of these axes has grown."""
        return math.prod(self.ratios[axis] for axis in axes)


def built(factory: Factory, width: int, seed: int) -> nn.Module:
    """The model of a width, from a seed; torch's random numbers are as before."""
    with seeded(derive(seed, "build")), calling(f"the factory, called with the width {width},"):
        model = factory(width)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the factory gives a {type(model).__name__} for the width {width}, expected a torch.nn.Module"
        )
    return model


def outlined(factory: Factory, width: int) -> nn.Module:
    """The model of a width without values, on the meta device; with values if its code cannot do without them."""
    try:
        with torch.random.fork_rng(), torch.device("meta"):
            model = factory(width)
    except (RuntimeError, NotImplementedError):  # it looks at values while it is built
        return built(factory, width, 0)
    return model if isinstance(model, nn.Module) else built(factory, width, 0)


def growth_of_factory(base: nn.Module, wider: nn.Module, model: nn.Module) -> dict[str, Growth]:
    """The growth of each parameter of `model`: axes in which `base` and `wider` differ grow, the others do not.

    Raises ModelError where the models differ in more than sizes, nothing grows, or a size that did not grow between
    the first two is another one in the third.
    """
    small, large, here = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (base, wider, model))
    for other in (large, here):
        for name in small.keys() ^ other.keys():
            raise ModelError(
                f"the factory must give the same parameters at every width, but {name!r} is there at some only: "
                "width may change sizes, never depth"
            )
    found = {}
    for name, shape in here.items():
        before, after = small[name], large[name]
        if not len(before) == len(after) == len(shape):
            raise ModelError(f"{name!r} has {len(before)} axes at one width and {len(shape)} at another")
        axes = tuple(i for i in range(len(shape)) if before[i] != after[i])
        for i, size in enumerate(shape):
            if i not in axes and size != before[i]:
                raise ModelError(
                    f"axis {i} of {name!r} is {before[i]} at two widths and {size} at this one: it neither grows with "
                    "width nor stays; choose another base"
                )
        found[name] = Growth(shape, before, axes, tuple(n / max(b, 1) for n, b in zip(shape, before, strict=True)))
    if not any(g.axes for g in found.values()):
        raise ModelError("nothing grows with width: the factory gives the same shapes for two widths")
    return found


def growth_of_model(model: nn.Module, arguments: tuple[Any, ...], base: int, width: int | None) -> dict[str, Growth]:
    """The growth of each parameter of one model, by what feeds what when it runs.

    The inputs of a layer grow if another layer with weights feeds it, its outputs if they feed another one; what the
    task gives and what the model returns does not, nor does an axis of size 1. All hidden sizes are taken to grow in
    proportion. In biases, gains and free parameters the last axis that has a hidden size grows. `width` None: the
    smallest hidden size.

    Raises ModelError if the model fails, or has no hidden layer.
    """
    growing = _growing(model, arguments)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = {names[id(m.weight)] for m in model.modules() if isinstance(m, GROUPED) and m.groups > 1}
    sizes = {  # axis 1 of a grouped convolution has the size of one group
        shapes[name][axis] for name, axes in growing.items() for axis in axes if axis != 1 or name not in grouped
    }
    if not sizes:
        raise ModelError("no hidden layer: no layer with weights feeds another one on this batch")
    ratio = (min(sizes) if width is None else width) / base
    found = {}
    for name, shape in shapes.items():
        axes = growing.get(name)
        if axes is None:
            axes = tuple(i for i, size in enumerate(shape) if size in sizes)[-1:]
        ratios = tuple(ratio if i in axes else 1.0 for i in range(len(shape)))
        small = tuple(max(round(n / r), 1) for n, r in zip(shape, ratios, strict=True))
        found[name] = Growth(shape, small, axes, ratios)
    return found


def _growing(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """The growing axes of every matrix, by the name of its parameter; those of layers that do not run do not grow."""
    found = layers(model)
    matrices = {id(getattr(layer, leaf)) for layer in found.values() for leaf in parameter_axes(layer)}
    inputs = _inputs(model, found, matrices, arguments)
    feeding = set().union(*inputs.values()) if inputs else set()
    names = {id(p): name for name, p in model.named_parameters()}
    growing: dict[str, set[int]] = {}
    rows: set[tuple[str, int]] = set()  # of tables: there are as many as the task has words
    for name, layer in found.items():
        if name not in inputs:
            continue
        for leaf, (output, sums) in parameter_axes(layer).items():
            weight = getattr(layer, leaf)
            axes = growing.setdefault(names[id(weight)], set())
            if not sums:
                rows.add((names[id(weight)], 1 - output))
            inner = isinstance(layer, (*RECURRENT, nn.MultiheadAttention))  # what it gives feeds itself
            if inner or id(weight) in feeding:
                axes.add(output)
            if inputs[name] or (isinstance(layer, RECURRENT) and not _first(leaf)):
                axes.update(sums)
        if isinstance(layer, nn.MultiheadAttention):  # its last layer is never called as one
            axes = growing.setdefault(names[id(layer.out_proj.weight)], set())
            axes |= {0, 1} if id(layer.out_proj.weight) in feeding else {1}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return {
        name: tuple(sorted(a for a in axes if shapes[name][a] > 1 and (name, a) not in rows))
        for name, axes in growing.items()
    }


def _inputs(
    model: nn.Module, found: Mapping[str, nn.Module], matrices: set[int], arguments: tuple[Any, ...]
) -> dict[str, set[int]]:
    """Which matrices (by id) feed each layer that runs, all calls together."""
    fed: dict[str, set[int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            behind = (id(p) for x in tensors((args, options)) for p in parameters_behind(x))
            fed.setdefault(name, set()).update(matrices.intersection(behind))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in found.items()]
    try:
        run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return fed


def run(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """One pass with the graph of all parameters, frozen ones too; raises ModelError if the model fails."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    with unfrozen(floats), torch.enable_grad(), calling(f"{type(model).__name__}, called with the batch,"):
        called(model, arguments)


def parameters_behind(x: Tensor) -> Iterator[Tensor]:
    """Every parameter that a tensor depends on, by its graph."""
    seen: set[Any] = set()
    waiting = [x.grad_fn] if x.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        waiting.extend(after for after, _ in node.next_functions if after is not None)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _first(leaf: str) -> bool:
    """Whether a matrix of a recurrent layer multiplies what comes from outside."""
    return leaf == "weight_ih" or leaf.startswith("weight_ih_l0")

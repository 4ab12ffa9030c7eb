"""Functions that act on each element, tried on numbers: whether they do, whether they are linear, what they are called.

Decides nothing by a list of activations: what is one is measured. Knows single operations, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.learn.gain import NAMED, OTHERS, activation
from steelyard.learn.tracing import Operation, swap
from steelyard.learn.unharmed import unmoved

# Those of several tensors; what acts on one tensor is tried.
COMBINE = {"add", "sub", "rsub", "mul", "div", "rdiv", "truediv", "true_divide", "pow", "rpow", "where", "maximum"}
COMBINE |= {"minimum", "gt", "lt", "ge", "le", "eq", "ne", "lerp", "addcmul", "addcdiv", "logical_and", "logical_or"}
SHAPES = ("view", "reshape", "getitem", "get", "clone", "detach", "contiguous", "to", "float", "double", "half", "type")
CHANCE = ("drop", "rand", "bernoulli", "norm", "softmax", "pool")  # in evaluation mode a dropout looks like nothing
POINTS = 48


def elementwise(op: Operation) -> bool:
    """Whether each element of the result depends on the same element of what comes in, and on constants alone."""
    if (
        op.call is None
        or not op.sources
        or op.name in SHAPES
        or op.name.lower() == "prelu"
        or any(word in op.name.lower() for word in CHANCE)
    ):
        return False
    if any(isinstance(a, Tensor) and a.numel() > 1 for a in (*op.args, *op.kwargs.values())):
        return False
    if len(op.sources) > 1:
        return op.name in COMBINE
    return _acts_on_elements(partial(_alone, op))


def composed(point: Operation, last: Operation, region: Sequence[Operation]) -> tuple[Callable[[Tensor], Tensor], str]:
    """What the operations of a region make of `point`, as one function, and its name."""
    needed = {last}
    for op in reversed(region):
        if op in needed:
            needed.update(op.sources)
    steps = [op for op in region if op in needed]

    def function(z: Tensor) -> Tensor:
        values = {point: z}
        for op in steps:
            values[op] = _applied(op, values)
        return values[last]

    return function, _name(function, steps)


def affine(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of each element is a z + b."""
    z = _points()
    zero, one, many = (_tried(function, x) for x in (torch.zeros_like(z), torch.ones_like(z), z))
    if zero is None or one is None or many is None or not many.is_floating_point():
        return True  # a mask, say: nothing that a signal goes through
    return bool(torch.allclose(many, zero + (one - zero) * z, rtol=1e-6, atol=1e-9))


def vanishing(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the function of zero is zero."""
    found = _tried(function, torch.zeros(POINTS, dtype=torch.float64))
    return found is not None and bool((found.abs() < 1e-9).all())


def _applied(op: Operation, values: dict[Operation, Tensor]) -> Any:
    """The result of one operation on other numbers, which it cannot change in place."""
    args, kwargs = swap((op.args, dict(op.kwargs)), lambda a: values[a].clone() if isinstance(a, Operation) else a)
    if isinstance(op.call, nn.Module):
        with unmoved(op.call):
            for module in op.call.modules():
                module.training = False
            return op.call(*args, **kwargs)
    assert op.call is not None
    return op.call(*args, **kwargs)


def _acts_on_elements(function: Callable[[Tensor], Tensor]) -> bool:
    z = _points()
    whole, turned, one = _tried(function, z), _tried(function, z.flip(0)), _tried(function, z[:1])
    if whole is None or turned is None or one is None:
        return False
    whole, turned, one = whole.double(), turned.double(), one.double()
    return all(torch.allclose(a, b, equal_nan=True) for a, b in ((whole, turned.flip(0)), (whole[:1], one)))


def _tried(function: Callable[[Tensor], Tensor], z: Tensor) -> Any:
    """What it gives for some numbers; None where it does not take them, or gives another shape."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            found = function(z)
    except Exception:  # noqa: BLE001 - a function may refuse the shape for any reason of its own
        return None
    return found if isinstance(found, Tensor) and found.shape == z.shape else None


def _points() -> Tensor:
    """Unordered numbers on both sides of 0, some of them far from it."""
    return torch.randn(POINTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


@cache
def _known() -> dict[str, Tensor]:
    z = _points()
    return {name: activation(name)(z) for name in (*NAMED, *OTHERS) if name not in ("linear", "identity")}


def _name(function: Callable[[Tensor], Tensor], steps: Sequence[Operation]) -> str:
    """The name of a known activation with the same values, else those of the operations that are not linear."""
    found = _tried(function, _points())
    if found is None:
        return "?"
    for name, values in _known().items():
        if torch.allclose(found, values, rtol=1e-6, atol=1e-9):
            return name
    bent = [op.name for op in steps if len(op.sources) > 1 or not affine(partial(_alone, op))]
    return " of ".join(reversed(bent[-3:])) or "linear"


def _alone(op: Operation, z: Tensor) -> Any:
    return _applied(op, {op.sources[0]: z})

"""What follows each layer in the order of execution: which activation, which norm, and where residual branches end.

Decides what lies between a layer and its activation (norms, dropout, pooling, other shapes, sums), what is a
residual branch, and that a function is an activation if it acts on each element and is not linear, whatever its name.
Knows nothing of how weights are started.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.branches import Branch, branches
from steelyard.learn.gain import activation
from steelyard.learn.kinds import kind
from steelyard.learn.matrices import RECURRENT
from steelyard.learn.pointwise import affine, composed, elementwise
from steelyard.learn.task import batch_arguments
from steelyard.learn.tracing import Graph, Operation, record, symbolic

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a layer stands."""

    layer: str  # its name in the model
    order: int  # of its first call among all layers, from 1
    calls: int
    activation: Activation | None = None  # that follows its first call, on tensors of any shape; None: nothing does
    name: str = "linear"  # of the activation: 'relu', a class, 'gates' inside of a layer, 'attention'
    between: tuple[str, ...] = ()  # what lies before the activation: norm, dropout, pool, concatenate, add
    ends_branch: bool = False  # its output is added, as the last of a residual branch
    branch_norm: str = ""  # the norm module between it and that sum

    @property
    def norm(self) -> bool:
        """Whether a norm follows before the activation: the scale of the layer does not matter to it."""
        return "norm" in self.between


@dataclass(frozen=True)
class Flow:
    """The layers in the order of execution."""

    layers: Mapping[str, Place]
    branches: tuple[Branch, ...] = ()  # residual ones, each time that they run
    unknown: str = ""  # why nothing is known; '' if it is

    @property
    def additions(self) -> int:
        """How often a residual branch is added to what by-passes it, in one pass."""
        return len(self.branches)


def flow(model: nn.Module, batch: Any = None) -> Flow:
    """What follows each layer with weights that is executed, in the order of execution.

    By one forward pass over `batch` (a tensor, a tuple of arguments or a Batch), in evaluation mode; the model is
    left as it was. Without a batch, by torch.fx; where that cannot follow the model, ``unknown`` says why.

    An activation is found whatever it is: a function, a module (also one of yours that has no layers inside), in
    place, or written out (``x * torch.sigmoid(x)`` is the SiLU). Of a layer that is called several times the first
    call counts. A sum is residual if one side of it by-passes the other: it comes from an earlier tensor with fewer
    layers on its way, at most one (that of a projection shortcut); `steelyard.learn.branches` has the branches.

    Raises ModelError if the model fails on the batch.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    >>> [(p.layer, p.name, p.between) for p in flow(net, torch.zeros(1, 4)).layers.values()]
    [('0', 'gelu', ('norm',)), ('3', 'linear', ())]
    """
    try:
        graph = symbolic(model) if batch is None else record(model, batch_arguments(batch))
    except ModelError as error:
        if batch is None:
            return Flow({}, unknown=str(error))
        raise
    return flow_of(graph)


def flow_of(graph: Graph) -> Flow:
    """The same of a graph that was recorded already."""
    found = branches(graph)
    ends: dict[str, str] = {}
    for branch in found:
        ends |= branch.ends
    places: dict[str, Place] = {}
    for order, (name, mine) in enumerate(graph.calls().items(), 1):
        places[name] = Place(name, order, len(mine), *_follow(mine[0]), name in ends, ends.get(name, ""))
    return Flow(places, tuple(found))


def _follow(start: Operation) -> tuple[Activation | None, str, tuple[str, ...]]:
    """The activation after a layer, its name, and what lies between: of what uses its output, the earliest."""
    if isinstance(start.call, RECURRENT):
        shape = getattr(start.call, "nonlinearity", "")  # of plain cells; others have gates
        return (activation(shape), shape, ()) if shape else (None, "gates", ())
    if isinstance(start.call, nn.MultiheadAttention):
        return None, "attention", ()
    waiting: list[tuple[int, int, Operation, tuple[str, ...], tuple[Activation, str] | None]] = []
    seen: set[Operation] = set()

    def go_on(point: Operation, between: tuple[str, ...]) -> None:
        region = _region(point)
        for op in (point, *region):
            if op is not point and op.uses and all(use in region for use in op.uses):
                continue
            if op is not point and not affine((met := _composed(point, op, region))[0]):
                heapq.heappush(waiting, (op.order, len(seen), op, between, met))
                continue
            for use in op.uses:
                if use not in region:
                    heapq.heappush(waiting, (use.order, len(seen), use, between, None))

    go_on(start, ())
    while waiting:
        _, _, op, between, met = heapq.heappop(waiting)
        if met is not None:
            return met[0], met[1], between
        if op in seen:
            continue
        seen.add(op)
        if (module := _activation_module(op)) is not None:
            return module[0], module[1], between
        what = kind(op)
        if op.layer is not None or what == "end":
            break
        go_on(op, (*between, what) if what else between)
    return None, "linear", ()


def _activation_module(op: Operation) -> tuple[Activation, str] | None:
    """A parametrised rectifier has a slope for each channel: their mean."""
    slopes = op.call.weight if isinstance(op.call, nn.PReLU) else None
    if slopes is None and op.name == "prelu":
        slopes = next((a for a in (*op.args[1:], *op.kwargs.values()) if isinstance(a, Tensor)), None)
    if slopes is None:
        return None
    slope = float(slopes.detach().double().mean())
    return (lambda z: nn.functional.leaky_relu(z, slope)), "prelu"


def _region(point: Operation) -> list[Operation]:
    """The operations that make each element of their result of the same element of `point`, in order."""
    region: list[Operation] = []
    waiting = [(use.order, use) for use in point.uses]
    heapq.heapify(waiting)
    while waiting:
        _, op = heapq.heappop(waiting)
        if op in region or op.layer is not None or not all(s is point or s in region for s in op.sources):
            continue
        if elementwise(op):
            region.append(op)
            for use in op.uses:
                heapq.heappush(waiting, (use.order, use))
    return region


def _composed(point: Operation, last: Operation, region: list[Operation]) -> tuple[Activation, str]:
    return composed(point, last, [op for op in region if op.order <= last.order])

"""What follows each layer in the order of execution: which activation, which norm, and where residual branches end.

Decides what lies between a layer and its activation (norms, dropout, pooling, other shapes, sums), what is a
residual branch, and that a function is an activation if it acts on each element and is not linear, whatever its name.
Knows nothing of how weights are started.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.matrices import RECURRENT
from steelyard.learn.pointwise import affine, composed, elementwise, named, vanishing
from steelyard.learn.task import Batch
from steelyard.learn.tracing import Graph, Operation, record, symbolic

Activation = Callable[[Tensor], Tensor]

KINDS = {  # of operations that let a signal through, by what their names contain
    "norm": ("norm", "normalize"),
    "dropout": ("drop",),
    "pool": ("pool", "mean", "sum", "amax", "interpolate", "upsample"),
    "concatenate": ("cat", "concat", "stack", "hstack", "vstack"),
}
ENDS = ("softmax", "softmin", "gumbel", "cross_entropy", "logsumexp", "glu", "attention")  # what is no activation
PRODUCTS = ("mul", "matmul", "rmatmul", "bmm", "mm", "einsum", "div", "baddbmm", "bilinear", "lerp", "addcmul")
SUMS = ("add", "sub", "rsub")


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
    additions: int = 0  # of a residual branch to what by-passes it, in one pass
    unknown: str = ""  # why nothing is known; '' if it is


def flow(model: nn.Module, batch: Any = None) -> Flow:
    """What follows each layer with weights that is executed, in the order of execution.

    By one forward pass over `batch` (a tensor, a tuple of arguments or a Batch), in evaluation mode; the model is
    left as it was. Without a batch, by torch.fx; where that cannot follow the model, ``unknown`` says why.

    An activation is found whatever it is: a function, a module (also one of yours that has no layers inside), in
    place, or written out (``x * torch.sigmoid(x)`` is the SiLU). Of a layer that is called several times the first
    call counts. A sum is residual if one side of it by-passes the other: it comes from an earlier tensor with fewer
    layers on its way, at most one (that of a projection shortcut).

    Raises ModelError if the model fails on the batch.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    >>> [(p.layer, p.name, p.between) for p in flow(net, torch.zeros(1, 4)).layers.values()]
    [('0', 'gelu', ('norm',)), ('3', 'linear', ())]
    """
    try:
        graph = symbolic(model) if batch is None else record(model, _arguments(batch))
    except ModelError as error:
        if batch is None:
            return Flow({}, unknown=str(error))
        raise
    ends, additions = _branches(graph)
    places: dict[str, Place] = {}
    calls = [op for op in graph.operations if op.layer]
    names = list(dict.fromkeys(op.layer for op in calls))
    for order, name in enumerate(names, 1):
        mine = [op for op in calls if op.layer == name]
        branch = [ends[op] for op in mine if op in ends]
        found = _follow(mine[0])
        places[name] = Place(name, order, len(mine), *found, bool(branch), next(filter(None, branch), ""))
    return Flow(places, additions)


def _arguments(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, Batch):
        return batch.arguments
    return batch if type(batch) is tuple else (batch,)


def _follow(start: Operation) -> tuple[Activation | None, str, tuple[str, ...]]:
    """The activation after a layer, its name, and what lies between: of what uses its output, the earliest."""
    if isinstance(start.call, RECURRENT):
        kind = getattr(start.call, "nonlinearity", "")  # of plain cells; others have gates
        return (named(kind), kind, ()) if kind else (None, "gates", ())
    if isinstance(start.call, nn.MultiheadAttention):
        return None, "attention", ()
    waiting: list[tuple[int, int, Operation, tuple[str, ...], tuple[Activation, str] | None]] = []
    seen: set[Operation] = set()

    def go_on(point: Operation, between: tuple[str, ...]) -> None:
        region = _region(point)
        for op in (point, *region):
            if op is not point and op.uses and all(use in region for use in op.uses):
                continue
            function, label = _composed(point, op, region)
            if op is not point and not affine(function):
                heapq.heappush(waiting, (op.order, len(seen), op, between, (function, label)))
                continue
            for use in op.uses:
                if use not in region:
                    heapq.heappush(waiting, (use.order, len(seen), use, between, None))

    go_on(start, ())
    while waiting:
        _, _, op, between, activation = heapq.heappop(waiting)
        if activation is not None:
            return activation[0], activation[1], between
        if op in seen:
            continue
        seen.add(op)
        if (module := _activation_module(op)) is not None:
            return module[0], module[1], between
        kind = _kind(op)
        if op.layer or kind == "end":
            break
        go_on(op, (*between, kind) if kind else between)
    return None, "linear", ()


def _kind(op: Operation) -> str:
    """What an operation that acts on more than single elements is; 'end' for one that lets no signal through."""
    name = op.name.lower()
    if any(part in name for part in ENDS) or _holds_matrices(op):
        return "end"
    if name in PRODUCTS and (len(op.sources) > 1 or name not in ("mul", "div")):
        return "end"
    if name in SUMS:
        return "add" if len(op.sources) > 1 else ""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "")


def _holds_matrices(op: Operation) -> bool:
    """Whether weights that belong to no known layer multiply here."""
    if isinstance(op.call, nn.Module):
        return any(p.ndim >= 2 and min(p.squeeze().shape, default=1) > 1 and p.squeeze().ndim >= 2
                   for p in op.call.parameters())  # fmt: skip
    return op.name == "linear" or op.name.startswith("conv")


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
        if op in region or op.layer or not all(s is point or s in region for s in op.sources):
            continue
        if elementwise(op):
            region.append(op)
            for use in op.uses:
                heapq.heappush(waiting, (use.order, use))
    return region


def _composed(point: Operation, last: Operation, region: list[Operation]) -> tuple[Activation, str]:
    return composed(point, last, [op for op in region if op.order <= last.order])


def _branches(graph: Graph) -> tuple[dict[Operation, str], int]:
    """The calls that end a residual branch, with the norm before the sum, and the number of residual sums."""
    ends: dict[Operation, str] = {}
    additions = 0
    for op in graph.operations:
        if op.name in SUMS and len(op.sources) == 2:
            found = dict(_branch(*op.sources))
            additions += bool(found)
            ends.update(found)
    return ends, additions


def _branch(first: Operation, second: Operation) -> Iterator[tuple[Operation, str]]:
    """The last layers of that summand which the other one by-passes; none if neither does.

    Goes back from both, the latest operation first, with the least number of layers on a way to either. A summand is
    by-passed from the first operation met that feeds the other one with fewer layers: with none, or else with one.
    """
    fewest: tuple[dict[Operation, int], dict[Operation, int]] = ({first: 0}, {second: 0})
    waiting = [(-op.order, op) for op in (first, second)]
    heapq.heapify(waiting)
    found = None  # the side that is a branch
    while waiting and found is None:
        _, op = heapq.heappop(waiting)
        counts = [side.get(op) for side in fewest]
        if None not in counts and 0 in counts and counts[0] != counts[1]:
            found = int(counts[0] == 0)
        for source in op.sources:
            if not any(source in side for side in fewest):
                heapq.heappush(waiting, (-source.order, source))
            for side, count in zip(fewest, counts, strict=True):
                if count is not None:
                    side[source] = min(side.get(source, count + 1), count + bool(op.layer))
    if found is None:  # a shortcut with a layer of its own, beside a branch of several
        common = [op for op in fewest[0] if op in fewest[1]]
        pairs = [(fewest[0][op], fewest[1][op]) for op in common]
        found = next((int(a == 1) for a, b in pairs if min(a, b) == 1 and a != b), None)
    if found is not None:
        yield from _last_layers((first, second)[found], fewest[1 - found])


def _last_layers(side: Operation, other: Mapping[Operation, int]) -> Iterator[tuple[Operation, str]]:
    """The layers whose zero makes this summand zero, met on the way back, with the norm module that was passed."""
    waiting, seen = [(side, "")], set()
    while waiting:
        op, norm = waiting.pop()
        if op in seen or other.get(op) == 0:
            continue
        seen.add(op)
        if op.layer:
            yield op, norm
            continue
        kind = _kind(op)
        if (kind == "end" and op.name not in ("mul", "matmul", "bmm", "einsum")) or not _keeps_zero(op):
            continue
        norm = norm or (op.module if kind == "norm" else "")
        waiting.extend((source, norm) for source in op.sources)


def _keeps_zero(op: Operation) -> bool:
    return not elementwise(op) or len(op.sources) > 1 or vanishing(composed(op.sources[0], op, [op])[0])

"""Residual branches: what is added to a tensor that by-passes it, which layers scale it, and which of them come last.

Decides which side of a sum is the branch, and what carries a signal to the sum: what goes through a softmax or the
sigmoid of a gate does not.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from steelyard.learn.kinds import SUMS, kind
from steelyard.learn.pointwise import composed, elementwise, vanishing
from steelyard.learn.tracing import Graph, Operation

BILINEAR = ("mul", "matmul", "bmm", "einsum")  # zero where one of the sides is


@dataclass(frozen=True)
class Branch:
    """One sum of a branch and what by-passes it."""

    layers: tuple[str, ...]  # whose outputs reach the sum, in the order of execution
    ends: Mapping[str, str]  # the last of them, each with the norm module between it and the sum, '' for none
    depth: int  # layers on the longest way through the branch
    stream: int  # sums that lie on one stream have the same number, from 0
    crosses: bool  # it carries what was there before its stream: like the attention of a decoder to its encoder


@dataclass
class _Side:
    """What a walk back from a sum found out about it."""

    branch: Operation  # the summand
    by_passed: Operation  # from where the other summand comes
    other: Mapping[Operation, int]  # what feeds the other summand, as far as the walk went
    carried: set[Operation] = field(default_factory=set)
    ends: dict[str, str] = field(default_factory=dict)
    crosses: bool = False


def branches(graph: Graph) -> list[Branch]:
    """The residual branches of a pass, in the order of their sums; a branch that runs twice is there twice.

    A sum is residual if one side comes from an earlier operation with fewer layers on its way than the other side,
    with none or with one (a projection shortcut), and if the other side ends in layers whose zero makes it zero.
    """
    found = []
    streams: dict[Operation, int] = {}
    for op in graph.operations:
        if op.name not in SUMS or len(op.sources) != 2:
            continue
        side = _branch_of(*op.sources)
        if side is None:
            continue
        side.ends = dict(_last_layers(side))
        if not side.ends:
            continue
        _carry(side)
        earlier = _sum_before(side.by_passed, streams)
        streams[op] = len(set(streams.values())) if earlier is None else earlier
        layers = [o.layer for o in sorted(side.carried, key=lambda o: o.order) if o.layer is not None]
        names = tuple(dict.fromkeys(layers))
        found.append(Branch(names, side.ends, _depth(side.carried), streams[op], side.crosses))
    return found


def _branch_of(first: Operation, second: Operation) -> _Side | None:
    """That summand which the other one by-passes; None if neither does.

    Goes back from both, the latest operation first, with the least number of layers on a way to either.
    """
    sides = (first, second)
    fewest: tuple[dict[Operation, int], dict[Operation, int]] = ({first: 0}, {second: 0})
    waiting = [(-op.order, op) for op in sides]
    heapq.heapify(waiting)
    shortcut: tuple[int, Operation] | None = None  # with a layer of its own, beside a branch of several
    while waiting:
        _, op = heapq.heappop(waiting)
        counts = [side.get(op) for side in fewest]
        a, b = counts
        if a is not None and b is not None and a != b:
            found = int(a < b)  # the side that is a branch
            if min(a, b) == 0:
                return _Side(sides[found], op, fewest[1 - found])
            if min(a, b) == 1 and shortcut is None:
                shortcut = found, op
        for source in op.sources:
            if not any(source in side for side in fewest):
                heapq.heappush(waiting, (-source.order, source))
            for side, count in zip(fewest, counts, strict=True):
                if count is not None:
                    side[source] = min(side.get(source, count + 1), count + (op.layer is not None))
    if shortcut is None:
        return None
    found, op = shortcut
    return _Side(sides[found], op, {o: n for o, n in fewest[1 - found].items() if o.order >= op.order})


def _last_layers(side: _Side) -> Iterator[tuple[str, str]]:
    """The layers whose zero makes the branch zero, met first on the way back, with the norm module that was passed."""
    waiting, seen = [(side.branch, "")], set()
    while waiting:
        op, norm = waiting.pop()
        if op in seen or op in side.other:
            continue
        seen.add(op)
        if op.layer is not None:
            yield op.layer, norm
            continue
        what = kind(op)
        if (what == "end" and op.name not in BILINEAR) or not _keeps_zero(op):
            continue
        norm = norm or (op.module if what == "norm" else "")
        waiting.extend((source, norm) for source in op.sources)


def _keeps_zero(op: Operation) -> bool:
    return not elementwise(op) or len(op.sources) > 1 or vanishing(composed(op.sources[0], op, [op])[0])


def _carry(side: _Side) -> None:
    """Collect what lies on the ways from where the branch begins to the sum."""
    waiting = [side.branch]
    while waiting:
        op = waiting.pop()
        if op in side.carried or op in side.other:
            continue
        if op.order < side.by_passed.order:
            side.crosses = True
            continue
        side.carried.add(op)
        waiting.extend(_carriers(op))


def _carriers(op: Operation) -> tuple[Operation, ...]:
    """Of what feeds an operation, whose scale reaches its result: the values of attention, no softmax and no gate."""
    if isinstance(op.call, nn.MultiheadAttention) or op.name == "scaled_dot_product_attention":
        values = op.args[2] if len(op.args) > 2 else op.kwargs.get("value")
        return (values,) if isinstance(values, Operation) else ()
    return () if "softmax" in op.name.lower() or not _keeps_zero(op) else op.sources


def _depth(carried: set[Operation]) -> int:
    depths: dict[Operation, int] = {}
    for op in sorted(carried, key=lambda o: o.order):
        depths[op] = (op.layer is not None) + max((depths.get(source, 0) for source in op.sources), default=0)
    return max(depths.values(), default=0)


def _sum_before(op: Operation, streams: Mapping[Operation, int]) -> int | None:
    """The stream of the last residual sum that reaches an operation without passing a layer."""
    waiting, seen = [op], set()
    while waiting:
        op = waiting.pop()
        if op in streams:
            return streams[op]
        if op not in seen and op.layer is None:
            seen.add(op)
            waiting.extend(op.sources)
    return None

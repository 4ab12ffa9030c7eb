"""Residual streams that nothing but norms reads: their own scale is free, and what it is decides how soon they learn.

Decides which layers write into such a stream, and which tables hold positions. Knows nothing of what a scale does.
"""

from __future__ import annotations

from torch import nn

from steelyard.learn.kinds import kind
from steelyard.learn.pointwise import elementwise
from steelyard.learn.tracing import Graph, Operation, tensors

INPUT = "\0"  # of the model, among the names of layers
CARRIES = ("", "add", "concatenate", "dropout")  # kinds of operations that hand a stream on as it is


def normed_streams(model: nn.Module, graph: Graph, ends: set[str]) -> set[str]:
    """The layers that write into residual streams which only norms read, up to the end of the model.

    `ends` are the last layers of residual branches: a stream is one only if there are some in it. What has a scale of
    its own must not write into it: inputs of the model, and constants that are none of its trainable parameters.
    """
    trained = {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad}
    streams: list[tuple[set[str], bool]] = []  # the writers, and whether norms alone read them
    for name, calls in graph.calls().items():
        found = [_read(call, graph, trained) for call in calls]
        carried = set().union(*(one for one, _ in found))
        streams.append(({name, *carried}, all(good for _, good in found)))
    joined = _joined(streams)
    return {name for names, good in joined if good and names & ends for name in names}


def position_tables(graph: Graph) -> set[str]:
    """The embeddings that are looked up at places that do not come from the data."""
    return {
        name
        for name, calls in graph.calls().items()
        if isinstance(calls[0].call, nn.Embedding) and not any(call.sources for call in calls)
    }


def _read(start: Operation, graph: Graph, trained: set[int]) -> tuple[set[str], bool]:
    """The other layers whose outputs meet that of a call in a sum, and whether norms alone read it."""
    beside: set[str] = set()
    good, waiting, seen = True, [start], {start}
    while waiting:
        op = waiting.pop()
        good = good and op not in graph.outputs and bool(op.uses)
        for use in op.uses:
            what = "end" if use.layer is not None else kind(use)
            if what == "norm":
                continue
            if what not in CARRIES or (not what and elementwise(use)) or _has_constants(use, trained):
                good = False
            elif use not in seen:
                seen.add(use)
                waiting.append(use)
                beside |= (made := _makers(use))
                good = good and INPUT not in made
    return beside - {INPUT}, good


def _has_constants(op: Operation, trained: set[int]) -> bool:
    """Whether numbers that no start may scale are added: a buffer, or what was computed of a parameter."""
    held = [t for t in tensors((op.args, op.kwargs)) if t.is_floating_point() and t.numel() > 1]
    return any(t.untyped_storage().data_ptr() not in trained for t in held)


def _makers(op: Operation) -> set[str]:
    """The layers whose outputs reach an operation without a norm or another layer in between, and INPUT."""
    found: set[str] = set()
    waiting, seen = list(op.sources), set()
    while waiting:
        before = waiting.pop()
        if before in seen:
            continue
        seen.add(before)
        if before.layer is not None:
            found.add(before.layer)
        elif before.call is None:
            found.add(INPUT)
        elif kind(before) != "norm":
            waiting.extend(before.sources)
    return found


def _joined(streams: list[tuple[set[str], bool]]) -> list[tuple[set[str], bool]]:
    """Sets that have a layer in common as one; it is good if all of them are."""
    joined: list[tuple[set[str], bool]] = []
    for names, good in streams:
        apart = [one for one in joined if not one[0] & names]
        for other, also in (one for one in joined if one[0] & names):
            names, good = names | other, good and also
        joined = [*apart, (names, good)]
    return joined

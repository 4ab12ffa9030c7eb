"""The start that chooses for itself: of each layer the scale, and whether it starts as mirrored pairs, with the reason.

Decides by what follows a layer and by how many layers stand in series without a norm; then starts by data, and
proves on the batch what it promised. How the values get there is in ``start``, ``pairs`` and ``datadriven``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from steelyard.core.table import Column, Table
from steelyard.init import scheme_of
from steelyard.learn.added import SHARE
from steelyard.learn.datadriven import COLUMNS, floats, mean_cosine, scale_by_data
from steelyard.learn.depth import Function, calm, is_deep, odd_part
from steelyard.learn.flow import Flow, Place, flow_of
from steelyard.learn.matrices import ATTENTION, is_started, matrices
from steelyard.learn.pairs import Halves, is_plain, pairs, reached
from steelyard.learn.start import draw
from steelyard.learn.streams import normed_streams, position_tables
from steelyard.learn.task import batch_arguments
from steelyard.learn.tracing import Graph, Operation, record

AWAY = 0.02  # of a standard deviation from its target, relative
STEEP = 30.0  # the largest norm of a gradient over the smallest one
ABSURD = 1e4  # a factor of a scale that only layers without a start, or broken data, can ask for
SAME = 1 - 1e-5  # the mean cosine of inputs
LOST = 100.0  # times less than the inputs (by 1 - cosine) the outputs may differ: a class token starts with 20 to 60
STREAM = 0.2  # of the scale of a residual stream that norms alone read; see bench/positions
HEARD = "no layer makes it; much less than what it is added to is not heard, and takes long to grow"


@dataclass
class Choice:
    """How the layers of one model are started."""

    depth: int  # activations in series without a norm, on the longest way
    halves: dict[str, Halves] = field(default_factory=dict)
    centred: dict[str, set[str]] = field(default_factory=dict)  # the layers that take the mean of a layer away
    targets: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def start_auto(model: nn.Module, found: Mapping[str, nn.Module], batch: Any, passes: int, seed: int) -> Table:
    """Choose, start, scale by data and prove; see `steelyard.learn.start.init_`.

    Of each layer the choice is: where a norm follows, or nothing: standard deviation 1. At the end of a residual
    branch: 1 / sqrt(sums in the model), so that all branches together add as much as was there. Before an activation:
    1 if the layers in series bear it (`steelyard.learn.depth.is_deep`), else mirrored pairs for an activation that
    is not odd, and so small a standard deviation that the mean square of gradients at most doubles.

    Returns the table of a start by data with columns for target and why; ``meta`` has 'proved', and what was found.
    """
    arguments = batch_arguments(batch)
    choice = chosen(model, found, record(model, arguments), arguments)
    said = draw(model, found, scheme_of("orthogonal"), seed, halves=choice.halves)
    for name, halves in choice.halves.items():
        said[name] += "".join(f", mirrored {axis}" for axis in ("outputs", "inputs") if getattr(halves, axis))
    centred = set().union(*choice.centred.values())
    for name in centred:
        said[name] += ", units of mean 0"
    table = scale_by_data(model, found, batch, passes, seed, said, choice.targets, centred)
    rows = [
        {**row, "target": row["std"], "why": HEARD}
        if row["kind"] == "Parameter"
        else {**row, "target": choice.targets.get(row["layer"], 1.0), "why": choice.why.get(row["layer"], "")}
        for row in table.rows
    ]
    columns = [*COLUMNS[:-1], Column("target", "", "of the standard deviation"), COLUMNS[-1], Column("why")]
    meta = {**table.meta, **_proof(arguments, table), "activations in series": choice.depth}
    return Table.of("start chosen by the model", columns, rows, meta)


def chosen(model: nn.Module, found: Mapping[str, nn.Module], graph: Graph, arguments: tuple[Any, ...]) -> Choice:
    """What each layer should get."""
    flow = flow_of(graph)
    choice = Choice(_depth(graph, flow))
    shared = _shared(found)
    known: dict[bytes, _Kind] = {}
    deep = {
        name: kind
        for name, place in flow.layers.items()
        if place.activation is not None and not place.norm and name not in shared and is_plain(found[name])
        if (kind := _kind(place.activation, choice.depth, known)).reason
    }
    uneven = [name for name, kind in deep.items() if not kind.odd]
    choice.centred = _centred(found, graph, [name for name in uneven if deep[name].shifted])
    choice.halves = pairs(model, found, graph, arguments, [name for name in uneven if name not in choice.centred])
    for name, place in flow.layers.items():
        target, choice.why[name] = _target(place, flow, choice, deep.get(name))
        if name not in shared:
            choice.targets[name] = target
    ends = {name for name, place in flow.layers.items() if place.ends_branch and not place.branch_norm}
    sooner = f"{STREAM:g} of it, as norms alone read this stream, so that it learns sooner"
    streams = normed_streams(model, graph, ends)
    for names, factor, why in ((position_tables(graph), SHARE, HEARD), (streams, STREAM, sooner)):
        for name in names & set(choice.targets):
            choice.targets[name] *= factor
            choice.why[name] += f"; {why}"
    for name, layer in found.items():  # what attention adds to the stream is its output projection
        if isinstance(layer, ATTENTION) and f"{name}.out_proj" in choice.targets:
            choice.targets[name] = choice.targets[f"{name}.out_proj"]
    return choice


@dataclass(frozen=True)
class _Kind:
    """What one activation does in so many layers."""

    reason: str  # why the layers cannot be started as they are; '' if they can
    odd: bool
    shifted: bool  # odd but for its value at 0
    calm: float  # the standard deviation for it
    calm_odd: float  # and for its odd part


def _kind(of: Function, depth: int, known: dict[bytes, _Kind]) -> _Kind:
    """Of an activation; each layer has one of its own, so that they are told apart by their values."""
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    with torch.no_grad():
        values = of(z)
    key = values.numpy().tobytes()
    if key not in known:
        reason, middle = is_deep(of, depth), values[len(values) // 2]
        shifted = bool(torch.allclose(values - middle, middle - values.flip(0), atol=1e-6))
        both = (calm(of, depth), calm(odd_part(of), depth)) if reason else (1.0, 1.0)
        known[key] = _Kind(reason, shifted and abs(float(middle)) < 1e-6, shifted, *both)
    return known[key]


def _target(place: Place, flow: Flow, choice: Choice, deep: _Kind | None) -> tuple[float, str]:
    """The standard deviation of one layer, and why."""
    if place.ends_branch and not place.branch_norm and flow.additions > 1:
        return flow.additions**-0.5, f"one of {flow.additions} branches that are added up"
    if place.norm:
        return 1.0, "a norm follows, to which its scale is all the same"
    if place.activation is None:
        return 1.0, "no activation follows" if place.name == "linear" else f"{place.name} follows"
    if deep is None:
        return 1.0, f"{place.name} follows; {choice.depth} in series bear a standard deviation of 1"
    mirrored, centred = choice.halves.get(place.layer, Halves()).outputs, place.layer in choice.centred
    std = deep.calm_odd if mirrored or centred else deep.calm
    why = f"{place.name}: {deep.reason}"
    if mirrored:
        why += "; mirrored pairs make them odd"
    if centred:
        why += "; the biases that follow take its mean away, so that it is odd"
    if std < 1:
        why += f"; at {std:.2g} the mean square of gradients at most doubles"
    return std, why


def _centred(found: Mapping[str, nn.Module], graph: Graph, wanted: list[str]) -> dict[str, set[str]]:
    """Of the layers `wanted` those after which every next layer is a plain one with a bias, and these."""
    calls = graph.calls()
    able = {
        name
        for name, layer in found.items()
        if is_plain(layer) and layer.bias is not None and is_started(layer.bias) and is_started(layer.weight)
        if len(calls.get(name, [])) == 1
    }
    nexts = {name: reached(calls[name][0], graph.outputs) for name in wanted if len(calls[name]) == 1}
    return {name: layers for name, layers in nexts.items() if layers and layers <= able}


def _depth(graph: Graph, flow: Flow) -> int:
    """Activations in series, each after a layer without a norm; a residual sum goes on from its shorter side."""
    counted = {name for name, place in flow.layers.items() if place.activation is not None and not place.norm}
    depths: dict[Operation, int] = {}
    for op in graph.operations:
        before = [depths[source] for source in op.sources] or [0]
        shorter = op.name in ("add", "sub", "rsub") and len(op.sources) > 1
        depths[op] = (min(before) if shorter else max(before)) + (op.layer in counted)
    return max(depths.values(), default=0)


def _shared(found: Mapping[str, nn.Module]) -> set[str]:
    """The layers that have a matrix in common with another one: it can have one scale only."""
    owners: dict[int, list[str]] = {}
    for name, layer in found.items():
        for parameter in {matrix.parameter for matrix in matrices(layer)}:
            owners.setdefault(id(getattr(layer, parameter)), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _proof(arguments: tuple[Any, ...], table: Table) -> dict[str, Any]:
    """What must hold on the batch for the start to be called proved; the first thing that does not is said."""
    away, steep = table.meta["furthest from target"], table.meta["gradient norm, largest over smallest"]
    same = table.meta["mean cosine of outputs"]
    given = max((c for t in floats(arguments) if (c := mean_cosine(t)) is not None), default=0.0)
    factors = [float(row["factor"]) for row in table.rows if row["kind"] != "Parameter" and row.get("factor")]
    faint = table.meta.get("faint")
    far = max((max(f, 1 / f) for f in factors), default=1.0)
    failed = ""
    if away is not None and not away <= AWAY:
        name, how = next(iter(table.meta["off target"].items()))
        failed = f"the standard deviation of {name!r} is {how}"
    elif far > ABSURD:
        failed = f"a layer had to change its scale {far:.1e}-fold: what feeds it is not started by this scheme"
    elif faint:
        failed = f"the parameter {next(iter(faint))!r} is {next(iter(faint.values()))}"
    elif given > SAME:
        failed = "the samples of the batch are all the same: start with a batch of real ones"
    elif steep is not None and not steep <= STEEP:
        failed = f"the largest gradient is {steep:.3g} times the smallest"
    elif same is not None and not (1 - same) * LOST >= 1 - given:
        failed = f"the outputs of different samples have a mean cosine of {same:.3f}, the inputs one of {given:.3f}"
    return {"proved": not failed} | ({"not proved because": failed} if failed else {})

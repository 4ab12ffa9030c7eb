"""Units: what can only be removed together, and families of units that can take each other's place.

A unit is a set of indices along axes of a model's tensors: a channel with the filter that makes it, its place in
the norms that follow, and every weight that reads it; a head; a hidden neuron. Decides what is a unit, proves by
trial that a model without some of them still runs, and counts parameters and multiplications.
Knows nothing of importance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.graph.attention import NarrowAttention
from steelyard.graph.labels import Axes, Labels, fixed
from steelyard.graph.resize import resize_
from steelyard.graph.rules import follow
from steelyard.graph.state import State
from steelyard.graph.tracing import Trace, trace

Kept = dict[str, tuple[np.ndarray, ...]]  # for each tensor the indices that stay, along each axis


@dataclass(frozen=True)
class Family:
    """Units with the same number of indices along the same axes."""

    sites: tuple[tuple[str, int], ...]  # the axes that they are on: name of the tensor, axis
    units: np.ndarray  # their numbers, (units,)


@dataclass(frozen=True)
class Loop:
    """A part of the work of a forward pass: `constant` multiplications for each combination of indices."""

    constant: float
    units: tuple[np.ndarray, ...]  # along each loop the unit of every index; -1: it stays


@dataclass(frozen=True)
class Units:
    """The units of one model."""

    axes: Mapping[str, tuple[np.ndarray, ...]]  # for each tensor and axis the unit of every index; -1: it stays
    families: tuple[Family, ...]
    loops: tuple[Loop, ...]
    count: int  # of all units
    inexact: np.ndarray  # (count,) bool: something takes a mean over them, so the rest is scaled otherwise without

    def parameters(self, alive: np.ndarray, names: Sequence[str]) -> int:
        """The elements of these tensors, if of the units only those in `alive`, (count,) bool, are there."""
        return sum(math.prod(int(_stay(units, alive).sum()) for units in self.axes[name]) for name in names)

    def multiplications(self, alive: np.ndarray) -> float:
        """Of one example in one forward pass: convolutions, linear layers and attention."""
        return sum(
            loop.constant * math.prod(int(_stay(units, alive).sum()) for units in loop.units) for loop in self.loops
        )

    def kept(self, alive: np.ndarray) -> Kept:
        """The indices that stay."""
        return {name: tuple(np.flatnonzero(_stay(units, alive)) for units in axes) for name, axes in self.axes.items()}


def _stay(units: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """For each index whether its unit is alive."""
    found: np.ndarray = np.append(alive, True)[units]
    return found


def units_of(model: nn.Module, arguments: tuple[Any, ...]) -> Units:
    """The units of a model that is called with these arguments, a batch of few examples, in evaluation mode.

    The operations of one pass are followed index by index. What an operation that is not known reads, what the model
    returns and what it is given stay. That the rest can go is tried: a copy without a unit of each family is run, and
    where it fails, the axes that its code cuts in places of its own stay whole, and if there are none, the family.

    Raises ModelError for a model that cannot be followed, or that has parametrizations.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(f.sites, len(f.units)) for f in units_of(net, (torch.zeros(1, 3),)).families]
    [((('0.weight', 0), ('0.bias', 0), ('2.weight', 1)), 8)]
    """
    _check(model)
    found = trace(model, arguments)
    whole: frozenset[str] = frozenset()  # operations that cut an axis where the code says
    pinned: frozenset[tuple[str, int]] = frozenset()  # axes that stay as they are
    while True:
        state, axes = _followed(model, found, whole, pinned)
        units = _units(state, axes, found.examples)
        refused = _refused(model, arguments, units)
        if not refused:
            return units
        bad = {u for family in refused for u in family.units.tolist()}
        cuts = _cuts_of(state, axes, units, bad) - whole
        whole |= cuts
        if not cuts:  # it is the family itself that cannot go
            pinned |= {site for family in refused for site in family.sites}


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "parametrizations" in module._modules:
            raise ModelError(f"{name or 'the model'} has parametrizations (a mask, a weight norm): release them first")


def _followed(
    model: nn.Module, found: Trace, whole: frozenset[str], pinned: frozenset[tuple[str, int]]
) -> tuple[State, dict[str, Axes]]:
    """The labels of all tensors of the model after every operation of the trace."""
    state = State(Labels(), whole)
    axes: dict[Any, Any] = {}
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = set(model.state_dict(keep_vars=True))
    places = [node for node in found.graph.nodes if node.op == "placeholder"]
    own: dict[str, Axes] = {}
    for name in found.names:
        tensor = shapes[name]
        own[name] = state.labels.fresh_axes(tensor.shape) if name in saved else fixed(tensor.shape)
    for node, name in zip(places, found.names, strict=False):
        axes[node] = own[name]
        if not node.users:  # nothing tells what belongs to it
            state.labels.stay(*own[name])
    _special(model, own, state)
    for name, axis in pinned:
        state.labels.stay(own[name][axis])
    for node in found.graph.nodes:
        if node.op == "placeholder":
            if node not in axes:
                axes[node] = fixed(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else None
        elif node.op == "get_attr":
            axes[node] = fixed(getattr(node.graph.owning_module, node.target).shape)
        elif node.op == "output":
            _stay_all(state, node.args, axes)
        else:
            axes[node] = follow(state, node, axes)
    return state, own


def _stay_all(state: State, given: Any, axes: Mapping[Any, Any]) -> None:
    if isinstance(given, (list, tuple)):
        for part in given:
            _stay_all(state, part, axes)
    elif isinstance(given, Mapping):
        _stay_all(state, list(given.values()), axes)
    elif given in axes:
        state.labels.stay(*axes[given])


def _special(model: nn.Module, own: Mapping[str, Axes], state: State) -> None:
    """What the code of a module assumes beyond what its operations show."""
    for path, module in model.named_modules():
        before = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            _heads(module, before, own, state)
        elif isinstance(module, nn.RNNBase):
            first = None
            for leaf, _ in module.named_parameters(recurse=False):
                if not leaf.startswith("weight_hh") or f"{before}{leaf}" not in own:
                    continue
                hidden = own[f"{before}{leaf}"][1]
                if getattr(module, "proj_size", 0):
                    state.labels.stay(hidden)
                first = hidden if first is None else first
                state.labels.join(first, hidden)  # one hidden_size for all layers and directions


def _heads(module: nn.MultiheadAttention, before: str, own: Mapping[str, Axes], state: State) -> None:
    """Whole heads go, each with its rows of queries, keys and values."""
    packed = f"{before}in_proj_weight" in own
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    rows = np.concatenate([own[before + name][0] for name in names])
    if (
        module.bias_k is not None
        or module.add_zero_attn
        or type(module) not in (nn.MultiheadAttention, NarrowAttention)
    ):
        state.labels.stay(rows)
        return
    heads = rows.reshape(3, -1, module.head_dim)
    for part in heads:
        for column in range(module.head_dim):
            state.labels.join(heads[0, :, 0], part[:, column])


def _units(state: State, axes: Mapping[str, Axes], examples: int) -> Units:
    """Number the units that may go, and find their families."""
    roots = {name: tuple(state.labels.find(a) for a in own) for name, own in axes.items()}
    every = np.unique(np.concatenate([np.zeros(1, np.int64), *(a for own in roots.values() for a in own)]))
    numbers = every[1:]  # without 0: what stays

    def numbered(labels: np.ndarray) -> np.ndarray:
        found = state.labels.find(labels)
        at = np.minimum(np.searchsorted(numbers, found), max(len(numbers) - 1, 0))
        known = numbers[at] == found if len(numbers) else np.zeros(len(found), bool)
        return np.where(known, at, -1)

    by_axis = {name: tuple(numbered(a) for a in own) for name, own in axes.items()}
    where: list[list[tuple[str, int, int]]] = [[] for _ in numbers]
    for name, own in by_axis.items():
        for axis, units in enumerate(own):
            for unit, times in zip(*np.unique(units[units >= 0], return_counts=True), strict=True):
                where[unit].append((name, axis, int(times)))
    families: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for unit, sites in enumerate(where):
        families.setdefault(tuple(sites), []).append(unit)
    inexact = np.zeros(len(numbers), bool)
    for labels in state.inexact:
        found = numbered(labels)
        inexact[found[found >= 0]] = True
    loops = tuple(Loop(c.constant / examples, tuple(map(numbered, c.loops))) for c in state.costs)
    made = tuple(Family(tuple((n, a) for n, a, _ in key), np.array(found)) for key, found in families.items())
    return Units(by_axis, made, loops, len(numbers), inexact)


def _refused(model: nn.Module, arguments: tuple[Any, ...], units: Units) -> list[Family]:
    """The families that a copy of the model does not run without a unit of."""
    families = [family for family in units.families if len(family.units) > 1]

    def without_one(chosen: Sequence[Family]) -> bool:
        alive = np.ones(units.count, bool)
        for family in chosen:
            alive[family.units[-1]] = False
        return runs(model, arguments, units.kept(alive))

    if not families or without_one(families):
        return []
    return [family for family in families if not without_one([family])] or families


def runs(model: nn.Module, arguments: tuple[Any, ...], kept: Kept) -> bool:
    """Whether a copy of the model with only these indices takes the arguments and gives what has the same shapes."""
    smaller = copy.deepcopy(model)
    try:
        narrow_(smaller, kept)
        with torch.no_grad():
            found, expected = (_shapes(m(*copy.deepcopy(arguments))) for m in (smaller, model))
            return bool(found == expected)
    except Exception:  # noqa: BLE001 - whatever the code of a model raises, it does not run
        return False


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: _shapes(part) for key, part in value.items()}
    return [_shapes(part) for part in value] if isinstance(value, (list, tuple)) else type(value)


def _cuts_of(state: State, axes: Mapping[str, Axes], units: Units, bad: set[int]) -> frozenset[str]:
    """The operations that cut an axis on which one of these units is."""
    roots = np.unique(np.concatenate([
        state.labels.find(labels)[np.isin(numbers, list(bad))]
        for name, own in axes.items() for labels, numbers in zip(own, units.axes[name], strict=True)
    ]))  # fmt: skip
    return frozenset(
        node for node, cut in state.cutting.items() if any(np.isin(state.labels.find(one), roots).any() for one in cut)
    )


def narrow_(model: nn.Module, kept: Kept) -> nn.Module:
    """Keep only these indices of each tensor: smaller tensors, in place, with the values that they had."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values: dict[str, Tensor] = {}
    for name, indices in kept.items():
        tensor = own[name].detach()
        for axis, index in enumerate(indices):
            if len(index) != tensor.shape[axis]:
                tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
        if tensor.shape != own[name].shape:
            values[name] = tensor
    resize_(model, {name: tuple(value.shape) for name, value in values.items()})
    fresh = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            fresh[name].copy_(value)
    return model

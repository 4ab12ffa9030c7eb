"""What changes of shape do to indices: views, permutations, parts, concatenations, reductions.

Decides where an axis may be cut: equal parts lose the same ones each, a part at a fixed place keeps its axis as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from steelyard.graph.labels import fixed
from steelyard.graph.state import State, broadcast, rows_together, shape_of, unknown, value_of


def pad(state: State, node: fx.Node, given: list[Any]) -> Any:
    found = []
    for labels, size in zip(given[0], shape_of(value_of(node)), strict=True):
        if len(labels) != size:
            state.labels.stay(labels)
        found.append(labels if len(labels) == size else np.zeros(size, np.int64))
    return tuple(found)


def reduce(state: State, node: fx.Node, given: list[Any]) -> Any:
    value = value_of(node)
    first = value[0] if isinstance(value, (list, tuple)) else value
    x = given[0]
    dims = node.args[1] if len(node.args) > 1 and not isinstance(node.args[1], (fx.Node, str)) else None
    name = str(node.target)
    if "vector_norm" in name or name.startswith("aten.norm"):
        dims = node.args[2] if len(node.args) > 2 else None
    if isinstance(dims, (int, float)):
        dims = [int(dims)]
    gone = {int(d) % len(x) for d in dims} if dims else set(range(len(x)))
    state.inexact.extend(x[d] for d in gone)
    if first.dim() == len(x):
        return tuple(np.zeros(1, np.int64) if i in gone else labels for i, labels in enumerate(x))
    return tuple(labels for i, labels in enumerate(x) if i not in gone)


def view(state: State, node: fx.Node, given: list[Any]) -> Any:
    x, shape = given[0], shape_of(value_of(node))
    found: list[np.ndarray] = []
    for before, after in _runs([len(a) for a in x], shape):
        found += _regroup(state, node, list(x[before]), shape[after])
    return tuple(found)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]]:
    """The least runs of axes of `old` and of `new` that hold the same elements."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start, left, right = (i, j), 1, 1
        while True:
            if left <= right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                break
            if left == right and (i > start[0]) and (j > start[1]):
                break
        runs.append((slice(start[0], i), slice(start[1], j)))
    return runs


def _regroup(state: State, node: fx.Node, before: list[np.ndarray], shape: tuple[int, ...]) -> list[np.ndarray]:
    """The labels of axes of `shape` that hold what the axes `before` held, in the same order."""
    sizes = tuple(len(labels) for labels in before)
    if sizes == shape:
        return before
    free = [i for i, labels in enumerate(before) if state.labels.free(labels)]
    if len(free) != 1 or not math.prod(shape):
        state.labels.stay(*before)
        return list(fixed(shape))
    one = before[free[0]]
    inside = np.expand_dims(one, tuple(i for i in range(len(sizes)) if i != free[0]))
    flat = np.broadcast_to(inside, sizes).reshape(shape)
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    for axis in wide:
        along = _constant_but_for(state, flat, axis)
        if along is not None:
            return [along if i == axis else np.zeros(size, np.int64) for i, size in enumerate(shape)]
    if not state.cut(node, one):
        return list(fixed(shape))
    axis = wide[0] if len(before) == 1 or len(wide) < 3 else wide[-2]
    rows = np.moveaxis(flat, axis, 0).reshape(shape[axis], -1)
    for column in rows.T[1:]:
        state.labels.join(rows[:, 0], column)
    return [rows[:, 0] if i == axis else np.zeros(size, np.int64) for i, size in enumerate(shape)]


def _constant_but_for(state: State, labels: np.ndarray, axis: int) -> np.ndarray | None:
    """The labels along `axis`, if they are the same wherever one stands along the others."""
    rows = np.moveaxis(state.labels.find(labels), axis, 0).reshape(labels.shape[axis], -1)
    return rows[:, 0] if (rows == rows[:, :1]).all() else None


def permute(state: State, node: fx.Node, given: list[Any]) -> Any:
    return tuple(given[0][int(d)] for d in node.args[1])  # type: ignore[union-attr]


def transpose(state: State, node: fx.Node, given: list[Any]) -> Any:
    order = list(given[0])
    a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def t(state: State, node: fx.Node, given: list[Any]) -> Any:
    return tuple(reversed(given[0]))


def unsqueeze(state: State, node: fx.Node, given: list[Any]) -> Any:
    found = list(given[0])
    at = int(node.args[1])  # type: ignore[arg-type]
    found.insert(at % (len(found) + 1), np.zeros(1, np.int64))
    return tuple(found)


def squeeze(state: State, node: fx.Node, given: list[Any]) -> Any:
    dims = node.args[1] if len(node.args) > 1 else range(len(given[0]))
    chosen = {int(d) % len(given[0]) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}  # type: ignore[arg-type]
    gone = {d for d in chosen if len(given[0][d]) == 1}
    state.labels.stay(*(given[0][d] for d in gone))
    return tuple(labels for i, labels in enumerate(given[0]) if i not in gone)


def expand(state: State, node: fx.Node, given: list[Any]) -> Any:
    """An axis of one index that is repeated becomes a new one, as long as the code asks: it follows what it meets."""
    shape = shape_of(value_of(node))
    found = list(broadcast(state, [given[0]], shape))
    before = [1] * (len(shape) - len(given[0])) + [len(labels) for labels in given[0]]
    for axis, (old, new) in enumerate(zip(before, shape, strict=True)):
        if old != new:
            found[axis] = state.labels.fresh(new)
    return tuple(found)


def narrowed(state: State, node: fx.Node, given: list[Any]) -> Any:
    """slice: a part of one axis, cut at places that the code says."""
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    axes, size = list(given[0]), shape_of(value_of(node))
    if len(axes[dim]) != size[dim]:
        state.labels.stay(axes[dim])
        axes[dim] = np.zeros(size[dim], np.int64)
    return tuple(axes)


def select(state: State, node: fx.Node, given: list[Any]) -> Any:
    dim = int(node.args[1]) % len(given[0])  # type: ignore[arg-type]
    state.labels.stay(given[0][dim])
    return tuple(labels for i, labels in enumerate(given[0]) if i != dim)


def unbind(state: State, node: fx.Node, given: list[Any]) -> Any:
    dim = int(node.args[1]) % len(given[0]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    state.labels.stay(given[0][dim])
    return [tuple(labels for i, labels in enumerate(given[0]) if i != dim) for _ in value_of(node)]


def split(state: State, node: fx.Node, given: list[Any]) -> Any:
    """Equal parts lose the same ones each, if the code cuts by their number."""
    x, dim = given[0], int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    sizes = [v.shape[dim] for v in value_of(node)]
    if state.labels.free(x[dim]) and len(sizes) > 1:
        if len(set(sizes)) > 1:
            state.labels.stay(x[dim])
        elif state.cut(node, x[dim]):
            rows_together(state, x[dim], len(sizes))
    found, start = [], 0
    for size in sizes:
        axes = list(x)
        axes[dim] = x[dim][start : start + size]
        found.append(tuple(axes))
        start += size
    return found


def glu(state: State, node: fx.Node, given: list[Any]) -> Any:
    x, dim = list(given[0]), int(node.args[1]) if len(node.args) > 1 else -1  # type: ignore[arg-type]
    rows_together(state, x[dim], 2)
    x[dim] = x[dim][: len(x[dim]) // 2]
    return tuple(x)


def cat(state: State, node: fx.Node, given: list[Any]) -> Any:
    parts = [axes for axes in given[0] if len(axes) > 1 or len(axes[0])]  # an old torch idiom: an empty first part
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    dim %= len(parts[0])
    found = list(parts[0])
    for axes in parts[1:]:
        for i, labels in enumerate(axes):
            if i != dim:
                state.labels.join(found[i], labels)
    found[dim] = np.concatenate([axes[dim] for axes in parts])
    return tuple(found)


def stack(state: State, node: fx.Node, given: list[Any]) -> Any:
    parts, dim = given[0], int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    for axes in parts[1:]:
        for a, b in zip(parts[0], axes, strict=True):
            state.labels.join(a, b)
    found = list(parts[0])
    found.insert(dim % (len(found) + 1), np.zeros(len(parts), np.int64))
    return tuple(found)


def flip(state: State, node: fx.Node, given: list[Any]) -> Any:
    turned = {int(d) % len(given[0]) for d in node.args[1]}  # type: ignore[union-attr]
    return tuple(labels[::-1] if i in turned else labels for i, labels in enumerate(given[0]))


def roll(state: State, node: fx.Node, given: list[Any]) -> Any:
    dims = node.args[2] if len(node.args) > 2 else range(len(given[0]))
    moved = {int(d) % len(given[0]) for d in dims}  # type: ignore[union-attr, arg-type]
    state.labels.stay(*(given[0][d] for d in moved))
    return given[0]


def index(state: State, node: fx.Node, given: list[Any]) -> Any:
    """x[:, i]: the axis that is indexed stays as it is; the others pass, if there is but one index."""
    used = [i for i, index in enumerate(given[1]) if index is not None]
    if len(used) != 1:
        return unknown(state, node, given)
    at = used[0]
    state.labels.stay(given[0][at], *given[1][at])
    shape = shape_of(value_of(node))
    count = len(shape) - len(given[0]) + 1
    if count != len(given[1][at]):  # a mask takes as many axes as it has
        return unknown(state, node, given)
    return (*given[0][:at], *fixed(shape[at : at + count]), *given[0][at + 1 :])

"""What layers do to the indices of their tensors: convolutions, norms, products, embeddings, attention, pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from steelyard.graph.labels import Axes, fixed
from steelyard.graph.state import Cost, State, broadcast, first_of, rows_together, shape_of, tensors, value_of


def convolution(state: State, node: fx.Node, given: list[Any]) -> Any:
    join, (x, w, bias) = state.labels.join, given[:3]
    transposed, groups = bool(node.args[6]), int(node.args[8])  # type: ignore[arg-type]
    lead = len(x) - (len(w) - 2) - 1  # the axis of the channels
    state.labels.stay(*w[2:], *x[lead + 1 :])
    kernel = math.prod(len(a) for a in w[2:])
    shape = shape_of(value_of(node))
    out = _channels(state, x[lead], w, groups, transposed)
    if bias is not None:
        join(bias[0], out)
    positions = math.prod(shape[lead + 1 :]) if not transposed else math.prod(len(a) for a in x[lead + 1 :])
    batch = math.prod(shape[:lead])
    state.costs.append(Cost(batch * positions * kernel, (w[0], w[1])))
    return (*x[:lead], out, *fixed(shape[lead + 1 :]))


def _channels(state: State, inputs: np.ndarray, w: Axes, groups: int, transposed: bool) -> np.ndarray:
    """The labels of the output channels, after what belongs together was joined.

    Of a convolution in groups whole groups go if each has one input; else the same ones of every group.
    """
    join = state.labels.join
    own, other = (w[1], w[0]) if transposed else (w[0], w[1])  # the axis of the outputs, that of the inputs
    if groups == 1:
        join(inputs, other)
        return own
    share = len(inputs) // groups
    if transposed:
        join(inputs, w[0])
        if share == 1:
            state.labels.stay(w[1])
            return np.repeat(w[0], len(w[1]))
        rows_together(state, inputs, groups)
        return np.tile(w[1], groups)
    if share == 1:
        state.labels.stay(w[1])
        join(np.repeat(inputs, len(own) // groups), own)
        return own
    join(inputs, np.tile(w[1], groups))
    rows_together(state, own, groups)
    return own


def batch_norm(state: State, node: fx.Node, given: list[Any]) -> Any:
    x = given[0]
    for axes in tensors(given[1:5]):
        state.labels.join(x[1], axes[0])
    return first_of(node, x)


def layer_norm(state: State, node: fx.Node, given: list[Any]) -> Any:
    x, count = given[0], len(node.args[1])  # type: ignore[arg-type]
    last, affine = x[-count:], tensors(given[2:4])
    for axes in affine:
        for labels, own in zip(last, axes, strict=True):
            state.labels.join(labels, own)
    if not affine:  # then no tensor of the file would say how wide it is
        state.labels.stay(*last)
    state.inexact.extend(last)
    return first_of(node, x)


def group_norm(state: State, node: fx.Node, given: list[Any]) -> Any:
    x, groups = given[0], int(node.args[6])  # type: ignore[arg-type]
    for axes in tensors(given[1:3]):
        state.labels.join(x[1], axes[0])
    rows_together(state, x[1], groups)
    state.inexact.append(x[1])
    return first_of(node, x)


def softmax(state: State, node: fx.Node, given: list[Any]) -> Any:
    state.labels.stay(given[0][int(node.args[1])])  # type: ignore[arg-type]
    return given[0]


def spatial(state: State, node: fx.Node, given: list[Any]) -> Any:
    value = value_of(node)
    first = value[0] if isinstance(value, (list, tuple)) else value
    name = str(node.target)
    count = next((n for n in (1, 2, 3) if f"{n}d" in name), first.dim() - 2)
    x = given[0]
    state.labels.stay(*x[first.dim() - count :])
    found = (*x[: first.dim() - count], *fixed(first.shape[first.dim() - count :]))
    return [found for _ in value] if isinstance(value, (list, tuple)) else found


def _product(state: State, a: Axes, b: Axes) -> Axes:
    """(..., n, k) times (..., k, m), the leading axes one by one."""
    state.labels.join(a[-1], b[-2])
    for one, two in zip(a[:-2], b[:-2], strict=True):
        state.labels.join(one, two)
    out = (*a[:-1], b[-1])
    loops = (*out, a[-1])
    state.costs.append(Cost(1.0, loops))
    return out


def mm(state: State, node: fx.Node, given: list[Any]) -> Any:
    return _product(state, given[0], given[1])


def addmm(state: State, node: fx.Node, given: list[Any]) -> Any:
    out = _product(state, given[1], given[2])
    return broadcast(state, [out, given[0]], shape_of(value_of(node)))


def mv(state: State, node: fx.Node, given: list[Any]) -> Any:
    state.labels.join(given[0][1], given[1][0])
    state.costs.append(Cost(1.0, given[0]))
    return (given[0][0],)


def embedding(state: State, node: fx.Node, given: list[Any]) -> Any:
    table, indices = given[:2]
    state.labels.stay(table[0])
    return (*indices, table[1])


def attention(state: State, node: fx.Node, given: list[Any]) -> Any:
    q, k, v = given[:3]  # (..., time, depth)
    scores = _product(state, q, (*k[:-2], k[-1], k[-2]))
    state.labels.stay(scores[-1])
    for mask in tensors(given[3:]):
        broadcast(state, [scores, mask], tuple(len(a) for a in scores))
    return first_of(node, _product(state, scores, v))

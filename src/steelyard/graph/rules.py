"""What each aten operation does to the indices of its tensors: the table of rules.

What is not in it keeps all of its inputs as they are. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from steelyard.graph import layers, shapes
from steelyard.graph.state import State, broadcast, shape_of, tensors, unknown, value_of

PASSING = {"clone", "_to_copy", "detach", "alias", "lift_fresh_copy", "copy", "dropout", "native_dropout", "hardswish",
           "log_sigmoid_forward", "rrelu_with_noise", "_prelu_kernel"}  # fmt: skip
CREATING = ("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")
SPATIAL = ("max_pool", "avg_pool", "upsample_", "adaptive_", "_adaptive", "max_unpool", "reflection_", "replication_")
REDUCING = (
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "logsumexp",
    "prod",
    "any",
    "all",
    "norm",
    "linalg_vector_norm",
)


Rule = Callable[[State, fx.Node, list[Any]], Any]  # the axes of each argument -> those of the result, or a list


def follow(state: State, node: fx.Node, axes: dict[fx.Node, Any]) -> Any:
    """The axes of what `node` computes, from those of the nodes before it."""
    given = [_axes_of(argument, axes) for argument in node.args]
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", ""))).removesuffix("_")
    name = name or "unknown"
    if name == "getitem":
        whole = axes[node.args[0]]
        return whole[node.args[1]]
    rule = _rule(name, node)
    return rule(state, node, given)


def _axes_of(argument: Any, axes: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return axes[argument]
    if isinstance(argument, (list, tuple)):
        return [_axes_of(part, axes) for part in argument]
    return None


def _rule(name: str, node: fx.Node) -> Rule:
    if name in RULES:
        return RULES[name]
    if name.startswith(CREATING):
        return _create
    if name.startswith("_scaled_dot_product"):
        return layers.attention
    if name.startswith(SPATIAL):
        return layers.spatial
    if name in PASSING or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return unknown


def _create(state: State, node: fx.Node, given: list[Any]) -> Any:
    """A new tensor has the shape that it is asked to have: it follows what it meets."""
    return state.labels.fresh_axes(shape_of(value_of(node)))


def _pointwise(state: State, node: fx.Node, given: list[Any]) -> Any:
    value = value_of(node)
    first = value[0] if isinstance(value, (list, tuple)) else value
    inputs = tensors(given) + [a for g in given if isinstance(g, list) for a in tensors(g)]
    found = broadcast(state, inputs, shape_of(first))
    return [found for _ in value] if isinstance(value, (list, tuple)) else found


RULES: dict[str, Rule] = {
    "convolution": layers.convolution,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm"),
        layers.batch_norm,
    ),
    "native_layer_norm": layers.layer_norm,
    "_fused_rms_norm": layers.layer_norm,
    "native_group_norm": layers.group_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), layers.softmax),
    "constant_pad_nd": shapes.pad,
    **dict.fromkeys(REDUCING, shapes.reduce),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), shapes.view),
    "permute": shapes.permute,
    "transpose": shapes.transpose,
    "t": shapes.t,
    "unsqueeze": shapes.unsqueeze,
    "squeeze": shapes.squeeze,
    "expand": shapes.expand,
    "slice": shapes.narrowed,
    "select": shapes.select,
    "unbind": shapes.unbind,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk"), shapes.split),
    "glu": shapes.glu,
    "cat": shapes.cat,
    "stack": shapes.stack,
    "flip": shapes.flip,
    "roll": shapes.roll,
    "index": shapes.index,
    **dict.fromkeys(("mm", "bmm"), layers.mm),
    **dict.fromkeys(("addmm", "baddbmm"), layers.addmm),
    "mv": layers.mv,
    "embedding": layers.embedding,
}

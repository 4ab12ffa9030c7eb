"""Layers of another width, in place: smaller (or larger) tensors, and the attributes that say how wide a layer is.

Decides for each kind of layer what follows from the shapes of its tensors. Knows nothing of where shapes come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.errors import ModelError, quoted
from steelyard.graph.attention import narrow_

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of the tensors of one layer, by their names in it
Changes = dict[str, Any]  # attributes of a layer


def resize_(model: nn.Module, weights: Weights | Mapping[str, Shape]) -> nn.Module:
    """Give the layers of a model, in place, the widths that the tensors of the same names in `weights` have.

    What has the right shape already is left as it is, and so is what `weights` has no tensor for; a tensor of
    another shape becomes a new one, filled with zeros: load the weights after this (``into_module``, which does both
    with ``resize=True``). Tied tensors stay tied. An optimizer made before holds the old tensors: make a new one.

    Only widths change: the number of axes and kernels stay. Linear and convolutional layers, norms, embeddings,
    recurrent layers and MultiheadAttention (whose heads keep their depth) are known; a layer of another kind is taken
    to read its widths from its tensors.

    Raises ModelError, with the model untouched, for shapes that a layer cannot have.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> resize_(net, {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)})
    Sequential(
      (0): Linear(in_features=3, out_features=5, bias=True)
      (1): ReLU()
      (2): Linear(in_features=5, out_features=2, bias=True)
    )
    """
    wanted = _wanted(model, weights)
    plans = []
    for path, module in model.named_modules():
        own = _own(module)
        before = f"{path}." if path else ""
        new = {leaf: wanted.get(id(tensor), tuple(tensor.shape)) for leaf, tensor in own.items()}
        if any(new[leaf] != tuple(tensor.shape) for leaf, tensor in own.items()):
            try:
                plans.append((module, new, _plan(module, new)))
            except ModelError as error:
                raise ModelError(f"{before.rstrip('.') or 'the model'}: {error}") from None
    made: dict[int, Tensor] = {}
    olds = [own for module, *_ in plans for own in _own(module).values()]  # alive, so that no id is used again
    for module, new, changes in plans:
        _apply(module, new, changes, made)
    del olds
    return model


def _wanted(model: nn.Module, weights: Weights | Mapping[str, Shape]) -> dict[int, Shape]:
    """The new shape of each tensor that gets one, by its identity."""
    if isinstance(weights, Weights):
        shapes: dict[str, Shape] = {name: weights[name].spec.shape for name in (*weights, *weights.ties)}
    else:
        shapes = {name: tuple(shape) for name, shape in weights.items()}
    wanted: dict[int, Shape] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        shape = shapes.get(name)
        if shape is None or shape == tuple(tensor.shape):
            continue
        if len(shape) != tensor.dim():
            raise ModelError(f"{quoted(name)} has {tensor.dim()} axes, and {len(shape)} in the weights: only widths "
                             "can change")  # fmt: skip
        if wanted.setdefault(id(tensor), shape) != shape:
            raise ModelError(f"{quoted(name)} is one tensor under several names that have different shapes")
    return wanted


def _own(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None}


def _plan(module: nn.Module, new: Shapes) -> Changes:
    """The attributes that go with the new shapes; raises ModelError if the layer cannot have them."""
    for leaf, shape in new.items():
        if not all(shape):
            raise ModelError(f"{quoted(leaf)} would have the shape {shape}: a layer cannot be empty")
    for kind, plan in KINDS.items():
        if isinstance(module, kind):
            return plan(module, new)
    return {}


def _apply(module: nn.Module, new: Shapes, changes: Changes, made: dict[int, Tensor]) -> None:
    for leaf, tensor in _own(module).items():
        if new[leaf] == tuple(tensor.shape):
            continue
        if id(tensor) not in made:
            empty = torch.zeros(new[leaf], dtype=tensor.dtype, device=tensor.device)
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        setattr(module, leaf, made[id(tensor)])
    inner = changes.pop("inner", None)
    for name, value in changes.items():
        setattr(module, name, value)
    if inner is not None and isinstance(module, nn.MultiheadAttention):
        narrow_(module, inner)


def _same(new: Shapes, size: int, *leaves: str) -> None:
    for leaf in leaves:
        if leaf in new and new[leaf][0] != size:
            raise ModelError(f"{quoted(leaf)} has {new[leaf][0]} elements for {size} channels")


def _linear(module: Any, new: Shapes) -> Changes:
    outputs, inputs = new["weight"]
    _same(new, outputs, "bias")
    return {"in_features": inputs, "out_features": outputs}


def _conv(module: Any, new: Shapes) -> Changes:
    """Where each group has one input, the groups follow the outputs; else their number stays."""
    old, shape = tuple(module.weight.shape), new["weight"]
    if old[2:] != shape[2:]:
        raise ModelError(f"the kernel is {old[2:]}, and {shape[2:]} in the weights: only widths can change")
    transposed, groups = bool(module.transposed), int(module.groups)
    single = groups > 1 and (old[0] // groups if transposed else old[1]) == 1
    if single:
        per_group = 1 if transposed else old[0] // groups
        _divides(shape[0], per_group, "filters", "a group")
        groups = shape[0] // per_group
    _divides(shape[0], groups, "channels", "groups")
    inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    _same(new, outputs, "bias")
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _divides(count: int, parts: int, what: str, of: str) -> None:
    if count % parts:
        raise ModelError(f"{count} {what} cannot be divided evenly among {parts} {of}")


def _features(module: Any, new: Shapes) -> Changes:
    size = next(shape[0] for shape in new.values() if shape)
    _same(new, size, "weight", "bias", "running_mean", "running_var")
    return {"num_features": size}


def _group_norm(module: Any, new: Shapes) -> Changes:
    size = new["weight"][0]
    _divides(size, module.num_groups, "channels", "groups")
    _same(new, size, "bias")
    return {"num_channels": size}


def _layer_norm(module: Any, new: Shapes) -> Changes:
    if "bias" in new and new["bias"] != new["weight"]:
        raise ModelError(f"the weight has the shape {new['weight']}, the bias {new['bias']}")
    return {"normalized_shape": tuple(new["weight"])}


def _embedding(module: Any, new: Shapes) -> Changes:
    rows, width = new["weight"]
    if rows != module.num_embeddings:
        raise ModelError(f"it has {module.num_embeddings} rows, and {rows} in the weights: what a row stands for "
                         "would change")  # fmt: skip
    return {"embedding_dim": width}


def _recurrent(module: Any, new: Shapes) -> Changes:
    """One hidden size for all layers and directions."""
    if getattr(module, "proj_size", 0):
        raise ModelError("the widths of a projected LSTM cannot change")
    cell = isinstance(module, nn.RNNCellBase)
    suffix = "" if cell else "_l0"
    hidden, inputs = new[f"weight_hh{suffix}"][1], new[f"weight_ih{suffix}"][1]
    gates = (
        module.weight_hh.shape[0] // module.hidden_size if cell else module.weight_hh_l0.shape[0] // module.hidden_size
    )
    directions = 2 if not cell and module.bidirectional else 1
    for leaf, shape in new.items():
        first = cell or "_l0" in leaf
        expected: Shape = (gates * hidden,)
        if leaf.startswith("weight_hh"):
            expected = (gates * hidden, hidden)
        elif leaf.startswith("weight_ih"):
            expected = (gates * hidden, inputs if first else directions * hidden)
        if shape != expected:
            raise ModelError(f"{quoted(leaf)} has the shape {shape}, expected {expected} for {hidden} hidden units")
    return {"hidden_size": hidden, "input_size": inputs}


def _attention(module: Any, new: Shapes) -> Changes:
    if module.bias_k is not None:
        raise ModelError("an attention with bias_k cannot be resized")
    if "in_proj_weight" in new:
        rows, width = new["in_proj_weight"]
        _divides(rows, 3 * module.head_dim, "rows", "queries, keys and values of whole heads")
        inner, kdim, vdim = rows // 3, width, width
    else:
        inner, width = new["q_proj_weight"]
        kdim, vdim = new["k_proj_weight"][1], new["v_proj_weight"][1]
        _divides(inner, module.head_dim, "rows", "dimensions of a head")
    _same(new, 3 * inner, "in_proj_bias")
    return {"embed_dim": width, "kdim": kdim, "vdim": vdim, "inner": inner}


def _prelu(module: Any, new: Shapes) -> Changes:
    return {"num_parameters": math.prod(new["weight"])}


def _bilinear(module: Any, new: Shapes) -> Changes:
    outputs, first, second = new["weight"]
    _same(new, outputs, "bias")
    return {"in1_features": first, "in2_features": second, "out_features": outputs}


KINDS: dict[type[nn.Module], Callable[[Any, Shapes], Changes]] = {
    nn.Linear: _linear,
    nn.modules.conv._ConvNd: _conv,
    nn.modules.batchnorm._NormBase: _features,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.PReLU: _prelu,
    nn.Bilinear: _bilinear,
}

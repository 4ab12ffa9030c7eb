"""The matrices inside weighted layers: which part of which parameter multiplies what.

A parameter is not always one matrix: the gates of an LSTM, packed queries, keys and values and the groups of a
convolution lie in one tensor, and a transposed convolution has its inputs first and, with a stride, is several.
Decides how each kind of layer is taken apart; knows nothing of how weights are started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from torch import Tensor, nn

Role = Literal["input", "recurrent", "table"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
TABLES = (nn.Embedding, nn.EmbeddingBag)
WEIGHTED = (nn.Linear, nn.Bilinear, *TABLES, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT)
ATTENTION = (nn.MultiheadAttention,)
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer: (outputs, inputs, *kernel), a view into its parameter.

    ``role`` 'input' multiplies what comes from below, 'recurrent' the layer's own state, and the rows of a
    'table' are looked up rather than multiplied.
    """

    parameter: str  # its name in the layer
    index: int  # which matrix of the parameter
    values: Tensor
    role: Role = "input"


def matrices(layer: nn.Module) -> Iterator[Matrix]:
    """The matrices of one layer, without those of layers inside it; none for a layer without weights.

    >>> [(m.parameter, tuple(m.values.shape), m.role) for m in matrices(nn.GRUCell(2, 4))][2:4]
    [('weight_ih', (4, 2), 'input'), ('weight_hh', (4, 4), 'recurrent')]
    >>> [tuple(m.values.shape) for m in matrices(nn.Conv2d(4, 6, 3, groups=2))]
    [(3, 2, 3, 3), (3, 2, 3, 3)]
    >>> [tuple(m.values.shape) for m in matrices(nn.ConvTranspose1d(4, 6, 3, stride=2))]
    [(6, 4, 2), (6, 4, 1)]
    """
    if isinstance(layer, CONVOLUTIONS):
        yield from _split("weight", layer.weight, layer.groups)
    elif isinstance(layer, TRANSPOSED):
        yield from _transposed(layer)
    elif isinstance(layer, TABLES):
        yield Matrix("weight", 0, layer.weight.detach(), "table")
    elif isinstance(layer, RECURRENT):
        yield from _recurrent(layer)
    elif isinstance(layer, nn.MultiheadAttention):
        yield from _attention(layer)
    elif isinstance(layer, (nn.Linear, nn.Bilinear)):
        yield Matrix("weight", 0, layer.weight.detach())


def parameter_axes(layer: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each parameter of a layer that is made of matrices: its axis of outputs, and those that are summed over.

    Nothing is summed over where rows are looked up.

    >>> parameter_axes(nn.ConvTranspose2d(4, 8, 3)), parameter_axes(nn.Embedding(10, 4))
    ({'weight': (1, (0,))}, {'weight': (1, ())})
    """
    if isinstance(layer, nn.Bilinear):
        return {"weight": (0, (1, 2))}
    if isinstance(layer, TRANSPOSED):
        return {"weight": (1, (0,))}
    return {m.parameter: (1, ()) if m.role == "table" else (0, (1,)) for m in matrices(layer)}


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters in which the matrices of one layer lie."""
    found = [getattr(layer, matrix.parameter) for matrix in matrices(layer)]
    return list({id(p): p for p in found}.values())


def biases(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The biases of one layer by name, without those of layers inside it."""
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_bias", "bias_k", "bias_v")
    elif isinstance(layer, RECURRENT):
        names = tuple(name for name, _ in layer.named_parameters(recurse=False) if name.startswith("bias"))
    else:
        names = ("bias",)
    for name in names:
        value = getattr(layer, name, None)
        if isinstance(value, Tensor):
            yield name, value.detach()


def forget_gates(layer: nn.Module) -> Iterator[Tensor]:
    """Of an LSTM, the part of each input bias that belongs to the forget gate and is started: the second of four."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        for name, bias in biases(layer):
            if name.startswith("bias_ih") and is_started(getattr(layer, name)):
                yield bias.chunk(4)[1]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have matrices, by name, each once under the first of its names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (*WEIGHTED, *ATTENTION))}


def outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The same without the layers that belong to attention: its projection is part of it, and used without a call."""
    found = layers(model)
    inside = tuple(f"{name}." for name, layer in found.items() if name and isinstance(layer, ATTENTION))
    return {name: layer for name, layer in found.items() if not name.startswith(inside or ("\0",))}


def _split(parameter: str, values: Tensor, count: int, role: Role = "input") -> Iterator[Matrix]:
    for i, part in enumerate(values.detach().chunk(count)):
        yield Matrix(parameter, i, part, role)


def _transposed(layer: nn.Module) -> Iterator[Matrix]:
    """Of a transposed convolution with a stride, the convolutions that it is made of: one for each phase of the output.

    An output meets only every m-th tap of the kernel, m = stride / gcd(stride, dilation), so that these taps alone are
    its inputs; the kernel of all of them would make a stride of 2 in two dimensions start at half of the scale.
    """
    steps = [s // math.gcd(s, d) for s, d in zip(layer.stride, layer.dilation, strict=True)]
    starts = [range(min(step, size)) for step, size in zip(steps, layer.kernel_size, strict=True)]
    groups = layer.weight.detach().chunk(layer.groups)
    for i, (group, phase) in enumerate(product(groups, product(*starts))):
        taps = [slice(first, None, step) for first, step in zip(phase, steps, strict=True)]
        yield Matrix("weight", i, group.transpose(0, 1)[(slice(None), slice(None), *taps)])


def _recurrent(layer: nn.Module) -> Iterator[Matrix]:
    kind = getattr(layer, "mode", type(layer).__name__)
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith("weight_hr"):
            yield Matrix(name, 0, parameter.detach())  # the projection of an LSTM with proj_size
        elif name.startswith("weight"):
            role: Role = "recurrent" if name.startswith("weight_hh") else "input"
            yield from _split(name, parameter, GATES.get(kind, 1), role)


def _attention(layer: nn.MultiheadAttention) -> Iterator[Matrix]:
    if layer.in_proj_weight is not None:
        yield from _split("in_proj_weight", layer.in_proj_weight, 3)
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Matrix(name, 0, getattr(layer, name).detach())


def unit_axis(layer: nn.Module, x: Tensor) -> int:
    """Which axis of the inputs or outputs of a layer are its units: the last one, of a convolution before the places.

    >>> import torch
    >>> unit_axis(nn.Conv2d(3, 8, 3), torch.zeros(4, 3, 5, 5)), unit_axis(nn.Linear(3, 8), torch.zeros(4, 7, 3))
    (1, 2)
    """
    places = len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    return int(x.ndim) - 1 - places


def is_started(parameter: Tensor) -> bool:
    """Whether values can be put into it: a parameter, floating point, on a real device, trainable."""
    return (
        isinstance(parameter, nn.Parameter)
        and parameter.is_floating_point()
        and not parameter.is_meta
        and parameter.requires_grad
    )

"""One connection: the weight between one input unit and one output unit of one layer.

Decides which element of which tensor a connection is, for dense, convolutional, recurrent and attention
layers; knows nothing of data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.affine import attention_rows
from steelyard.explain.layers import find_layer
from steelyard.explain.recurrent import gates


@dataclass(frozen=True, eq=False)
class Connection:
    """The address of one number in a model: read it, set it."""

    layer: str
    weight: Tensor  # the layer's own parameter or a view of its rows
    index: tuple[int, ...]

    def read(self) -> float:
        """The value of the weight now."""
        return float(self.weight.detach()[self.index])

    def set(self, value: float) -> float:
        """Replace the weight and return what it was; the model's next forward pass uses the new value."""
        before = self.read()
        with torch.no_grad():
            self.weight[self.index] = value
        return before


def connection(
    model: nn.Module,
    layer: str,
    output: int,
    input: int,
    tap: Sequence[int] | int | None = None,
    part: str | None = None,
) -> Connection:
    """The connection from unit `input` to unit `output` of `layer`.

    Args:
        model: any module.
        layer: its name in ``named_modules()``.
        output: the output unit; a channel for a convolution, a unit of the gate or projection for others.
        input: the input unit; a channel for a convolution, counted over all groups.
        tap: the place in a convolution's kernel, for example ``(0, 2)``.
        part: which weights of a layer that has several. Recurrent: the symbol of the documentation of
            torch.nn, such as ``W_if`` (from the input to the forget gate) or ``W_hf_l1`` (level 1, from the
            hidden state). Attention: ``q``, ``k``, ``v`` or ``out``.

    Raises UnknownNameError for a layer or part that is not there, ModelError for units that are not connected.

    >>> layer = nn.Linear(3, 2)
    >>> wire = connection(layer, "", output=1, input=2)
    >>> _ = wire.set(0.5)
    >>> float(layer.weight.detach()[1, 2]), wire.read()
    (0.5, 0.5)
    """
    module = find_layer(model, layer)
    where = f"layer {layer!r} ({type(module).__name__})"
    weight, index = _element(module, output, input, part, where)
    taps = () if tap is None else (tap,) if isinstance(tap, int) else tuple(tap)
    full = (*index, *taps)
    if len(full) != weight.ndim:
        wanted = "no tap" if weight.ndim == 2 else f"a tap of {weight.ndim - 2} numbers"
        raise ModelError(f"{where}: expected {wanted}, got {taps or None}")
    for axis, (at, size) in enumerate(zip(full, weight.shape, strict=True)):
        if not 0 <= at < size:
            raise ModelError(f"{where}: axis {axis} of its weight has {size} places, there is no {at}")
    return Connection(layer, weight, full)


def _element(
    module: nn.Module, output: int, input: int, part: str | None, where: str
) -> tuple[Tensor, tuple[int, int]]:
    """The tensor, and the place of the pair of units on its first two axes."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        _only(part, where)
        inside = input - output // (module.out_channels // module.groups) * module.weight.shape[1]
        if not 0 <= inside < module.weight.shape[1]:
            raise ModelError(f"{where}: input {input} is not connected to output {output} ({module.groups} groups)")
        return module.weight, (output, inside)
    if isinstance(module, nn.RNNBase):
        return _recurrent_rows(module, part, where), (output, input)
    if isinstance(module, nn.MultiheadAttention):
        if part not in ("q", "k", "v", "out"):
            raise UnknownNameError(f"part of {where}", str(part), ("q", "k", "v", "out"))
        return attention_rows(module, part)[0], (output, input)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        raise ModelError(f"{where} does not connect input units to output units; choose a layer that does")
    _only(part, where)
    return weight, (output, input)


def _recurrent_rows(module: nn.RNNBase, part: str | None, where: str) -> Tensor:
    symbols = {}
    for name, weight in module.named_parameters():
        if name.startswith("weight_"):
            source, level = name.removeprefix("weight_").split("h_", 1)
            for place, gate in enumerate(gates(module)):
                rows = weight[place * module.hidden_size : (place + 1) * module.hidden_size]
                symbols[f"W_{source}{gate}" + ("" if level == "l0" else f"_{level}")] = rows
    if part not in symbols:
        raise UnknownNameError(f"part of {where}", str(part), symbols)
    return symbols[part]


def _only(part: str | None, where: str) -> None:
    if part:
        raise UnknownNameError(f"part of {where}", part, ())

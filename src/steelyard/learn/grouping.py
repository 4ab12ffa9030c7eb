"""Weights that stand and fall together: those of a neuron, a filter, an input feature or an attention head.

Decides which elements of which parameters form a group. Knows nothing of penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from steelyard.core.where import Where
from steelyard.errors import ModelError, UnknownNameError, quoted
from steelyard.learn.parameters import Named, as_where, choose_parameters, named_parameters

Units = Literal["outputs", "inputs", "heads"]
Fold = Callable[[Tensor], Tensor]  # a parameter as (groups, members), or back; both are views where that is possible


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter and how its elements fall into groups."""

    parameter: nn.Parameter
    fold: Fold
    unfold: Fold


@dataclass(frozen=True, eq=False)
class Members:
    """Groups of equal size over one parameter or several."""

    name: str
    parts: Sequence[Part]
    groups: int
    size: int  # members of each group

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the members."""
        return [part.parameter for part in self.parts]

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters, as one row of members for each group."""
        return torch.cat([part.fold(t) for part, t in zip(self.parts, tensors, strict=True)], 1)

    def put(self, rows: Tensor) -> None:
        """Write rows back into the parameters."""
        widths = [part.parameter.numel() // self.groups for part in self.parts]
        for part, piece in zip(self.parts, rows.split(widths, 1), strict=True):
            part.parameter.copy_(part.unfold(piece))


def members(model: nn.Module, units: Units, size: int, where: Where | str | None) -> list[Members]:
    """The groups of the chosen parameters of a model; one entry for each parameter, or each attention layer.

    Raises UnknownNameError for other units, ModelError where nothing is chosen or units do not divide into groups.
    """
    if units not in get_args(Units):
        raise UnknownNameError("kind of units", str(units), get_args(Units))
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise ModelError(f"GroupL1: size={size!r}: expected a positive whole number of units in a group")
    if units == "heads":
        if size != 1:
            raise ModelError('GroupL1: the heads of a layer are its own: leave size out, or say units="inputs"')
        return _heads(model, where)
    chosen = [p for p in choose_parameters(model, where, "GroupL1") if p.parameter.ndim >= 2]
    if not chosen:
        raise ModelError("GroupL1 chooses no matrix: its parameters have fewer than two axes")
    return [_along(p, units, size) for p in chosen]


def _along(named: Named, units: Units, size: int) -> Members:
    """Neighbouring slices of the axis of the outputs or the inputs."""
    owner, w = next(iter(named.names.values())), named.parameter
    turned = isinstance(owner, nn.modules.conv._ConvTransposeNd)  # (inputs, outputs / groups, taps)
    axis = int((units == "inputs") != turned)
    count = w.shape[axis]
    if count % size:
        raise ModelError(f"GroupL1: {quoted(named.name)} has {count} {units}: no multiple of size={size}")
    first = w.movedim(axis, 0).shape

    def fold(t: Tensor) -> Tensor:
        return t.movedim(axis, 0).reshape(count // size, -1)

    def unfold(rows: Tensor) -> Tensor:
        return rows.reshape(first).movedim(0, axis)

    return Members(named.name, [Part(w, fold, unfold)], count // size, w.numel() * size // count)


def _heads(model: nn.Module, where: Where | str | None) -> list[Members]:
    """The heads of each nn.MultiheadAttention: rows of the projections into them, columns of the one out of them."""
    chosen, found = as_where(where), []
    names = {id(p.parameter): p for p in named_parameters(model)}
    for layer in model.modules():
        if not isinstance(layer, nn.MultiheadAttention):
            continue
        out = layer.out_proj.weight
        if not out.requires_grad or not (chosen is None or names[id(out)].fits(chosen)):
            continue
        parts = [Part(out, partial(_columns, layer.num_heads), partial(_from_columns, layer.head_dim))]
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            w = getattr(layer, name)
            if w is not None:
                blocks = 3 if name == "in_proj_weight" else 1
                fold = partial(_rows, blocks, layer.num_heads)
                parts.append(Part(w, fold, partial(_from_rows, blocks, w.shape[1])))
        size = sum(part.parameter.numel() for part in parts) // layer.num_heads
        found.append(Members(names[id(out)].name, parts, layer.num_heads, size))
    if not found:
        raise ModelError(
            "GroupL1 finds no trainable nn.MultiheadAttention that is chosen by its out_proj.weight; for another layer "
            'say GroupL1(strength, "inputs", size=width of a head, where="*out.weight")'
        )
    return found


def _columns(heads: int, w: Tensor) -> Tensor:  # (out, heads * width) -> (heads, out * width)
    return w.unflatten(1, (heads, -1)).movedim(1, 0).flatten(1)


def _from_columns(width: int, rows: Tensor) -> Tensor:
    return rows.unflatten(1, (-1, width)).movedim(0, 1).flatten(1)


def _rows(blocks: int, heads: int, w: Tensor) -> Tensor:  # (blocks * heads * width, in) -> (heads, blocks * width * in)
    return w.unflatten(0, (blocks, heads, -1)).movedim(1, 0).flatten(1)


def _from_rows(blocks: int, inputs: int, rows: Tensor) -> Tensor:
    return rows.unflatten(1, (blocks, -1, inputs)).movedim(0, 1).flatten(0, 2)

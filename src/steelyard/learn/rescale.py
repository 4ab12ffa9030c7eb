"""The scales of single layers: what the standard deviation of an output is, and how attention and gates get theirs.

Decides when there is no scale to correct. Knows one call of one layer; what calls have in common is in ``datadriven``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.gates import cell_sums, depths
from steelyard.learn.matrices import is_started, matrices, unit_axis

STEPS = 8  # runs of one recurrent layer by itself, to find the scale of its inputs
CLOSE = 0.002  # of a standard deviation: the next run would not be seen


def spread(output: Tensor, name: str) -> Tensor:
    """The standard deviation of an output; raises ModelError where there is none to correct."""
    if output.numel() < 2:
        few = "a single number" if output.numel() else "no number"
        raise ModelError(f"the layer {name!r} gives {few} on this batch; start with a batch of more samples")
    std = output.std(unbiased=False)
    value = float(std.detach())
    if not math.isfinite(value) or value < 1e-30:
        what = "only equal values" if value < 1e-30 else "values that are not finite"
        raise ModelError(f"the layer {name!r} gives {what} on this batch; start with real inputs that vary")
    return std


def unit_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Of each unit over all samples and places, in a shape that can be taken from the output."""
    axis = unit_axis(layer, output)
    return output.detach().mean([i for i in range(output.ndim) if i != axis], keepdim=True)


def is_scaled(layer: nn.Module) -> bool:
    """Whether all matrices of a layer may be given another scale."""
    return all(is_started(getattr(layer, matrix.parameter)) for matrix in matrices(layer))


def scale_projections(layer: nn.MultiheadAttention, args: Any, kwargs: Any) -> None:
    """Give queries, keys and values standard deviation 1."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    with torch.no_grad():
        for matrix, what in zip(matrices(layer), ("query", "key", "value"), strict=True):
            sums = given[what] @ matrix.values.mT
            matrix.values.div_(spread(sums, f"projection of the {what}"))


def scale_gates(layer: nn.RNNBase, args: Any, name: str) -> float:
    """Scale the input matrices of a recurrent layer until the sums into its gates have standard deviation 1."""
    product = 1.0
    for depth in depths(layer, args):
        for _ in range(STEPS):
            std = float(spread(depth.sums(), name))
            if abs(std - 1) < CLOSE:
                break
            for suffix in depth.suffixes:
                getattr(layer, f"weight_ih{suffix}").detach().div_(std)
            product /= std
    return product


def scale_cell(cell: nn.RNNCellBase, args: Any, wanted: float, name: str) -> float:
    """Scale the input matrix of a cell so that the sums into its gates have the standard deviation `wanted`."""
    ratio = wanted / float(spread(cell_sums(cell, args), name))
    cell.weight_ih.detach().mul_(ratio)
    return ratio

"""A pre-activation as a ledger: every input times its weight, and the bias, which add up to it.

Decides which sum to open (sample, position, output) and how the ledger is laid out; the sums themselves
are in ``affine``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.affine import Affine, affine, parts
from steelyard.explain.layers import find_layer, record


def contributions(
    model: nn.Module,
    inputs: Any,
    layer: str,
    output: int | None = None,
    *,
    sample: int = 0,
    position: Sequence[int] | int | None = None,
    part: str | None = None,
    features: Sequence[str] | None = None,
) -> Table:
    """The products w_j * x_j and the bias that one pre-activation is the sum of, largest first.

    z = b + sum_j w_j x_j, for a unit of a dense layer, a channel of a convolution at one position, a gate of
    a recurrent layer at one step, or a projection of attention at one token.

    Args:
        model: any module; it is run once, in evaluation mode, without gradients.
        inputs: what the model takes, with samples on the first axis; a tuple is several arguments.
        layer: the name of the layer in ``named_modules()``.
        output: the unit or channel; None chooses the one with the largest pre-activation.
        sample: which of the samples.
        position: pixel, step or token, as an index per axis; None chooses the largest pre-activation.
        part: which sum of a layer that has several: a gate (``f``, ``n_l1``) or ``q``, ``k``, ``v``, ``out``.
        features: names of the terms, in the order of the layer's inputs.

    Returns a table of term, weight, value and contribution; its meta holds the sum, the layer's own
    pre-activation and their relative error.

    Raises UnknownNameError for a layer or part that is not there, ModelError for an index out of range.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[2.0, -1.0]])), layer.bias.fill_(0.5)
    >>> table = contributions(layer, torch.tensor([[3.0, 1.0]]), "", 0)
    >>> list(zip(table.column("term"), table.column("contribution")))
    [('0', 6.0), ('1', -1.0), ('bias', 0.5)]
    """
    sums = affine(record(model, inputs, [layer])[layer], part)
    if features is not None and len(features) != len(sums.terms):
        raise ModelError(f"layer {layer!r} sums {len(sums.terms)} terms, got {len(features)} feature names")
    row, output = _choose(sums, output, sample, position)
    products, values, weights = sums.products(output)[row], sums.values_of(output)[row], sums.weight[output]
    bias = float(sums.bias[min(row, len(sums.bias) - 1), output])
    names = list(features or sums.terms)
    rows: list[dict[str, Any]] = [
        {"term": names[j], "weight": float(weights[j]), "value": float(values[j]), "contribution": float(products[j])}
        for j in products.abs().argsort(descending=True, stable=True).tolist()
    ]
    rows.append({"term": "bias", "weight": bias, "value": 1.0, "contribution": bias})
    total, actual = sum(r["contribution"] for r in rows), float(sums.actual[row, output])
    scale = max(abs(actual), *(abs(r["contribution"]) for r in rows))
    meta = {
        "layer": layer,
        "part": part or parts(find_layer(model, layer))[0],
        "output": output,
        "sample": sample,
        "position": [int(i) for i in np.unravel_index(row, sums.shape)[1:]],
        "sum": total,
        "pre-activation": actual,
        "relative error": abs(total - actual) / scale if scale else 0.0,
    }
    heads = [
        Column("term"),
        Column("weight", about="w_j"),
        Column("value", about="x_j, what the weight multiplies"),
        Column("contribution", about="w_j * x_j"),
    ]
    return Table.of(f"contributions to {layer or 'the layer'}, output {output}", heads, rows, meta)


def _choose(sums: Affine, output: int | None, sample: int, position: Sequence[int] | int | None) -> tuple[int, int]:
    """The row and the output to open; what is left out is where the pre-activation is largest."""
    outputs = sums.actual.shape[1]
    if output is not None and not 0 <= output < outputs:
        raise ModelError(f"the layer has {outputs} outputs, there is no output {output}")
    if not 0 <= sample < sums.shape[0]:
        raise ModelError(f"there are {sums.shape[0]} samples, there is no sample {sample}")
    z = sums.actual.reshape(*sums.shape, outputs)[sample]
    if position is not None:
        at = (position,) if isinstance(position, int) else tuple(position)
        inside = len(at) == z.ndim - 1 and all(0 <= i < n for i, n in zip(at, z.shape, strict=False))
        if not inside:
            raise ModelError(f"a position of this layer is {z.ndim - 1} numbers below {list(z.shape[:-1])}, got {at}")
    else:
        best = z.amax(-1) if output is None else z[..., output]
        at = tuple(int(i) for i in np.unravel_index(int(best.argmax()), best.shape)) if best.ndim else ()
    unit = output if output is not None else int(z[at].argmax())
    return int(np.ravel_multi_index((sample, *at), sums.shape)), unit


def balance(model: nn.Module, inputs: Any, layers: Sequence[str] | None = None) -> Table:
    """Every weighted sum of a model on `inputs`, added up from its contributions and compared with the layer.

    The relative error is max|sum + bias - pre-activation| / max|pre-activation| of the layer, or of the
    layer's output when it is computed from these sums, whichever is larger (gates and heads are fused
    inside torch and are seen only through the output).

    Args:
        model: any module.
        inputs: what it takes; every sample and position is added up.
        layers: names; None = every dense, convolutional, recurrent and attention layer that runs.

    >>> import torch
    >>> balance(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(5, 4)).column("sums")
    [15, 10]
    """
    names = list(layers) if layers is not None else [n for n, m in model.named_modules() if _opens(m)]
    if not names:
        raise UnknownNameError("layer with weighted sums", "*", [n for n, _ in model.named_modules() if n])
    names = [n for n in names if not any(_owns(model, other, n) for other in names)]
    calls = record(model, inputs, names)
    rows = []
    for name in names:
        for part in parts(calls[name].layer):
            sums = affine(calls[name], part)
            error = max(sums.error(), sums.closing)
            rows.append({"layer": name, "part": part, "sums": sums.actual.numel(), "relative error": error})
    columns = [
        Column("layer"),
        Column("part", about="gate or projection"),
        Column("sums", about="pre-activations that were added up"),
        Column("relative error", about="largest difference, relative to the largest pre-activation"),
    ]
    worst = max((r["relative error"] for r in rows), default=0.0)
    return Table.of("contributions against pre-activations", columns, rows, {"worst": worst})


def _opens(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.MultiheadAttention))


def _owns(model: nn.Module, other: str, name: str) -> bool:
    """An attention layer uses its own output projection without calling it."""
    return name == f"{other}.out_proj".removeprefix(".") and isinstance(find_layer(model, other), nn.MultiheadAttention)

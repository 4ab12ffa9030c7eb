"""Backpropagation checked against finite differences, weight by weight, on the user's own model and loss.

Decides the step and which weights are tried; works on a float64 copy, so that what is seen is a wrong
gradient and not rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.explain.layers import forward


def check_gradients(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], tries: int = 32, step: float = 1e-5, seed: int = 0
) -> Table:
    """dL/dw by backpropagation against (L(w + step) - L(w - step)) / (2 step), for every trainable tensor.

    Args:
        model: any module; a copy in float64 and evaluation mode is used, so dropout is off.
        batch: (inputs, targets).
        loss: of outputs and targets: a scalar, or a value for each example (then the mean is taken).
        tries: weights tried per tensor, chosen at random; a smaller tensor is tried whole.
        step: of the finite difference; its error is of order step^2.
        seed: of the choice of weights.

    Returns a row per tensor: how many weights were tried and the largest relative error,
    |a - n| / max(|a|, |n|, 0.001 of the tensor's largest gradient). The meta holds the worst of all.

    Raises ModelError if nothing is trainable.

    >>> batch = torch.ones(4, 3), torch.zeros(4, 2)
    >>> check_gradients(nn.Linear(3, 2), batch, nn.functional.mse_loss).meta["worst"] < 1e-6
    True
    """
    twin = copy.deepcopy(model).double().eval()
    inputs, targets = _double(batch[0]), _double(batch[1])
    parameters = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError("the model has no trainable weight whose gradient could be checked")

    def value() -> Tensor:
        return loss(forward(twin, inputs), targets).mean()

    found = torch.autograd.grad(value(), list(parameters.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        flat = parameter.detach().view(-1)
        at = torch.randperm(len(flat), generator=generator)[:tries].tolist()
        analytic = torch.zeros_like(flat) if gradient is None else gradient.reshape(-1)
        floor = max(1e-3 * float(analytic.abs().max()), 1e-12)
        errors = [_error(float(analytic[i]), _slope(value, flat, i, step), floor) for i in at]
        rows.append({"tensor": name, "tried": len(at), "relative error": max(errors, default=0.0)})
    columns = [Column("tensor"), Column("tried", about="weights tried"), Column("relative error", about="the largest")]
    return Table.of("gradients against finite differences", columns, rows, {"worst": max(_errors(rows)), "step": step})


def _errors(rows: list[dict[str, Any]]) -> list[float]:
    return [r["relative error"] for r in rows]


def _error(a: float, n: float, floor: float) -> float:
    return abs(a - n) / max(abs(a), abs(n), floor)


def _slope(value: Callable[[], Tensor], flat: Tensor, at: int, step: float) -> float:
    """The central difference in one weight; the weight is as before afterwards."""
    before = flat[at].clone()
    with torch.no_grad():
        ends = []
        for move in (step, -step):
            flat[at] = before + move
            ends.append(float(value()))
        flat[at] = before
    return (ends[0] - ends[1]) / (2 * step)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return tuple(_double(v) for v in value) if isinstance(value, tuple) else value

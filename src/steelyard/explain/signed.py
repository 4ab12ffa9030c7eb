"""In which direction an input moves an output, through any depth, and whether it really does.

The slope is the gradient (the sum over all paths of the products of weights and local slopes); the proof
is a finite difference of a stated size. Knows nothing of how important an input is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError


def signed(
    model: nn.Module, inputs: Tensor, output: int, *, step: float = 0.1, features: Sequence[str] | None = None
) -> Table:
    """The signed effect of every input on one output, and how often its sign is that of a finite difference.

    slope_j = mean over samples of d z_output / d x_j; agreement_j = share of samples in which the sign of
    that sample's gradient is the sign of z(x + h_j e_j) - z(x - h_j e_j), with h_j = step * std of x_j (of
    all inputs, where x_j is constant). Two zeros agree.

    Args:
        model: takes `inputs` and returns (samples, outputs); a copy in float64 and evaluation mode is used.
        inputs: (samples, ...), floating point.
        output: which output.
        step: in standard deviations of each input.
        features: names of the inputs, flattened.

    Returns a row per input; the meta holds the agreement over all samples and inputs.

    Raises ModelError for an output that is not there or a wrong number of names.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[2.0, -1.0]]))
    >>> table = signed(layer, torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), 0)
    >>> table.column("sign"), table.meta["agreement"]
    (['+', '-'], 1.0)
    """
    twin = copy.deepcopy(model).double().eval()
    x = inputs.detach().double().clone().requires_grad_()
    z = twin(x)
    if z.ndim != 2 or not 0 <= output < z.shape[1]:
        raise ModelError(f"expected outputs (samples, more than {output}), the model returned {list(z.shape)}")
    (slope,) = torch.autograd.grad(z[:, output].sum(), x)
    flat, slope = x.detach().flatten(1), slope.flatten(1)  # (samples, inputs)
    names = list(features) if features is not None else [str(j) for j in range(flat.shape[1])]
    if len(names) != flat.shape[1]:
        raise ModelError(f"the model has {flat.shape[1]} inputs, got {len(names)} feature names")
    sizes = flat.std(0, correction=0)
    sizes = step * torch.where(sizes > 0, sizes, flat.std(correction=0).clamp_min(1e-12))
    moved = _differences(twin, flat, sizes, output, x.shape)
    tiny = 1e-12 * slope.abs().max().clamp_min(1e-300)
    agree = _sign(slope, tiny) == _sign(moved / (2 * sizes), tiny)
    mean = slope.mean(0)
    rows = [
        {
            "input": names[j],
            "slope": float(mean[j]),
            "sign": "+" if mean[j] > tiny else "-" if mean[j] < -tiny else "0",
            "positive": float((slope[:, j] > tiny).double().mean()),
            "agreement": float(agree[:, j].double().mean()),
        }
        for j in range(len(names))
    ]
    columns = [
        Column("input"),
        Column("slope", about="mean gradient of the output"),
        Column("sign"),
        Column("positive", "%", "samples in which the slope is positive"),
        Column("agreement", "%", "samples in which a finite difference has the same sign"),
    ]
    meta = {"output": output, "step": step, "agreement": float(agree.double().mean()), "samples": len(flat)}
    return Table.of(f"signed effects on output {output}", columns, rows, meta)


def _differences(twin: nn.Module, flat: Tensor, sizes: Tensor, output: int, shape: torch.Size) -> Tensor:
    """z(x + h_j e_j) - z(x - h_j e_j) for every sample and input: (samples, inputs)."""
    found = torch.empty_like(flat)
    with torch.no_grad():
        for j, size in enumerate(sizes):
            ends = []
            for move in (size, -size):
                moved = flat.clone()
                moved[:, j] += move
                ends.append(twin(moved.reshape(shape))[:, output])
            found[:, j] = ends[0] - ends[1]
    return found


def _sign(x: Tensor, tiny: Tensor) -> Tensor:
    return (x > tiny).int() - (x < -tiny).int()

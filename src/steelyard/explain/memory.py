"""How far back a recurrent network remembers: the gradient of its last state with respect to the earlier ones.

Decides what is measured and in what unit. Knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.explain.layers import record
from steelyard.learn.gates import depths
from steelyard.learn.task import batch_arguments

ENOUGH = 0.01  # of the gradient: what is below has been forgotten
PROBES = 8  # random directions of the last state


def memory(model: nn.Module, batch: Any, *, probes: int = PROBES, seed: int = 0) -> Table:
    """||dh_T / ds_t|| of every recurrent layer, for each lag T - t, relative to a state that is kept as it is.

    s is what a layer carries from step to step: the hidden state h, and in an LSTM the cell state c as well. The norm
    is Frobenius', divided by the root of the number of units, over all samples: 1 is what an identity lets through,
    smaller vanishes, larger explodes (Pascanu et al. 2013). It is estimated from random directions of h_T; the inputs
    of the layer are held. A layer of several levels or directions is one of each: 'rnn.l0', 'rnn.l0_reverse'.

    Args:
        model: any module with an nn.RNN, nn.LSTM or nn.GRU; it is run in evaluation mode and left as it was.
        batch: a Batch, a tensor or a tuple of arguments; a few samples are enough.
        probes: random directions; the relative error of a norm is about 1 / sqrt(2 probes samples).
        seed: of the directions.

    Returns a row for each layer and lag, the longest last. In ``meta``, for each layer: "per step", the factor by which
    the gradient changes at a step (by least squares on its logarithm), and "reach", the steps after which less than 1 %
    is left, or None if that is beyond the sequence.

    Raises ModelError for a model without recurrent layers, for projections, and for packed sequences.

    >>> lstm = nn.LSTM(2, 16, batch_first=True)
    >>> memory(lstm, torch.zeros(4, 30, 2)).column("lag")[-1]
    29
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.RNNBase)]
    if not names:
        raise ModelError(f"{type(model).__name__} has no recurrent layer (nn.RNN, nn.LSTM, nn.GRU): there is no state "
                         "that it carries from step to step")  # fmt: skip
    calls = record(model, batch_arguments(batch), names)
    rows: list[dict[str, Any]] = []
    meta: dict[str, Any] = {}
    for name, call in calls.items():
        for label, alone, inputs in _single(name, call.layer, call.args):
            curve = _curve(alone, inputs, probes, seed)
            rows += [{"layer": label, "lag": lag, "gradient": value} for lag, value in enumerate(curve)]
            meta[label] = {"per step": _per_step(curve), "reach": _reach(curve)}
    columns = [Column("layer"), Column("lag", "", "steps from the state to the last one"),
               Column("gradient", "", "||dh_T/ds_t|| / sqrt(units); 1 is kept")]  # fmt: skip
    return Table.of("memory of the recurrent layers", columns, rows, meta)


def _single(name: str, layer: nn.RNNBase, args: tuple[Any, ...]) -> Iterator[tuple[str, nn.RNNBase, Tensor]]:
    """Each level and direction as a layer of its own in float64, with its inputs (time, samples, features)."""
    if layer.proj_size:
        raise ModelError(f"{name or 'the layer'} projects its state (proj_size): its memory is not measured")
    if not isinstance(args[0], Tensor):
        raise ModelError("packed sequences have no common last step: pass a padded tensor")
    for depth in depths(layer, args):
        inputs = depth.inputs.detach().double()
        inputs = inputs[:, None] if inputs.ndim == 2 else inputs.transpose(0, 1) if layer.batch_first else inputs
        for suffix in depth.suffixes:
            options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
            alone = type(layer)(inputs.shape[-1], layer.hidden_size, bias=layer.bias, dtype=torch.float64,
                                device=inputs.device, **options)  # fmt: skip
            with torch.no_grad():
                for leaf, parameter in alone.named_parameters():
                    parameter.copy_(getattr(layer, leaf.replace("_l0", suffix)))
            label = f"{name}.{suffix[1:]}" if name else suffix[1:]
            yield label, alone, inputs.flip(0) if suffix.endswith("reverse") else inputs


def _curve(layer: nn.RNNBase, inputs: Tensor, probes: int, seed: int) -> list[float]:
    """The relative norm for each lag, from 0."""
    steps, samples = inputs.shape[:2]
    zeros = inputs.new_zeros(1, samples, layer.hidden_size)
    state: Any = (zeros, zeros) if isinstance(layer, nn.LSTM) else zeros
    states: list[tuple[Tensor, ...]] = []
    with torch.enable_grad():
        for t in range(steps):
            state = layer(inputs[t : t + 1], state)[1]
            if t == 0:
                state = _leaf(state)
            states.append(state if isinstance(state, tuple) else (state,))
    parts = [part for found in states for part in found]
    random = torch.Generator().manual_seed(seed)
    totals = torch.zeros(steps, dtype=torch.float64)
    for i in range(probes):
        direction = torch.randn(zeros.shape, generator=random, dtype=torch.float64).to(inputs.device)
        found = torch.autograd.grad(states[-1][0], parts, direction, retain_graph=i < probes - 1, allow_unused=True)
        squares = torch.tensor([0.0 if g is None else float(g.square().sum()) for g in found], dtype=torch.float64)
        totals += squares.view(steps, -1).sum(1)
    norms = (totals / (probes * samples * layer.hidden_size)).sqrt()
    return [float(value) for value in norms.flip(0)]


def _leaf(state: Any) -> Any:
    return tuple(map(_leaf, state)) if isinstance(state, tuple) else state.detach().requires_grad_()


def _per_step(curve: list[float]) -> float | None:
    """exp of the slope of log gradient over the lag; None where nothing is left to measure."""
    points = [(lag, math.log(value)) for lag, value in enumerate(curve) if value > 0]
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return math.exp(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)


def _reach(curve: list[float]) -> int | None:
    return next((lag for lag, value in enumerate(curve) if value < ENOUGH), None)

"""The equations of RNN, LSTM and GRU, step by step, so that every gate's sum can be seen.

torch computes them in one fused call that shows only the hidden states. Here the gates are summed again in
float64; the hidden states that follow from the sums, compared with the layer's own output, are the proof.
Symbols and order of gates as in the documentation of torch.nn.LSTM and torch.nn.GRU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.explain.layers import Call


@dataclass(frozen=True)
class Sums:
    """One gate of one level: z[b, t, unit] = bias + weight[unit] . values[b, t, group of unit]."""

    values: Tensor  # (samples, steps, groups, terms): the input and the previous hidden state
    weight: Tensor  # (units, terms)
    bias: Tensor  # (1 or samples, 1 or steps, units)
    actual: Tensor  # (samples, steps, units) in the layer's own precision
    hidden: int  # how many of the terms are hidden units

    def totals(self) -> Tensor:
        """The sums of products and bias: (samples, steps, units)."""
        if self.values.shape[2] == 1:
            return self.values[:, :, 0] @ self.weight.T + self.bias
        return (self.values * self.weight).sum(-1) + self.bias


def gates(layer: nn.RNNBase) -> str:
    """The gates of a layer, in the order in which torch stacks their rows."""
    return "ifgo" if isinstance(layer, nn.LSTM) else "rzn" if isinstance(layer, nn.GRU) else "h"


def unroll(call: Call) -> tuple[dict[str, dict[str, Sums]], float]:
    """Each gate's sums by level ('l0', 'l0_reverse', 'l1', ...), and the relative error of the final output.

    Raises ModelError for packed sequences and for projected LSTMs.
    """
    layer, x = call.layer, call.args[0]
    assert isinstance(layer, nn.RNNBase)
    if not isinstance(x, Tensor):
        raise ModelError("packed sequences are not broken into contributions; pass a padded tensor")
    if layer.proj_size:
        raise ModelError("an LSTM with proj_size is not broken into contributions")
    output = call.output[0]
    if x.ndim == 2:
        x, output = x[None], output[None]
    elif not layer.batch_first:
        x, output = x.transpose(0, 1), output.transpose(0, 1)  # (samples, steps, features)
    start = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    levels: dict[str, dict[str, Sums]] = {}
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    below = x.double()
    for level in range(layer.num_layers):
        above = []
        for turn, direction in enumerate(directions):
            state = _start(start, level * len(directions) + turn, len(below), layer.hidden_size)
            name = f"l{level}{direction}"
            sequence = below.flip(1) if direction else below
            levels[name], hidden = _level(layer, name, sequence, state)
            above.append(hidden.flip(1) if direction else hidden)
        below = torch.cat(above, -1)
    return levels, float((below - output).abs().max() / output.abs().max().clamp_min(1e-300))


def _start(start: Tensor | tuple[Tensor, Tensor] | None, index: int, samples: int, units: int) -> tuple[Tensor, Tensor]:
    """h_0 and c_0 of one level: (samples, units)."""
    zeros = torch.zeros(samples, units, dtype=torch.float64)
    if start is None:
        return zeros, zeros
    h, c = start if isinstance(start, tuple) else (start, zeros)
    at = [s[index].double() if isinstance(start, tuple) or s is h else s for s in (h, c)]
    return at[0].reshape(samples, units), at[1].reshape(samples, units)


def _level(layer: nn.RNNBase, name: str, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[dict[str, Sums], Tensor]:
    """The sums of one level and direction, and its hidden states (samples, steps, units)."""
    w = [getattr(layer, f"weight_{s}h_{name}").detach() for s in "ih"]
    b = [getattr(layer, f"bias_{s}h_{name}").detach() if layer.bias else w[0].new_zeros(len(w[0])) for s in "ih"]
    h, c = state
    before = []
    for t in range(x.shape[1]):
        before.append(h)
        from_x, from_h = (
            functional.linear(v, m.double(), o.double()) for v, m, o in zip((x[:, t], h), w, b, strict=True)
        )
        h, c = _step(layer, from_x, from_h, h, c)
    sums = _sums(layer, x, torch.stack(before, 1), w, b)
    return sums, _closed(layer, sums, state[1])


def _closed(layer: nn.RNNBase, sums: dict[str, Sums], c: Tensor) -> Tensor:
    """The hidden states that follow from the gates' sums, by their names: (samples, steps, units)."""
    z = {gate: found.totals() for gate, found in sums.items()}
    if isinstance(layer, nn.GRU):
        before = sums["z"].values[:, :, 0, -layer.hidden_size :]
        keep = z["z"].sigmoid()
        return (1 - keep) * z["n"].tanh() + keep * before
    if not isinstance(layer, nn.LSTM):
        return z["h"].tanh() if layer.mode == "RNN_TANH" else z["h"].relu()
    states = []
    for t in range(z["i"].shape[1]):
        c = z["f"][:, t].sigmoid() * c + z["i"][:, t].sigmoid() * z["g"][:, t].tanh()
        states.append(z["o"][:, t].sigmoid() * c.tanh())
    return torch.stack(states, 1)


def _step(layer: nn.RNNBase, from_x: Tensor, from_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.LSTM):
        i, f, g, o = (from_x + from_h).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if isinstance(layer, nn.GRU):
        (rx, zx, nx), (rh, zh, nh) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        z = (zx + zh).sigmoid()
        return (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh() + z * h, c
    return torch.tanh(from_x + from_h) if layer.mode == "RNN_TANH" else torch.relu(from_x + from_h), c


def _sums(layer: nn.RNNBase, x: Tensor, h: Tensor, w: list[Tensor], b: list[Tensor]) -> dict[str, Sums]:
    """Every gate as one weighted sum of input and hidden state; `actual` in the precision of the weights."""
    own = w[0].dtype
    found: dict[str, Sums] = {}
    units = layer.hidden_size
    for place, gate in enumerate(gates(layer)):
        rows = slice(place * units, (place + 1) * units)
        (wi, wh), (bi, bh) = (m[rows] for m in w), (v[rows] for v in b)
        from_x, from_h = functional.linear(x.to(own), wi, bi), functional.linear(h.to(own), wh, bh)
        values = torch.cat([x, h], -1)[:, :, None]
        bias = (bi.double() + bh.double())[None, None]
        if isinstance(layer, nn.GRU) and gate == "n":  # n = W_in x + b_in + r * (W_hn h + b_hn): r is each unit's own
            reset = found["r"].actual.double().sigmoid()
            wide = x[:, :, None].expand(-1, -1, units, -1)
            values = torch.cat([wide, reset[..., None] * h[:, :, None]], -1)
            bias = bi.double() + reset * bh.double()
            from_h = reset.to(own) * from_h
        weight = torch.cat([wi, wh], 1).double()
        found[gate] = Sums(values, weight, bias, from_x + from_h, units)
    return found

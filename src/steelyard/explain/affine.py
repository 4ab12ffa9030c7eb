"""Every weighted sum inside a layer as one object: the values, the weights that multiply them, the bias.

Decides which rows of which tensor make up a gate, a head's projection or a convolution's output; the
recurrent equations are in ``recurrent``. All sums here are in float64, apart from `actual`, which is what
the layer itself computed in its own precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.layers import Call
from steelyard.explain.recurrent import gates, unroll


@dataclass(frozen=True)
class Affine:
    """z[row, output] = bias[row, output] + sum over terms of weight[output, term] * values[row, group, term]."""

    values: Tensor  # (rows, groups, terms): outputs in equal runs share a group
    weight: Tensor  # (outputs, terms)
    bias: Tensor  # (1 or rows, outputs)
    actual: Tensor  # (rows, outputs): what the layer itself computed
    terms: tuple[str, ...]  # what each term is called
    shape: tuple[int, ...]  # rows as (samples, *positions)
    closing: float = 0.0  # relative error of the layer's output when it is computed from these sums

    def products(self, output: int) -> Tensor:
        """w_j * x_j for one output: (rows, terms)."""
        group = output * self.values.shape[1] // len(self.weight)
        return self.values[:, group] * self.weight[output]

    def values_of(self, output: int) -> Tensor:
        """The values that this output's weights multiply: (rows, terms)."""
        return self.values[:, output * self.values.shape[1] // len(self.weight)]

    def totals(self) -> Tensor:
        """The sums of products and bias: (rows, outputs)."""
        return torch.stack([self.products(o).sum(1) for o in range(len(self.weight))], 1) + self.bias

    def error(self) -> float:
        """The largest |sum + bias - what the layer computed|, relative to its largest value."""
        return relative_error(self.totals(), self.actual)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; NaN where either is not finite."""
    expected = expected.double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected).abs().max() / scale)


def affine(call: Call, part: str | None = None) -> Affine:
    """The weighted sum of one part of a called layer; `part` may be left out where there is only one.

    Parts: gates for recurrent layers (LSTM i f g o, GRU r z n, RNN h; ``f_l1`` for the second level,
    ``f_l0_reverse`` backwards), q k v out for attention. Raises ModelError for a layer without weighted
    sums and UnknownNameError for a part that it does not have.
    """
    known = parts(call.layer)
    if part is None:
        part = known[0]
    if part not in known:
        raise UnknownNameError(f"part of a {type(call.layer).__name__}", part, known)
    build = next(function for kind, _, function in _KINDS if isinstance(call.layer, kind))
    return build(call, part)


def parts(layer: nn.Module) -> tuple[str, ...]:
    """The names of the weighted sums inside a layer; ('',) where there is one."""
    for kind, names, _ in _KINDS:
        if isinstance(layer, kind):
            return names(layer)
    raise ModelError(f"a {type(layer).__name__} has no weighted sum that is known here; choose a layer with weights")


def _linear(call: Call, _part: str) -> Affine:
    assert isinstance(call.layer, nn.Linear)
    x: Tensor = call.args[0]  # (samples, ..., in)
    return _affine(x, call.layer.weight, call.layer.bias, call.output)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, actual: Tensor, closing: float = 0.0) -> Affine:
    w = weight.detach().double()
    b = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().double()
    names = tuple(map(str, range(w.shape[1])))
    values = x.detach().double().reshape(-1, 1, w.shape[1])
    return Affine(values, w, b[None], actual.reshape(-1, len(w)), names, tuple(x.shape[:-1]), closing)


def _convolution(call: Call, _part: str) -> Affine:
    layer, x = call.layer, call.args[0]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    axes = layer.weight.ndim - 2
    x = x if x.ndim == axes + 2 else x[None]
    taps = list(itertools.product(*(range(k) for k in layer.kernel_size)))
    patches = _patches(layer, x.double(), taps)  # (samples, channels, taps, *positions)
    samples, channels, _, *positions = patches.shape
    rows = samples * math.prod(positions)
    values = patches.movedim(1, -1).movedim(1, -1).reshape(rows, layer.groups, -1)  # (rows, groups, channels x taps)
    weight = layer.weight.detach().double().flatten(1)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    actual = call.output.reshape(samples, len(weight), -1).transpose(1, 2).reshape(rows, len(weight))
    names = tuple(f"{c}[{','.join(map(str, t))}]" for c in range(channels // layer.groups) for t in taps)
    return Affine(values, weight, bias.double()[None], actual, names, (samples, *positions))


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, taps: list[tuple[int, ...]]) -> Tensor:
    """What each tap sees at each position, padding included: (samples, channels, taps, *positions)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ]
    views = []
    for tap in taps:
        starts = [t * d for t, d in zip(tap, layer.dilation, strict=True)]
        window = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, layer.stride, strict=True)]
        views.append(padded[(slice(None), slice(None), *window)])
    return torch.stack(views, 2)


def _recurrent(call: Call, part: str) -> Affine:
    assert isinstance(call.layer, nn.RNNBase)
    levels, closing = unroll(call)
    gate, _, level = part.partition("_")
    sums = levels[level or "l0"][gate]
    width = sums.weight.shape[1] - sums.hidden
    names = (*(f"x{j}" for j in range(width)), *(f"h{j}" for j in range(sums.hidden)))
    rows = sums.values.shape[0] * sums.values.shape[1]
    return Affine(
        sums.values.reshape(rows, -1, sums.weight.shape[1]),
        sums.weight,
        sums.bias.expand(*sums.values.shape[:2], -1).reshape(rows, -1),
        sums.actual.reshape(rows, -1),
        names,
        tuple(sums.values.shape[:2]),
        closing,
    )


def _recurrent_parts(layer: nn.Module) -> tuple[str, ...]:
    assert isinstance(layer, nn.RNNBase)
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    levels = [f"_l{n}{d}" for n in range(layer.num_layers) for d in directions]
    return tuple(gate + ("" if level == "_l0" else level) for level in levels for gate in gates(layer))


def _attention(call: Call, part: str) -> Affine:
    """q, k, v from the inputs; out from the heads' mixtures of values, which are computed from q, k, v."""
    layer = call.layer
    assert isinstance(layer, nn.MultiheadAttention)
    given = dict(
        zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), call.args, strict=False)
    )
    given.update(call.kwargs)
    if layer.bias_k is not None or layer.add_zero_attn:
        raise ModelError("attention with bias_k or add_zero_attn is not broken into contributions")
    single = given["query"].ndim == 2
    inputs = {}
    for name, key in (("q", "query"), ("k", "key"), ("v", "value")):
        x = given[key][None] if single else given[key]
        inputs[name] = x if single or layer.batch_first else x.transpose(0, 1)  # (samples, tokens, width)
    output = call.output[0][None] if single else call.output[0]
    output = output if single or layer.batch_first else output.transpose(0, 1)
    sums = {name: _affine(x, *attention_rows(layer, name), _projected(layer, name, x)) for name, x in inputs.items()}
    mixed = _mixed(layer, sums, given)
    out = _affine(mixed, layer.out_proj.weight, layer.out_proj.bias, output)
    closing = out.error()
    return out if part == "out" else _affine(inputs[part], *attention_rows(layer, part), sums[part].actual, closing)


def attention_rows(layer: nn.MultiheadAttention, part: str) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the q, k, v or out projection, as views of the layer's own tensors."""
    if part == "out":
        return layer.out_proj.weight, layer.out_proj.bias
    at = "qkv".index(part) * layer.embed_dim
    rows = slice(at, at + layer.embed_dim)
    bias = None if layer.in_proj_bias is None else layer.in_proj_bias[rows]
    if layer.in_proj_weight is None:
        return getattr(layer, f"{part}_proj_weight"), bias
    return layer.in_proj_weight[rows], bias


def _projected(layer: nn.MultiheadAttention, part: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.linear(x, *attention_rows(layer, part))


def _mixed(layer: nn.MultiheadAttention, sums: dict[str, Affine], given: dict[str, Tensor]) -> Tensor:
    """The heads' mixtures of values, side by side: (samples, tokens, width)."""
    heads = {}
    for name, found in sums.items():
        samples, tokens = found.shape
        heads[name] = found.totals().reshape(samples, tokens, layer.num_heads, -1).transpose(1, 2)
    scores = heads["q"] @ heads["k"].transpose(-1, -2) / math.sqrt(layer.head_dim)  # (samples, heads, tokens, keys)
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    if mask is not None:
        mask = mask.reshape(-1, layer.num_heads, *mask.shape[-2:]) if mask.ndim == 3 else mask
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        scores = scores.masked_fill(padding, -math.inf) if padding.dtype == torch.bool else scores + padding
    return (scores.softmax(-1) @ heads["v"]).transpose(1, 2).flatten(2)


_KINDS: tuple[tuple[type | tuple, Callable[[nn.Module], tuple[str, ...]], Callable[[Call, str], Affine]], ...] = (
    (nn.Linear, lambda _: ("",), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda _: ("",), _convolution),
    (nn.RNNBase, _recurrent_parts, _recurrent),
    (nn.MultiheadAttention, lambda _: ("q", "k", "v", "out"), _attention),
)

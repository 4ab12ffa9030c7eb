"""Weights that are rounded to a few levels in every pass while they are trained, and the steps between, trained too.

Decides the gradients of both. Knows nothing of how a constraint is applied to a module: that is `constrain`.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steelyard.codecs.affine import Affine
from steelyard.core.packed import Packed, pack
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.edit._levels import Levels
from steelyard.errors import WeightsError
from steelyard.formats.module import from_module, to_array
from steelyard.learn.constrain import Constraint, constrain, release
from steelyard.learn.parameters import choose_parameters


class Stepped(Constraint):
    """round(x / step), at most `top` in magnitude, times step; each index of the first axis has a step of its own.

    The gradient passes straight through the rounding where |x / step| <= top and nowhere else; that of a step is the
    one of Esser et al., "Learned Step Size Quantization", ICLR 2020, with their scale 1 / sqrt(top n) for n weights.
    """

    def __init__(self, step: Tensor, top: int):
        super().__init__()
        self.step = nn.Parameter(step)  # (outputs,): of one axis, so that it does not decay
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Round.apply(x, self.step, self.top)
        return found

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The whole numbers of steps, from 0 at -top."""
        return _codes(x, _spread(self.step, x), self.top) + self.top


class _Round(torch.autograd.Function):
    """Exact whole multiples forwards, the gradients of LSQ backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.top = top
        wide = _spread(step, x)
        return _codes(x, wide, top) * wide

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), (x, step), top = gradients, ctx.saved_tensors, ctx.top
        v = x / _spread(step, x)
        inside = v.abs() <= top
        slope = torch.where(inside, v.round() - v, v.sign() * top)
        each = max(1, x[0].numel())
        of_step = (g * slope).flatten(1).sum(1) if x.ndim > 1 else g * slope
        return g * inside, of_step * step.sign() / math.sqrt(top * each), None


def _spread(step: Tensor, x: Tensor) -> Tensor:
    """Steps, never zero, as they broadcast against x."""
    size = step.abs().clamp_min(torch.finfo(step.dtype).tiny)
    return size.reshape(-1, *[1] * (x.ndim - 1))


def _codes(x: Tensor, step: Tensor, top: int) -> Tensor:
    return (x / step).round().clamp(-top, top) + 0.0  # no -0: a file does not keep it


def stepped(model: nn.Module, bits: int = 4, where: Where | str | None = None) -> nn.Module:
    """Train a model whose weights are rounded to 2^bits - 1 levels around zero in every pass: learned step sizes.

    The weights go on as they are, and what the layers see of them is rounded, with one step for each output channel
    that is trained, too. The steps begin where the squared error is least. The gradients are those of `Stepped`.
    `rounded_weights` gives the levels to write; `release` leaves the rounded values as plain weights.

    where: which weights; None: those that decay, of at least two axes. Works in place and returns the model.
    Raises RecipeError for bits outside 2 to 8, ModelError if no weight is chosen, WeightsError for one that is
    constrained already.

    >>> from steelyard.learn.run import train
    >>> from steelyard.learn.tasks import task
    >>> digits = task("digits", model="mlp")
    >>> net = stepped(digits.build(), bits=2)
    >>> run = train(digits, net, epochs=1, progress=False)
    >>> [len(row.unique()) <= 3 for row in net.fc1.weight[:2]]
    [True, True]

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    levels = Levels(bits, symmetric=True)
    for named in choose_parameters(model, where, "where="):
        if named.parameter.ndim < 2:
            continue
        rows = to_array(named.parameter.detach()).reshape(len(named.parameter), -1).astype(np.float64)
        scale, _ = levels.search(rows, None, 2)
        scale = np.where(scale > 0, scale, 1e-3)  # a row of zeros may grow
        step = torch.from_numpy(scale).to(named.parameter.device, named.parameter.dtype)
        constrain(model, named.name, Stepped(step, levels.top // 2))
    return model


def rounded_weights(model: nn.Module) -> Weights:
    """The weights of a model that `stepped` has rounded, those held as levels and steps by the affine codec.

    Raises WeightsError if none is.
    """
    held: dict[str, Packed] = {}
    plain = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found = module.parametrizations.items() if parametrize.is_parametrized(module) else ()
        for attribute, steps in found:
            if isinstance(steps[0], Stepped):
                plain[f"{name}.{attribute}" if name else attribute] = (steps[0], steps.original)
    if not plain:
        raise WeightsError("no weight of the model is rounded while it is trained: call stepped(model) first")
    copy = release(deepcopy(model))
    weights = from_module(copy)
    for name, (step, original) in plain.items():
        bits = (2 * step.top).bit_length()
        codes, scale = to_array(step.codes(original)).astype(np.uint8), to_array(step.step.detach().abs())
        codec = Affine(bits, axis=0)
        parts = {"codes": pack(codes, codec.inner["codes"]), "scale": scale.astype(np.float32)}
        held[weights[name].name] = Packed(weights[name].spec, codec, parts)
    return weights.with_items(
        replace(item, read=partial(_held, held[n]), scheme=held[n].scheme) if n in held else item
        for n, item in weights.items()
    )


def _held(value: Packed) -> Packed:
    return value

"""Weights that are trained as whole numbers of steps, and what coding those numbers will cost.

Decides how rounding is differentiated (straight through), how steps are learned, and the model of probability that
stands for the coder while its cost must have a gradient. Knows nothing of loops, streams or files.

Sources: the straight-through estimator is Bengio, Léonard, Courville, 2013 (arXiv 1308.3432); learned steps are Esser
et al., "Learned step size quantization", ICLR 2020; a penalty on the entropy of latent weights is Oktay et al.,
"Scalable model compression by entropy penalized reparameterization", ICLR 2020; spike and slab is Mitchell and
Beauchamp, 1988.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steelyard.codecs.multiples import MOST
from steelyard.core.packed import Packed, Plan, pack
from steelyard.core.where import Where
from steelyard.errors import CodecError, ModelError, quoted
from steelyard.formats.module import to_array, to_tensor
from steelyard.learn.constrain import Constraint, constrain
from steelyard.learn.parameters import CONNECTIONS, Named, as_where, named_parameters
from steelyard.learn.penalties import Penalty, Term, checked, total

SHARP = 0.1  # how softly the spike ends at half a step, in steps
LEAST_WIDTH = 0.2  # of the slab, in steps
FAST = 10.0  # logits move so much faster than weights under one learning rate
LEAST = 1e-9  # no symbol is held to be less probable


class Levels(Constraint):
    """step * round(x / step), one step for the tensor, and what coding the whole numbers is expected to cost.

    The gradient passes the rounding as if it were not there; the step is learned through what rounding moves. Whole
    numbers beyond what `Multiples` holds (255) are held back there, and the step grows if they need to be. Bits
    are those of a spike at zero and a two-sided geometric slab: the coder's flag "is it zero", whose log odds are the
    sum of one number for the row (the first axis), one for the column (all others) and one for the tensor, and its
    sign and magnitude. Between whole numbers the masses of bins of width 1 interpolate, so that the cost has a
    gradient.
    """

    def __init__(self, x: Tensor, step: float):
        super().__init__()
        rows = x.shape[0] if x.ndim > 1 else 1
        columns = x.numel() // rows if x.ndim > 1 else 1
        like = {"dtype": x.dtype, "device": x.device}
        self.log_step = nn.Parameter(torch.tensor([math.log(step)], **like))
        self.row = nn.Parameter(torch.zeros(rows, **like))
        self.column = nn.Parameter(torch.zeros(columns, **like))
        self.shape = nn.Parameter(torch.zeros(2, **like))  # log odds of not zero / FAST, log width of the slab
        self.register_buffer("fixed", None)

    fixed: Tensor | None  # the numbers, once they are no longer trained

    def forward(self, x: Tensor) -> Tensor:
        step = self.log_step.exp()
        if self.fixed is not None:
            return self.fixed * step
        scaled = (x / step).clamp(-MOST, MOST)
        return (scaled + (scaled.detach().round() - scaled.detach())) * step

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def settled(self, x: Tensor) -> Tensor:
        """The numbers times the nearest bfloat16: small multiples of it are exact, and `Multiples` holds them."""
        return self.numbers(x) * self.log_step.exp().bfloat16().to(x.dtype) + 0.0  # no negative zeros

    def bits(self, x: Tensor) -> Tensor:
        """The expected bits of coding round(x / step), a number with a gradient; x: the latent weights."""
        table = x.reshape(len(self.row), -1)
        odds = FAST * (self.row[:, None] + self.column + self.shape[0])
        if x.ndim < 2:
            odds = odds.expand_as(table)
        found: Tensor = _Bits.apply(table, self.log_step, odds, self.shape[1])
        return found

    @torch.no_grad()
    def numbers(self, x: Tensor) -> Tensor:
        """round(x / step), of the shape and dtype of x, or what they were fixed at."""
        return (x / self.log_step.exp()).round().clamp(-MOST, MOST) if self.fixed is None else self.fixed

    @torch.no_grad()
    def fix(self, x: Tensor) -> None:
        """From now on the numbers stay, and only the step is trained."""
        self.fixed = self.numbers(x) + 0.0  # no negative zeros


class _Bits(torch.autograd.Function):
    """-log2 of ((1 - p) spike + p slab), summed; the gradient is computed with the value, in one pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,  # (rows, columns)
        log_step: Tensor,  # (1,)
        odds: Tensor,  # (rows, columns): log odds of not being zero
        log_width: Tensor,  # of the slab
    ) -> Tensor:
        step, width = log_step.exp(), log_width.exp().clamp(min=LEAST_WIDTH)
        z = x.abs() / step
        spike, p = torch.sigmoid((0.5 - z) / SHARP), torch.sigmoid(odds)
        near, far = torch.exp((z - 0.5).abs() / -width) / 2, torch.exp((z + 0.5) / -width) / 2
        slab = torch.where(z < 0.5, 1 - near, near) - far
        mass = torch.lerp(spike, slab, p).clamp(min=LEAST)
        over = (-1 / math.log(2)) / mass  # the derivative of -log2
        by_z = over * torch.lerp(spike * (spike - 1) / SHARP, (far - near) / width, p)
        by_odds = over * (slab - spike) * p * (1 - p)
        by_width = (over * p * (near * (z - 0.5) - far * (z + 0.5))).sum() / width
        by_width = by_width * (log_width.exp() > LEAST_WIDTH)
        ctx.save_for_backward(by_z * x.sign() / step, -(by_z * z).sum().reshape(1), by_odds, by_width.reshape(()))
        return -mass.log2().sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients[0] * part for part in ctx.saved_tensors)  # type: ignore[attr-defined]


class StraightThrough(Constraint):
    """decode(encode(x)) of any plan, its gradient that of x: training sees what the file will hold."""

    def __init__(self, plan: Plan, name: str):
        super().__init__()
        self.plan, self.name = plan, name

    def forward(self, x: Tensor) -> Tensor:
        try:
            held = pack(to_array(x.detach()), self.plan)
        except CodecError as error:
            raise CodecError(f"{quoted(self.name)}: {error}") from error
        decoded = to_tensor(held.array() if isinstance(held, Packed) else held).to(x.device)
        return decoded + (x - x.detach())  # in this order the values are exactly those of the codec

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


def levelled(model: nn.Module, where: Where | str | None = None, step: float = 1.0) -> nn.Module:
    """Let a model compute with whole numbers of steps, while what an optimizer moves stays continuous.

    where: the parameters that are rounded; None: the weights that decay by `decay_groups`, and the biases beside
    them. step: the size at the beginning, in root mean squares of each tensor (0.01 where that is smaller); steps are
    trained with the rest. Apply it before the optimizer is made; `release` leaves the rounded values as plain
    parameters. Train it with `EntropyRate`, or the numbers stay as large as they are. Works in place and returns the
    model. Raises ModelError if nothing is chosen or a step is no positive number, WeightsError for a tensor that is
    constrained already.

    >>> layer = levelled(nn.Linear(4, 2, bias=False))
    >>> step = layer.parametrizations.weight[0].log_step.exp()
    >>> bool(((layer.weight / step).round() * step == layer.weight).all())
    True
    """
    if not (isinstance(step, (int, float)) and 0 < step < math.inf):
        raise ModelError(f"step={step!r}: expected a number of root mean squares, more than 0")
    for chosen in _chosen(model, where, "levelled"):
        x = chosen.parameter.detach()
        if not bool(x.isfinite().all()):
            raise ModelError(f"{quoted(chosen.name)} has values that are not finite: there are no steps to round to")
        scale = max(float(x.float().square().mean().sqrt()), 0.01)
        constrain(model, chosen.name, Levels(x, step * scale))
    return model


def straight_through(model: nn.Module, plan: Plan, where: Where | str | None = None) -> nn.Module:
    """Let a model compute with what a codec would leave of its weights; the gradient is that of the weights.

    plan: any codec or nesting, ``Affine(bits=4, axis=0)`` or ``Palette(16)`` for example: it encodes and decodes at
    each pass, so that training sees the levels that a file will hold (quantization-aware training; Jacob et al. 2018).
    where: as for `levelled`, but without biases. `release` leaves what the codec leaves. Works in place and returns
    the model. Raises ModelError if nothing is chosen, and at a pass CodecError for a tensor that it cannot hold.

    >>> from steelyard.codecs.affine import Affine
    >>> layer = straight_through(nn.Linear(4, 2), Affine(bits=2))
    >>> len(layer.weight.unique()) <= 3
    True
    """
    for chosen in _chosen(model, where, "straight_through", biases=False):
        constrain(model, chosen.name, StraightThrough(plan, chosen.name))
    return model


def levels_of(model: nn.Module) -> dict[str, tuple[Levels, nn.Parameter]]:
    """What is rounded in a model, each tensor once: its rounding and its latent weights by plain name."""
    latent = {id(p.parameter): p.name for p in named_parameters(model)}
    found: dict[str, tuple[Levels, nn.Parameter]] = {}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for steps in module.parametrizations.values():  # type: ignore[union-attr, operator]
                if isinstance(steps[0], Levels):
                    found.setdefault(latent[id(steps.original)], (steps[0], steps.original))
    return found


@dataclass(frozen=True, eq=False)
class EntropyRate(Penalty):
    """strength * bits: what coding the whole numbers of `levelled` tensors is expected to cost, beside the loss.

    The loss of a Run is a mean over examples, so that strength = ln 2 / examples weighs a bit of the weights like a
    bit of the labels (minimum description length); a fraction of that keeps more of the accuracy. ramp: the fraction
    of a run during which the strength rises evenly from 0 (in a loop of your own say ``penalized.at(fraction)``).
    Rows and columns that are not worth their bits vanish: all their numbers are zero, and cost next to nothing.

    >>> layer = levelled(nn.Linear(4, 2))
    >>> EntropyRate(1.0).value(layer).item() > 0
    True
    """

    strength: float
    ramp: float = 0.0

    def bind(self, model: nn.Module) -> Term:
        strength, ramp = checked(self.strength, "EntropyRate"), self.ramp
        if not 0 <= ramp <= 1:
            raise ModelError(f"EntropyRate: ramp={ramp!r}: expected a fraction of the run, 0 to 1")
        found = list(levels_of(model).values())
        if not found:
            raise ModelError("EntropyRate finds no rounded weights: call levelled(model) before the run is made")
        pace = _Pace(strength, ramp)
        parameters = [w for levels, x in found for w in (x, *levels.parameters())]
        own = [w for levels, _ in found for w in (levels.row, levels.column, levels.shape)]
        kept: list[tuple[list[int], Tensor]] = []  # the value as it was logged, for the gradient that follows

        def smooth() -> Tensor:
            versions = [w._version for w in parameters]
            if kept and kept[0][0] == versions:
                return kept.pop()[1] * pace.strength
            return total([levels.bits(x) for levels, x in found]) * pace.strength

        def value() -> Tensor:
            with torch.enable_grad():
                bits = total([levels.bits(x) for levels, x in found])
            kept[:] = [([w._version for w in parameters], bits)]
            return bits * pace.strength

        name = f"EntropyRate({strength:g}, {ramp:g})"
        return Term(name, parameters, value, smooth=smooth, own=own, pace=pace)


class _Pace:
    """The strength at a fraction of the run; full where nobody says how far it is."""

    def __init__(self, full: float, ramp: float):
        self.full, self.ramp, self.strength = full, ramp, full

    def __call__(self, done: float) -> None:
        self.strength = self.full * min(1.0, done / self.ramp) if self.ramp else self.full


def _chosen(model: nn.Module, where: Where | str | None, what: str, biases: bool = True) -> Iterator[Named]:
    asked = as_where(where)
    own = {id(w) for module in model.modules() if isinstance(module, Constraint) for w in module.parameters()}
    free = [p for p in named_parameters(model) if id(p.parameter) not in own]
    trainable = [p for p in free if p.parameter.requires_grad and p.parameter.numel()]
    if asked is not None:
        found = [p for p in trainable if p.fits(asked)]
    else:
        theirs = _parametrized(model)
        found = [p for p in trainable if id(p.parameter) not in theirs and (p.decays or (biases and _is_bias(p)))]
    if not found:
        known = ", ".join(p.name for p in trainable[:3]) or "none"
        if asked is None and theirs:
            known += "; what parametrizations compute is left out: remove them (torch.nn.utils.parametrize)"
        raise ModelError(f"{what} chooses no trainable parameter of {type(model).__name__}: it has {known}")
    return iter(found)


def _parametrized(model: nn.Module) -> set[int]:
    """The parameters, by id, of layers of which somebody else's parametrization computes one, as `weight_norm` does.

    Copies of such a layer share a class of its own: a constraint on one of them would take the tensor from all.
    """
    found: set[int] = set()
    for module in model.modules():
        if parametrize.is_parametrized(module):
            lists = module.parametrizations.values()  # type: ignore[union-attr, operator]
            if not any(isinstance(step, Constraint) for steps in lists for step in steps):
                found |= {id(w) for w in module.parameters()}
    return found


def _is_bias(p: Named) -> bool:
    return all("bias" in name.rpartition(".")[2] and isinstance(o, CONNECTIONS) for name, o in p.names.items())

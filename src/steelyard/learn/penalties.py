"""Penalties on weights: what each adds to the objective, and how it acts on a step of any torch optimizer.

Decides the mathematics of each penalty and the tensors that it concerns. Knows nothing of loops:
`penalize` attaches them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.errors import ModelError, UnknownNameError, quoted
from steelyard.learn.grouping import Members, Units, members
from steelyard.learn.parameters import Named, choose_parameters, named_parameters
from steelyard.learn.shrinkage import shrink_groups, soft_threshold

Metric = Literal["optimizer", "rate"]
Factors = Tensor | Mapping[str, Tensor]
Sizes = Callable[[nn.Parameter], "float | Tensor | None"]  # the step sizes of a parameter; None: it had no step


@dataclass(frozen=True, eq=False)
class Term:
    """A penalty on the parameters of one model."""

    name: str
    parameters: Sequence[nn.Parameter]
    value: Callable[[], Tensor]  # () -> what it adds to the objective, with a gradient
    smooth: Callable[[], Tensor] | None = None  # the part that acts by its gradient
    proximal: Callable[[Sizes], None] | None = None  # the rest acts by a proximal step after the optimizer's
    grouped: bool = False  # after those that act on each weight alone: so the two together are exact
    metric: Metric = "optimizer"
    own: Sequence[nn.Parameter] = ()  # those that nothing else uses: they get a gradient from here alone
    pace: Callable[[float], None] | None = None  # told the fraction of the run before each step


class Penalty(ABC):
    """A term of the objective that speaks of the weights alone."""

    @abstractmethod
    def bind(self, model: nn.Module) -> Term:
        """The penalty on this model; raises ModelError if it concerns none of its trainable parameters."""

    def value(self, model: nn.Module) -> Tensor:
        """What it adds to the objective now: a tensor without axes, with a gradient."""
        return self.bind(model).value()


@dataclass(frozen=True, eq=False)
class L2(Penalty):
    """strength / 2 * sum of w^2: pulls each weight towards zero in proportion to it (ridge; Hoerl & Kennard 1970).

    Its gradient, strength * w, is added before the step: what torch calls the weight_decay of SGD and Adam, but not
    of AdamW, which is `Decay`. where: a condition or a pattern of names; None: what decays by `decay_groups`.

    >>> L2(0.5).value(nn.Linear(2, 1)).item() > 0
    True
    """

    strength: float
    where: Where | str | None = None

    def bind(self, model: nn.Module) -> Term:
        strength, chosen = checked(self.strength, "L2"), choose_parameters(model, self.where, "L2")
        found = [p.parameter for p in chosen]

        def value() -> Tensor:
            return total([w.square().sum() for w in found]) * (strength / 2)

        return Term(f"L2({strength:g})", found, value, smooth=value)


@dataclass(frozen=True, eq=False)
class L1(Penalty):
    """strength * sum of f |w|: exact zeros (lasso; Tibshirani 1996), by a proximal step after the optimizer's.

    The step is soft thresholding by strength * f * s, where s is how far the optimizer moves that weight for a unit
    of gradient. metric: "optimizer" takes s from the optimizer's state; a point where nothing moves any more is then a
    minimum of loss + penalty under any optimizer. "rate" takes the learning rate for s, as AdamW does for its
    decay: known for every optimizer, but with Adam and its like the penalty of a weight counts as if it were
    multiplied by the root of its mean squared gradient, and the resting point is another one.

    factors: f, how much each weight is penalised (adaptive lasso; Zou 2006): a tensor that broadcasts to each chosen
    weight, such as one number for each input feature, or such tensors by name. A factor f is the same as the input
    column divided by f; 0 does not penalise, inf excludes.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    >>> L1(0.5, factors=torch.tensor([1.0, 3.0])).value(layer).item()
    3.5
    """

    strength: float
    where: Where | str | None = None
    factors: Factors | None = None
    metric: Metric = "optimizer"

    def bind(self, model: nn.Module) -> Term:
        strength, chosen = checked(self.strength, "L1"), choose_parameters(model, self.where, "L1")
        found = [p.parameter for p in chosen]
        factors = factors_of(chosen, self.factors, [p.parameter.shape for p in chosen])

        def value() -> Tensor:
            return total([_weighted(w.abs(), f).sum() for w, f in zip(found, factors, strict=True)]) * strength

        def proximal(sizes: Sizes) -> None:
            for w, f in zip(found, factors, strict=True):
                size = sizes(w)
                if size is not None:
                    w.copy_(soft_threshold(w, _threshold(size, strength, f, w)))

        return Term(f"L1({strength:g})", found, value, proximal=proximal, metric=checked_metric(self.metric))


@dataclass(frozen=True, eq=False)
class ElasticNet(Penalty):
    """strength * (l1_ratio * sum of f |w| + (1 - l1_ratio) / 2 * sum of w^2) (Zou & Hastie 2005), as in
    scikit-learn.

    The first part acts like `L1`, by a proximal step with the same options; the second like `L2`, by its gradient.
    """

    strength: float
    l1_ratio: float = 0.5
    where: Where | str | None = None
    factors: Factors | None = None
    metric: Metric = "optimizer"

    def bind(self, model: nn.Module) -> Term:
        strength, ratio = checked(self.strength, "ElasticNet"), self.l1_ratio
        if not isinstance(ratio, Real) or not 0 <= ratio <= 1:
            raise ModelError(f"ElasticNet: l1_ratio={ratio!r}: expected a number from 0 to 1")
        first = L1(strength * ratio, self.where, self.factors, self.metric).bind(model)
        second = L2(strength * (1 - ratio), self.where).bind(model)
        name = f"ElasticNet({strength:g}, {ratio:g})"

        def value() -> Tensor:
            return first.value() + second.value()

        return Term(name, first.parameters, value, second.smooth, first.proximal, metric=first.metric)


@dataclass(frozen=True, eq=False)
class GroupL1(Penalty):
    """strength * sum over groups of f sqrt(n) ||w_g||_2: groups vanish as a whole (group lasso; Yuan & Lin 2006).

    units: "outputs": the weights into each neuron or filter; "inputs": the weights from each input feature or
    channel; "heads": what each head of an nn.MultiheadAttention holds, in the projections into it and out of it.
    size: so many neighbouring units are one group: the heads of other attention layers are
    GroupL1(strength, "inputs", size=head_width, where="*.o_proj.weight"). n is the number of members.
    factors: f, one number for each group; or such tensors by name. Together with `L1` it is the sparse group lasso.
    metric: as for `L1`; with a step size of its own for each member the step is solved for, not approximated.
    """

    strength: float
    units: Units = "outputs"
    size: int = 1
    where: Where | str | None = None
    factors: Factors | None = None
    metric: Metric = "optimizer"

    def bind(self, model: nn.Module) -> Term:
        strength = checked(self.strength, "GroupL1")
        groups = members(model, self.units, self.size, self.where)
        factors = factors_of(groups, self.factors, [torch.Size((g.groups,)) for g in groups])

        def strengths(g: Members, f: Tensor | None) -> Tensor:
            first = g.parameters[0]
            one = torch.full((g.groups,), strength * math.sqrt(g.size), dtype=first.dtype, device=first.device)
            return one if f is None else one * f.to(one)

        def value() -> Tensor:
            norms = [g.rows([*g.parameters]).norm(dim=1) for g in groups]
            return total([_weighted(n, strengths(g, f)).sum() for n, g, f in zip(norms, groups, factors, strict=True)])

        def proximal(sizes: Sizes) -> None:
            for g, f in zip(groups, factors, strict=True):
                found = [sizes(w) for w in g.parameters]
                if not any(size is None for size in found):
                    g.put(shrink_groups(g.rows([*g.parameters]), _joint(g, found), strengths(g, f)))

        parameters = [w for g in groups for w in g.parameters]
        name, metric = f"GroupL1({strength:g}, {self.units})", checked_metric(self.metric)
        return Term(name, parameters, value, proximal=proximal, grouped=True, metric=metric)


@dataclass(frozen=True, eq=False)
class L2SP(Penalty):
    """strength / 2 * sum of (w - w_start)^2: stays near where it started (Li, Grandvalet & Davoine 2018).

    start: Weights, or tensors by name; None: the weights of the model when the penalty is attached, so attach it
    after they are loaded (and give `start` where a run is to be resumed). where: what is held; None: everything
    trainable that `start` has a tensor for, norms and biases too. A new head is held by `L2` beside it:
    ``L2SP(0.1, where="!head.*"), L2(0.01, where="head.*")``.
    """

    strength: float
    start: Weights | Mapping[str, Tensor] | None = None
    where: Where | str | None = None

    def bind(self, model: nn.Module) -> Term:
        strength = checked(self.strength, "L2SP")
        chosen = choose_parameters(model, "*" if self.where is None else self.where, "L2SP")
        start = {p.name: p.parameter.detach().clone() for p in chosen} if self.start is None else self.start
        held = [p for p in chosen if p.name in start] if self.where is None else chosen
        if not held:
            raise ModelError(
                f"L2SP: the start has none of the names of {type(model).__name__}, such as {chosen[0].name}"
            )
        pairs = [(p.parameter, _start_of(p, start)) for p in held]

        def value() -> Tensor:
            return total([(w - w0.to(w)).square().sum() for w, w0 in pairs]) * (strength / 2)

        return Term(f"L2SP({strength:g})", [w for w, _ in pairs], value, smooth=value)


@dataclass(frozen=True, eq=False)
class Spectral(Penalty):
    """strength / 2 * sum over matrices of the largest singular value squared (Yoshida & Miyato 2017).

    It bounds how much a layer can amplify its input. A convolution counts as the matrix (filters, taps). The value is
    exact, from the eigenvalues of the smaller Gram matrix: the cost of a step is cubic in the smaller side.
    """

    strength: float
    where: Where | str | None = None

    def bind(self, model: nn.Module) -> Term:
        strength = checked(self.strength, "Spectral")
        found = [p.parameter for p in choose_parameters(model, self.where, "Spectral") if p.parameter.ndim >= 2]
        if not found:
            raise ModelError("Spectral chooses no matrix: its parameters have fewer than two axes")

        def value() -> Tensor:
            return total([_LargestSquare.apply(w.flatten(1)) for w in found]) * (strength / 2)

        return Term(f"Spectral({strength:g})", found, value, smooth=value)


class _LargestSquare(torch.autograd.Function):
    """The square of the largest singular value of a matrix W; its gradient is 2 W v v', also where values repeat."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, matrix: Tensor) -> Tensor:
        wide = matrix.detach().double()
        tall = len(wide) > wide.shape[1]
        values, vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT)
        top = vectors[:, -1]
        along = torch.outer(wide @ top, top) if tall else torch.outer(top, top @ wide)
        ctx.save_for_backward(along.to(matrix.dtype))
        return values[-1].to(matrix.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (along,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * gradients[0] * along


def adaptive_factors(model: nn.Module, gamma: float = 1.0, where: Where | str | None = None) -> dict[str, Tensor]:
    """|w|^-gamma for each weight as it is now: the factors of the adaptive lasso after a first fit (Zou 2006).

    What is zero now stays zero: its factor is inf.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[0.5, 0.0]]))
    >>> adaptive_factors(layer)["weight"]
    tensor([[2., inf]])
    """
    chosen = choose_parameters(model, where, "adaptive_factors")
    return {p.name: p.parameter.detach().abs().pow(-checked(gamma, "gamma")) for p in chosen}


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors without axes, which may lie on several devices."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def checked(number: float, what: str) -> float:
    """A strength as it is; raises ModelError unless it is a finite number, 0 or more."""
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 <= float(number) < math.inf:
        raise ModelError(f"{what}: strength {number!r}: expected a finite number, 0 or more")
    return float(number)


def checked_metric(metric: Metric) -> Metric:
    """A metric as it is; raises UnknownNameError for another word."""
    if metric not in ("optimizer", "rate"):
        raise UnknownNameError("metric", str(metric), ("optimizer", "rate"))
    return metric


def factors_of(
    chosen: Sequence[Named] | Sequence[Members], factors: Factors | None, shapes: Sequence[torch.Size]
) -> list[Tensor | None]:
    """The factors of each; raises UnknownNameError for a name that is not chosen, ModelError for a wrong shape."""
    names = [c.name for c in chosen]
    if factors is None:
        return [None] * len(names)
    if isinstance(factors, Mapping):
        for name in factors:
            if name not in names:
                raise UnknownNameError("penalised parameter", name, names)
    found = [factors.get(name) if isinstance(factors, Mapping) else factors for name in names]
    for name, factor, shape in zip(names, found, shapes, strict=True):
        if factor is not None and not _broadcasts(factor.shape, shape):
            raise ModelError(
                f"factors of shape {list(factor.shape)} do not fit {quoted(name)}, which wants {list(shape)}: "
                "give them by name, or choose with where="
            )
        if factor is not None and not bool((factor >= 0).all()):
            raise ModelError(f"the factors of {quoted(name)} are not all 0 or more")
    return found


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small[::-1], large[::-1], strict=False))


def _weighted(values: Tensor, factor: Tensor | None) -> Tensor:
    """factor * values, where an infinite factor of a zero adds nothing."""
    if factor is None:
        return values
    return torch.where(values == 0, torch.zeros_like(values), values * factor.to(values))


def _threshold(size: float | Tensor, strength: float, factor: Tensor | None, w: Tensor) -> Tensor | float:
    if factor is None:
        return size * strength
    pull = size * strength * factor.to(w)
    return pull.nan_to_num(math.inf, math.inf)  # a step of size zero keeps out what is excluded


def _joint(g: Members, sizes: Sequence[float | Tensor | None]) -> float | Tensor:
    """The step sizes of all members of the groups: one number if there is only one."""
    if len({size if isinstance(size, float) else id(size) for size in sizes}) == 1 and isinstance(sizes[0], float):
        return sizes[0]
    return g.rows([torch.as_tensor(s).to(w).expand_as(w) for s, w in zip(sizes, g.parameters, strict=True)])


def _start_of(parameter: Named, start: Weights | Mapping[str, Tensor]) -> Tensor:
    if parameter.name not in start:
        raise UnknownNameError("tensor in the start of L2SP", parameter.name, start)
    found = start[parameter.name]
    tensor = found if isinstance(found, Tensor) else torch.as_tensor(found.array())
    if tensor.shape != parameter.parameter.shape:
        raise ModelError(
            f"L2SP: {quoted(parameter.name)} starts as {list(tensor.shape)}, the model has "
            f"{list(parameter.parameter.shape)}: leave it out with where="
        )
    return tensor.detach()


__all__ = ["L1", "L2", "L2SP", "ElasticNet", "GroupL1", "Penalty", "Spectral", "adaptive_factors", "named_parameters"]

"""What the width does to each parameter of a model: its kind, its start, its rate.

Decides the kind by which axes grow and by how the layer uses them. Knows the rules of the maximal update
parametrisation; where growth comes from is not its business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeVar, get_args

from torch import Tensor, nn

from steelyard.core.spec import Spec
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.init import Init
from steelyard.learn.factors import Factor, OfInput
from steelyard.learn.matrices import is_started, layers, matrices, parameter_axes
from steelyard.learn.rates import Rule
from steelyard.learn.start import owners, scheme_for
from steelyard.learn.widths import Growth

Given = TypeVar("Given")
Kind = Literal["input", "hidden", "output", "vector", "scalar"]


@dataclass(frozen=True)
class Scaling:
    """What the width does to one parameter: its kind, by how much its fans have grown, and a factor in front of it.

    The factor is part of the start and of the rate: a weight c V has the start of V times c, and its step must be
    that of V times c; the gradient of V is c times that of the weight.
    """

    kind: Kind
    inputs: float = 1.0  # fan-in, as a multiple of that at the base width
    outputs: float = 1.0  # for a vector, its length
    multiplier: float = 1.0
    note: str = ""

    @property
    def start(self) -> float:
        """The standard deviation, as a multiple of that at the base width."""
        return self.multiplier * (self.inputs**-0.5 if self.kind == "hidden" else 1.0)

    def rate(self, rule: Rule) -> float:
        """The learning rate, as a multiple of that at the base width.

        >>> Scaling("hidden", 4.0, 4.0).rate("adam"), Scaling("hidden", 4.0, 4.0).rate("sgd")
        (0.25, 1.0)
        """
        if rule == "adam":
            return self.multiplier * (1 / self.inputs if self.kind == "hidden" else 1.0)
        by_kind = {"hidden": self.outputs / self.inputs, "output": self.inputs, "scalar": 1.0}
        return self.multiplier**2 * by_kind.get(self.kind, self.outputs)


@dataclass(frozen=True)
class Use:
    """How one layer uses a parameter as matrices."""

    layer: str
    leaf: str
    output: int  # axis
    sums: tuple[int, ...]  # axes that are summed over; none for a table of rows that are looked up


def uses(model: nn.Module) -> dict[str, list[Use]]:
    """Every use of each parameter as matrices, by the first name of the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[Use]] = {}
    for name, layer in layers(model).items():
        for leaf, (output, sums) in parameter_axes(layer).items():
            found.setdefault(names[id(getattr(layer, leaf))], []).append(Use(name, leaf, output, sums))
    return found


def scalings_of(model: nn.Module, growths: Mapping[str, Growth], kinds: Mapping[str, Kind]) -> dict[str, Scaling]:
    """The scaling of each parameter, by name; `kinds`: what some are, by patterns of names.

    Raises ModelError for a parameter of which more grows than inputs and outputs; RecipeError for a pattern that fits
    no name, UnknownNameError for a kind that is not there.
    """
    told = by_pattern(kinds, growths)
    for kind in told.values():
        if kind not in get_args(Kind):
            raise UnknownNameError("kind", str(kind), get_args(Kind))
    used = uses(model)
    return {name: _scaling(name, g, used.get(name, []), told.get(name)) for name, g in growths.items()}


def _scaling(name: str, growth: Growth, used: list[Use], told: Kind | None) -> Scaling:
    if told is not None:
        return _as_told(name, growth, told)
    if not growth.axes:
        return Scaling("scalar")
    if not used:
        if len(growth.axes) > 2:
            raise ModelError(
                f"{len(growth.axes)} axes of {name!r} grow with width, and it belongs to no layer that is known: say "
                f"kinds={{{name!r}: 'hidden'}}, or another kind"
            )
        first, last = growth.axes[0], growth.axes[-1]
        if first == last:
            return Scaling("vector", 1.0, growth.ratio([first]))
        note = "free: taken for (outputs, inputs)"
        return Scaling("hidden", growth.ratio([last]), growth.ratio([first]), 1.0, note)
    for axis in growth.axes:
        if any(axis != use.output and use.sums and axis not in use.sums for use in used):
            raise ModelError(
                f"axis {axis} of {name!r} grows with width, and is neither its inputs nor its outputs: width may not "
                "change the size of a kernel"
            )
    found = list(dict.fromkeys(_of_use(growth, use) for use in used))
    if len(found) == 1:
        return found[0]
    table = next((s for s in found if s.kind == "input"), None)
    if table is None or any(s.kind not in ("input", "output") for s in found):
        roles = " and ".join(s.kind for s in found)
        raise ModelError(f"{name!r} is shared by layers in which it is {roles}: give each its own")
    return replace(table, note="the weight of an output layer, too")


def _of_use(growth: Growth, use: Use) -> Scaling:
    inputs, outputs = growth.ratio(use.sums), growth.ratio([use.output])
    wide_in, wide_out = any(a in growth.axes for a in use.sums), use.output in growth.axes
    if wide_in and wide_out:
        return Scaling("hidden", inputs, outputs)
    if wide_in:
        return Scaling("output", inputs, 1.0, 1 / inputs)
    return Scaling("input", 1.0, outputs) if wide_out else Scaling("scalar")


def _as_told(name: str, growth: Growth, kind: Kind) -> Scaling:
    ratio = growth.ratio(growth.axes)
    if kind == "hidden":
        if len(growth.axes) < 2:
            raise RecipeError(f"{name!r} cannot be 'hidden': {len(growth.axes)} of its axes grow, and it takes two")
        inputs = growth.ratio(growth.axes[1:])
        return Scaling("hidden", inputs, growth.ratio(growth.axes[:1]), note="as told")
    if kind == "output":
        return Scaling("output", ratio, 1.0, 1 / ratio, "as told")
    return Scaling(kind, 1.0, 1.0 if kind == "scalar" else ratio, note="as told")


def tied_outputs(model: nn.Module, growths: Mapping[str, Growth], scalings: Mapping[str, Scaling]) -> dict[str, Factor]:
    """Output layers whose weight is an input elsewhere, and the factors of their inputs."""
    found: dict[str, Factor] = {}
    for name, used in uses(model).items():
        for use in used:
            ratio = growths[name].ratio(use.sums)
            if scalings[name].kind == "input" and _of_use(growths[name], use).kind == "output" and ratio != 1:
                found[use.layer] = OfInput(1 / ratio)
    return found


def by_pattern(given: Mapping[str, Given], names: Mapping[str, object]) -> dict[str, Given]:
    """What is given by patterns of names, by names; the last pattern that fits counts.

    >>> by_pattern({"*.bias": 1}, {"a.weight": 0, "a.bias": 0})
    {'a.bias': 1}

    Raises RecipeError for a pattern that fits no name.
    """
    found: dict[str, Given] = {}
    for pattern, value in given.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise RecipeError(f"{pattern!r} fits no parameter; the first is {next(iter(names), '(none)')!r}")
        found.update(dict.fromkeys(fitting, value))
    return found


def scale_start(
    model: nn.Module,
    small: nn.Module | None,
    growths: Mapping[str, Growth],
    scalings: Mapping[str, Scaling],
    init: Init,
) -> None:
    """Bring values that a scheme has drawn for this width to the scale that their scalings ask for.

    A matrix gets the standard deviation that the scheme has at the base width (the shapes of `small`; of a model
    alone those of `growths`), times the start of its scaling. What is not random, as an identity, keeps its scale.
    Frozen parameters are left alone.
    """
    below = dict(small.named_modules()) if small is not None else {}
    names = {id(p): name for name, p in model.named_parameters()}
    found = layers(model)
    owner_of = owners(found)
    done: set[str] = set()
    for layer_name, layer in found.items():
        for matrix in matrices(layer):
            parameter = getattr(layer, matrix.parameter)
            if owner_of[id(parameter)] != layer_name or not is_started(parameter):
                continue
            name = names[id(parameter)]
            done.add(name)
            now = tuple(matrix.values.shape)
            if layer_name in below:
                same = next(m for m in matrices(below[layer_name]) if m.parameter == matrix.parameter)
                before = tuple(same.values.shape)
            else:
                output, sums = parameter_axes(layer)[matrix.parameter]
                before = _smaller(now, growths[name], output, sums)
            scheme = scheme_for(matrix, init)
            here, there = (scheme.variance(Spec.of(shape, "float64")) for shape in (now, before))
            factor = scalings[name].start * math.sqrt(there / here) if here else scalings[name].multiplier
            matrix.values.mul_(factor)
    for name, parameter in model.named_parameters():
        if name not in done and is_started(parameter) and scalings[name].multiplier != 1:
            parameter.detach().mul_(scalings[name].multiplier)


def _smaller(shape: tuple[int, ...], growth: Growth, output: int, sums: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix (outputs, inputs, *rest) at the base width."""
    axes = (output, *(sums or (1 - output,)))
    return tuple(max(round(n / growth.ratios[axes[i]]), 1) if i < len(axes) else n for i, n in enumerate(shape))


def scale_own(
    model: nn.Module, small: nn.Module, growths: Mapping[str, Growth], scalings: Mapping[str, Scaling]
) -> None:
    """Bring a model's own values to the root mean square that those of `small` have, times their scalings."""
    before = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        if not is_started(parameter):
            continue
        factor = scalings[name].start
        if growths[name].axes:
            now, then = _rms(parameter), _rms(before[name])
            factor *= then / now if now else 1.0
        parameter.detach().mul_(factor)


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())

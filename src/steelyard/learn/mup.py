"""The maximal update parametrisation: a start and learning rates under which a wider model learns at the same rates.

Decides, for each parameter, which kind it is and what its start and its rate are multiplied by; everything agrees
with the standard parametrisation at the base width. Which axes grow is found in ``widths``, what makes queries in
``queries``; nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.init import Init, scheme_of
from steelyard.learn.factors import Factor, OfKeys, OfPart, put
from steelyard.learn.gains import asks_for_gain, with_gain
from steelyard.learn.matrices import is_started
from steelyard.learn.optimizers import OPTIMIZERS
from steelyard.learn.options import check_counts
from steelyard.learn.queries import Attention, attentions
from steelyard.learn.rates import Rule, default_of, rule_of, split_by_rate
from steelyard.learn.scalings import (
    Kind,
    Scaling,
    by_pattern,
    scale_own,
    scale_start,
    scalings_of,
    tied_outputs,
    uses,
)
from steelyard.learn.start import check_values, init_, unharmed
from steelyard.learn.task import batch_arguments
from steelyard.learn.widths import Factory, Growth, built, growth_of_factory, growth_of_model, outlined


@dataclass(frozen=True)
class Mup:
    """A model in the maximal update parametrisation: what was done to it, and the optimizers that belong to it."""

    model: nn.Module
    table: Table
    scalings: Mapping[str, Scaling] = field(repr=False)

    def optimizer(self, of: str | Callable[..., torch.optim.Optimizer] = "adamw", rule: Rule | None = None) -> Any:
        """torch's optimizer with rates that are right at every width: called as its class, with or without parameters.

        Each group that it is given is split where rates differ; the rate and the weight decay of each part are those
        of the group times and divided by the factor of the rate, and all other options are kept. Schedulers of torch
        multiply the rates of all groups and need no change. Pass it to `train` as ``optimizer``, too.

        Args:
            of: a name ('adam', 'adamw', 'sgd', 'rmsprop') or a class of optimizers.
            rule: 'sgd' if steps are in proportion to the gradient, 'adam' if they do not depend on its size; needed
                for classes that are not torch's own.

        Raises UnknownNameError for a name that is not there; ModelError, when called, for a parameter that is not one
        of the model or is there twice.

        >>> found = mup(lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2)), 256)
        >>> adam = found.optimizer(torch.optim.AdamW)(found.model.parameters(), lr=0.01)
        >>> [(len(group["params"]), group["lr"]) for group in adam.param_groups]
        [(3, 0.01), (1, 0.0025)]
        """
        if isinstance(of, str) and of not in OPTIMIZERS:
            raise UnknownNameError("optimizer", of, OPTIMIZERS)
        maker = OPTIMIZERS[of] if isinstance(of, str) else of
        if rule is not None and rule not in get_args(Rule):
            raise UnknownNameError("rule", rule, get_args(Rule))
        kept: Rule = rule or rule_of(maker)
        scalings = {id(p): self.scalings[name] for name, p in self.model.named_parameters()}

        def factor(parameter: Tensor) -> float:
            if id(parameter) not in scalings:
                raise ModelError(
                    f"a parameter of shape {tuple(parameter.shape)} is none of the model's: call mup on the model that "
                    "is trained"
                )
            return scalings[id(parameter)].rate(kept)

        def make(params: Any = None, **options: Any) -> torch.optim.Optimizer:
            groups = [p for p in self.model.parameters() if p.requires_grad] if params is None else params
            defaults = {name: options.get(name, default_of(maker, name)) for name in ("lr", "weight_decay")}
            return maker(split_by_rate(groups, factor, {k: v for k, v in defaults.items() if v is not None}), **options)

        return make


def mup(
    model: nn.Module | Factory,
    width: int | None = None,
    *,
    base: int = 64,
    init: str | Init | None = "he",
    seed: int = 0,
    batch: Any = None,
    kinds: Mapping[str, Kind] | None = None,
    multipliers: Mapping[str, float] | None = None,
    zero_output: bool = False,
) -> Mup:
    """Put a model into the maximal update parametrisation: the best learning rate at one width is the best at all.

    At the base width nothing differs from the standard parametrisation: the start is that of `init_`, and all rates
    are the same; so a rate that is known to be good there is good at every width. At m times that width, with fan-in
    and fan-out counted in multiples of those at the base width:

    ============================== ====================== ================== ==========================
    kind                           standard deviation     rate, Adam-like    rate, SGD-like
    ============================== ====================== ================== ==========================
    input (fan-in does not grow)   as at the base         1                  fan-out
    vector (bias, gain, position)  as at the base         1                  its length
    hidden (both grow)             1 / sqrt(fan-in)       1 / fan-in         fan-out / fan-in
    output (fan-out does not grow) 1 / fan-in             1 / fan-in         1 / fan-in
    scalar (nothing grows)         as at the base         1                  1
    ============================== ====================== ================== ==========================

    That is table 3 of the paper. The factor 1 / m before the output, which other forms have, is part of the start and
    the rate here, so that the model's own code computes what it did. Two things cannot be absorbed and become hooks,
    listed in ``table.meta['hooks']``; they are not part of a state dict, so that a model into which saved weights are
    loaded needs ``mup(..., init=None)`` first:

    - an embedding that is the output layer, too: the input of the output layer is divided by m;
    - attention whose heads grow: products of queries and keys grow like their size d, and torch divides them by
      sqrt(d). A factor sqrt(d0 / d) goes into the start and rate of the layer that makes the queries; where queries
      are packed with other things it multiplies the keys (``nn.MultiheadAttention``) or that part of the output.

    Args:
        model: a function from a width to a model, of which two are made on the meta device to see what grows; or a
            model, of which all hidden sizes are taken to grow in proportion and heads to keep their size.
        width: of the model that a function makes. For a model: its width (None: its smallest hidden size).
        base: the width at which everything agrees with the standard parametrisation.
        init: a scheme of `init_`; 'own': what the function gives, at the scale that it has at the base width; None:
            values stay as they are, for weights that were trained.
        seed: of all values.
        batch: inputs, a tensor, a tuple of several, a dict of keywords or a Batch: needed for a model, and to see the
            attention of code that calls ``scaled_dot_product_attention`` itself (attention written out by hand is not
            seen).
        kinds: what parameters are, by patterns of names, where shapes tell the wrong thing.
        multipliers: further factors of parameters, by patterns of names, absorbed in the same way.
        zero_output: weights of output layers start at zero, as the paper recommends: else outputs start at a scale that
            falls like 1 / sqrt(m), the one thing in which widths differ. At the base width, too.

    Returns the model, a table of its parameters, and the optimizers that belong to it. Of several names for one
    parameter the table has the first.

    Raises ModelError if nothing grows with width, more does than can be understood, or the model fails; RecipeError
    for a pattern that fits no name or an argument that is missing. A model that was given is then as it was.

    >>> found = mup(lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2)), 256)
    >>> for row in found.table.rows:
    ...     print(row["parameter"], row["kind"], row["multiplier"], row["Adam rate"], row["SGD rate"])
    0.weight input 1.0 1.0 4.0
    0.bias vector 1.0 1.0 4.0
    2.weight output 0.25 0.25 0.25
    2.bias scalar 1.0 1.0 1.0

    Source: Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    2022, tables 3 and 8, definition 4.1 (attention) and appendix B.
    """
    check_counts(base=base, **({} if width is None else {"width": width}))
    arguments = None if batch is None else batch_arguments(batch)
    if isinstance(model, nn.Module):
        if arguments is None:
            raise RecipeError("what grows in a model is seen on a batch: mup(model, batch=x), or mup(factory, 1024)")
        if init == "own":
            raise RecipeError("init='own' compares with the base width: give a function from widths to models")
    elif width is None:
        raise RecipeError("a function from widths to models needs a width: mup(factory, 1024)")
    target = model if isinstance(model, nn.Module) else built(model, width or base, seed)
    check_values(target)
    with unharmed(target):
        if isinstance(model, nn.Module):
            growths = growth_of_model(target, arguments or (), base, width)
            seen = _Seen(
                growths, "what feeds what on the batch; hidden sizes grow in proportion, heads keep their size"
            )
        else:
            seen = _in_factory(model, target, base, seed, arguments)
        scalings = scalings_of(target, seen.growths, kinds or {})
        factors = {**tied_outputs(target, seen.growths, scalings), **seen.factors}
        for more in (seen.multipliers, by_pattern(multipliers or {}, scalings)):
            scalings |= {n: replace(scalings[n], multiplier=scalings[n].multiplier * c) for n, c in more.items()}
        if init == "own":
            scale_own(target, built(model, base, seed), seen.growths, scalings)
        elif init is not None:
            scheme = scheme_of(init) if isinstance(init, str) else init
            init_(target, scheme, arguments if asks_for_gain(scheme) else None, seed=seed)
            scale_start(target, seen.small, seen.growths, scalings, with_gain(scheme, None))
        if zero_output and init is not None:
            for name, p in target.named_parameters():
                if scalings[name].kind == "output" and is_started(p):
                    p.detach().zero_()
        put(target, factors)
    meta = {"base": base, "seed": seed, "seen by": seen.by, "not corrected": seen.left}
    meta["hooks"] = {name: factor.about for name, factor in factors.items()}
    return Mup(target, _table(target, seen.growths, scalings, meta), scalings)


@dataclass
class _Seen:
    """What was found out about a model."""

    growths: Mapping[str, Growth]
    by: str
    small: nn.Module | None = None  # the model at the base width, without values
    multipliers: dict[str, float] = field(default_factory=dict)  # that attention asks for, by parameters
    factors: dict[str, Factor] = field(default_factory=dict)  # that attention asks for, by layers
    left: list[str] = field(default_factory=list)  # attention that asks for what cannot be done


def _in_factory(factory: Factory, target: nn.Module, base: int, seed: int, arguments: tuple[Any, ...] | None) -> _Seen:
    small = outlined(factory, base)
    growths = growth_of_factory(small, outlined(factory, 2 * base), target)
    seen = _Seen(growths, f"the shapes at the widths {base} and {2 * base}", small)
    below = dict(small.named_modules())
    for name, layer in target.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.head_dim != below[name].head_dim:
            factor = math.sqrt(below[name].head_dim / layer.head_dim)
            seen.factors[name] = OfKeys(factor)
            if layer.bias_k is not None:  # a further key
                seen.multipliers[f"{name}.bias_k" if name else "bias_k"] = factor
    if arguments is not None:
        _see_attention(seen, target, attentions(target, arguments), attentions(built(factory, base, seed), arguments))
    return seen


def _see_attention(seen: _Seen, target: nn.Module, here: list[Attention], at_base: list[Attention]) -> None:
    """Note what brings the scores of attention to the scale that they have at the base, over the growth of heads."""
    if len(here) != len(at_base):
        raise ModelError(
            f"attention is called {len(at_base)} times at the base width and {len(here)} times at this one"
        )
    names = {id(p): name for name, p in target.named_parameters()}
    layer_names = {id(layer): name for name, layer in target.named_modules()}
    for i, (now, then) in enumerate(zip(here, at_base, strict=True), 1):
        factor = then.scale * then.size / (now.scale * now.size)
        if math.isclose(factor, 1.0):
            continue
        if now.parameters:
            seen.multipliers |= {names[key]: factor for key in now.parameters}
        elif now.packed is not None:
            seen.factors[layer_names[id(now.packed)]] = OfPart(factor, now.part)
        else:
            seen.left.append(
                f"call {i} of attention: its scores need a factor {factor:.6g}, and no layer makes its queries alone"
            )


def _table(
    model: nn.Module, growths: Mapping[str, Growth], scalings: Mapping[str, Scaling], meta: Mapping[str, Any]
) -> Table:
    summed = {name: used[0].sums for name, used in uses(model).items()}
    rows = []
    for name, p in model.named_parameters():
        scaling, growth = scalings[name], growths[name]
        axes = (i for i in range(p.ndim) if i in summed[name] or i > 1) if summed.get(name) else ()
        rows.append(
            {
                "parameter": name,
                "kind": scaling.kind,
                "shape": list(p.shape),
                "at the base": list(growth.base),
                "fan in": math.prod(p.shape[i] for i in axes) if summed.get(name) else None,
                "multiplier": scaling.multiplier,
                "std": float(p.detach().double().std(correction=0)) if p.is_floating_point() else None,
                "Adam rate": scaling.rate("adam"),
                "SGD rate": scaling.rate("sgd"),
                "note": scaling.note,
            }
        )
    return Table.of("maximal update parametrisation", _COLUMNS, rows, meta)


_COLUMNS = [
    Column("parameter"),
    Column("kind", about="input, hidden, output: matrices, by which of their fans grow with width"),
    Column("shape"),
    Column("at the base", about="the shape at the base width"),
    Column("fan in", about="how many products an output sums"),
    Column("multiplier", about="a factor in front of the parameter, absorbed in its start and rates"),
    Column("std", about="standard deviation of its values now"),
    Column("Adam rate", about="factor of the rate for optimizers whose steps do not depend on the gradient's size"),
    Column("SGD rate", about="factor of the rate for optimizers whose steps are in proportion to the gradient"),
    Column("note"),
]

"""Penalties and decoupled decay on the steps of any torch optimizer, in `train` or in the user's own loop.

Decides the order of events around a step. Knows nothing of how a penalty is computed, or of loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steelyard.core.where import Where
from steelyard.errors import ModelError, quoted
from steelyard.formats._sharded import is_sharded
from steelyard.learn.decay import Decay, Shrinking
from steelyard.learn.options import check_kind
from steelyard.learn.parameters import named_parameters
from steelyard.learn.penalties import L1, L2, ElasticNet, Penalty, Term
from steelyard.learn.stepsize import check_optimizer, rate, step_size
from steelyard.learn.task import check_model


class Penalized:
    """Penalties at work: each step of the optimizer lowers data term + penalties. Made by `penalize`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        terms: Sequence[Term],
        decays: Sequence[Shrinking],
        given: Sequence[Penalty | Decay] = (),
    ):
        self.optimizer, self.decays, self.given = optimizer, tuple(decays), tuple(given)
        self.terms = tuple(sorted(terms, key=lambda term: term.grouped))
        self._names = {id(p.parameter): p.name for p in named_parameters(model)}
        self._check()
        self._hooks = []
        if self.terms or self.decays:
            self._hooks.append(optimizer.register_step_pre_hook(self._before))
        if any(term.proximal is not None for term in self.terms):
            self._hooks.append(optimizer.register_step_post_hook(self._after))

    @property
    def names(self) -> list[str]:
        """What was attached: each penalty, then each decay."""
        return [term.name for term in self.terms] + [decay.name for decay in self.decays]

    def values(self) -> dict[str, float]:
        """What each penalty adds to the objective, by its name, for the weights as they are."""
        found: dict[str, float] = {}
        with torch.no_grad():
            for term in self.terms:
                name, count = term.name, 2
                while name in found:
                    name, count = f"{term.name} {count}", count + 1
                found[name] = float(term.value())
        return found

    def value(self) -> float:
        """The sum of `values`: data term + this is what training minimises."""
        return sum(self.values().values())

    def at(self, done: float) -> None:
        """Say what fraction of the training is done, before a step; a Run does. Penalties that ramp up ask for it."""
        for term in self.terms:
            if term.pace is not None:
                term.pace(done)

    @property
    def held(self) -> frozenset[int]:
        """The ids of the parameters of its model."""
        return frozenset(self._names)

    def remove(self) -> None:
        """Leave the optimizer as it was; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Penalized:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decay the weights and add the gradients of smooth penalties: now, or whenever the closure is evaluated."""
        if _skipped(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradients()
            self._decay()
            return None

        evaluated = False

        def penalized() -> Any:
            nonlocal evaluated
            loss = closure() + self._add_gradients()
            if not evaluated:  # the gradient is that of the weights before their decay
                self._decay()
            evaluated = True
            return loss

        return args[:1], {**kwargs, "closure": penalized}

    @torch.no_grad()
    def _decay(self) -> None:
        for decay in self.decays:
            for group, parameter in _stepped(self.optimizer):
                if id(parameter) in decay.parameters:
                    parameter.mul_(decay.factor(group))

    def _add_gradients(self) -> Tensor | float:
        """The gradient of the smooth parts, onto every parameter that has one; returns the sum of their values."""
        smooth = [term.smooth for term in self.terms if term.smooth is not None]
        if not smooth:
            return 0.0
        for w in (w for term in self.terms for w in term.own if w.grad is None):
            w.grad = torch.zeros_like(w)
        scale = getattr(self.optimizer, "grad_scale", None)  # from a GradScaler, for the optimizer to unscale by
        moving = [w for _, w in _stepped(self.optimizer)]
        with torch.enable_grad():
            value = sum(part() for part in smooth)
        found = torch.autograd.grad(value, moving, allow_unused=True) if moving else ()
        with torch.no_grad():
            for w, gradient in zip(moving, found, strict=True):
                if gradient is None:
                    continue
                if w.grad.layout != torch.strided:
                    raise ModelError(
                        f"{quoted(self._names[id(w)])} is penalised and has a sparse gradient: make it dense"
                    )
                w.grad.add_(gradient if scale is None else gradient * scale)
        return value.detach()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if _skipped(optimizer):
            return
        groups = {id(w): group for group, w in _stepped(optimizer)}
        for term in self.terms:
            if term.proximal is None:
                continue

            def size(w: nn.Parameter, by_rate: bool = term.metric == "rate") -> float | Tensor | None:
                if id(w) not in groups:
                    return None
                return rate(groups[id(w)]) if by_rate else step_size(optimizer, groups[id(w)], w)

            term.proximal(size)

    def _check(self) -> None:
        held = {id(w): group for group in self.optimizer.param_groups for w in group["params"]}
        grouped: dict[int, str] = {}
        for term in self.terms:
            for w in term.parameters:
                name = quoted(self._names[id(w)])
                if id(w) not in held:
                    raise ModelError(f"{term.name} penalises {name}, which is not in the optimizer: choose with where=")
                if held[id(w)].get("maximize"):
                    raise ModelError(f"{term.name}: the optimizer maximizes; penalties are for minimizing")
                if term.grouped and grouped.setdefault(id(w), term.name) is not term.name:
                    raise ModelError(
                        f"{grouped[id(w)]} and {term.name} both group {name}, and there is no exact step for the two"
                    )
            if term.proximal is not None and term.metric == "optimizer":
                check_optimizer(self.optimizer)
        for decay in self.decays:
            if not decay.parameters & held.keys():
                raise ModelError(f"{decay.name} decays nothing that the optimizer holds: choose with where=")


def penalize(model: nn.Module, optimizer: Optimizer, *penalties: Penalty | Decay) -> Penalized:
    """Let every step of the optimizer lower loss + penalties, with true zeros where a penalty asks for them.

    ::

        penalized = sy.penalize(model, optimizer, sy.L1(1e-3), sy.L2(1e-2))   # once, after the optimizer is made
        ...
        print(loss.item() + penalized.value())                               # the objective, where it is wanted

    Around ``optimizer.step()``: decoupled decay, the gradients of smooth penalties added to the gradients (after any
    clipping of yours), the step, and the proximal steps of the others with the step size that the optimizer used.
    Accumulated gradients, several processes, closures, learning-rate schedules and a GradScaler need nothing more.
    A parameter without a gradient has no step and is left alone, as by the optimizer.

    Raises ModelError for a penalty that concerns nothing of the model or that the optimizer cannot step for, and for
    one that is attached already.

    >>> layer = nn.Linear(3, 1)
    >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    >>> from steelyard.learn.penalties import L1
    >>> penalized = penalize(layer, optimizer, L1(10.0))
    >>> layer(torch.ones(2, 3)).mean().backward()
    >>> optimizer.step()
    >>> layer.weight.tolist(), penalized.values()
    ([[0.0, 0.0, 0.0]], {'L1(10)': 0.0})
    """
    terms: list[Term] = []
    decays: list[Shrinking] = []
    check_model(model)
    check_kind("optimizer", optimizer, Optimizer, "a torch optimizer")
    attached = _attached(optimizer, model)
    for penalty in penalties:
        if any(_same(penalty, other) for other in attached):
            raise ModelError(f"{type(penalty).__name__}({penalty.strength:g}) acts on this optimizer already: remove() "
                             "it first, or add the two strengths in one")  # fmt: skip
        attached.append(penalty)
        if isinstance(penalty, Decay):
            decays.append(penalty.bind(model, optimizer))
        elif isinstance(penalty, Penalty):
            if any(map(is_sharded, model.parameters())):
                _check_elementwise(penalty)
            terms.append(penalty.bind(model))
        else:
            raise ModelError(f"expected a penalty such as L1(1e-3), found a {type(penalty).__name__}")
    return Penalized(model, optimizer, terms, decays, penalties)


def _attached(optimizer: Optimizer, model: nn.Module) -> list[Penalty | Decay]:
    """The penalties that act on the steps of an optimizer, on weights that are the model's, too."""
    own = {id(p) for p in model.parameters()}
    hooked = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    found = [one for one in hooked if isinstance(one, Penalized) and own & one.held]
    return [penalty for one in found for penalty in one.given]


def _same(a: object, b: object) -> bool:
    """Whether two penalties are one, or are alike in every option; tensors are alike if they are one."""
    if a is b or type(a) is not type(b) or not is_dataclass(a) or not is_dataclass(b):
        return a is b
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(x is y or (isinstance(x, (int, float, str, Where)) and x == y) for x, y in pairs)


def _check_elementwise(penalty: Penalty) -> None:
    """Raise ModelError for a penalty that looks at more of a tensor than one element, as a process has a part."""
    if not isinstance(penalty, (L1, L2, ElasticNet)) or getattr(penalty, "factors", None) is not None:
        raise ModelError(
            f"{type(penalty).__name__} on weights that are sharded among processes: only L1, L2 and ElasticNet without "
            "factors, and Decay, take each element for itself; use these, or train without shards"
        )


_OPTIM = torch.optim
COUPLED = (
    *(_OPTIM.SGD, _OPTIM.Adam, _OPTIM.NAdam, _OPTIM.RAdam, _OPTIM.Adamax),
    *(_OPTIM.Adagrad, _OPTIM.Adadelta, _OPTIM.RMSprop, _OPTIM.ASGD),
)  # optimizers whose weight_decay is part of the gradient, unless a group says that it is decoupled


def own_decay(optimizer: Optimizer) -> dict[str, float]:
    """What the optimizer's own weight_decay adds to the objective: sum of weight_decay / 2 * w^2 where it is coupled.

    Nothing for decoupled decay (AdamW), which is in no objective, and for optimizers that are not torch's own.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.2)
    >>> {name: round(value, 6) for name, value in own_decay(optimizer).items()}
    {'weight decay': 0.3}
    """
    coupled = [
        (float(group["weight_decay"]), w.detach())
        for group in optimizer.param_groups
        if isinstance(optimizer, COUPLED) and not group.get("decoupled_weight_decay", False) and group["weight_decay"]
        for w in group["params"]
    ]
    return {"weight decay": sum(d / 2 * float(w.square().sum()) for d, w in coupled)} if coupled else {}


def _stepped(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    """The parameters that the step concerns, with their groups."""
    return [(group, w) for group in optimizer.param_groups for w in group["params"] if w.grad is not None]


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found gradients that are not finite and the optimizer will not move."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)

"""Constraints that hold while a model is trained by any torch optimizer: pruned stays zero, shared stays equal.

Decides how a constraint is expressed (torch's parametrizations). Knows nothing of how a mask or a codebook was found.
Apply a constraint before the optimizer is made; `release` turns the constrained tensors into plain ones again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steelyard.core.packed import Plan, Scheme, Smallest
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.errors import UnknownNameError, WeightsError
from steelyard.formats.module import to_tensor

Site = tuple[nn.Module, str]  # a module and the name of its parameter


class Constraint(nn.Module):
    """What a weight is computed by while it is trained; `release` takes it away and leaves the weight's values."""

    order: tuple[str, ...] = ()  # the parameters of the module that is constrained, as they were

    def settled(self, x: Tensor) -> Tensor:
        """What `release` leaves of the latent tensor: what the model computes with."""
        found: Tensor = self(x)
        return found


class Masked(Constraint):
    """x where the mask is True and exactly +0 elsewhere; no gradient passes where it is False."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def right_inverse(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Shared(Constraint):
    """codebook[codes] where the mask is True and exactly +0 elsewhere.

    The gradient of an entry of the codebook is the sum of those of the weights that share it (Han et al. 2016).
    """

    def __init__(self, codebook: Tensor, codes: Tensor, mask: Tensor):
        super().__init__()
        self.start = codebook.clone()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, codebook: Tensor) -> Tensor:
        # index_select, because the gradient of codebook[codes] adds up in an order that depends on the threads
        found = (
            codebook.index_select(0, self.codes.ravel()) if len(codebook) else codebook.new_zeros(self.codes.numel())
        )
        values = found.view(self.codes.shape)
        return torch.where(self.mask, values, torch.zeros((), dtype=codebook.dtype, device=codebook.device))

    def right_inverse(self, x: Tensor) -> Tensor:
        return self.start.to(x.device, x.dtype).clone()


def masked(model: nn.Module, masks: Weights) -> nn.Module:
    """Hold weights at exactly zero where the mask of their name is zero; the rest is trained freely.

    masks: a tensor for each constrained weight, of its shape; zero (or False) cuts the connection.
    Works on the model in place and returns it. Raises UnknownNameError for a mask of no parameter, WeightsError
    for a mask of another shape.
    """
    sites = _sites(model)
    for name, weight in masks.items():
        found = _find(sites, name)
        mask = torch.from_numpy(np.ascontiguousarray(weight.array().astype(np.float32) != 0))
        parameter = getattr(*found[0])
        _same_shape(name, mask, parameter)
        for module, attribute in found:
            _constrain(module, attribute, Masked(mask.to(parameter.device)))
    _refresh_recurrent(model)
    return model


def constrained(model: nn.Module, steps: Mapping[str, Callable[[], Masked]]) -> nn.Module:
    """Hold each named parameter by a step of its own; each place of a tied one has one more. As `masked` does."""
    sites = _sites(model)
    for name, make in steps.items():
        for module, attribute in _find(sites, name):
            _constrain(module, attribute, make())
    _refresh_recurrent(model)
    return model


def shared(model: nn.Module, weights: Weights, where: Where | None = None) -> nn.Module:
    """Give the model these weights and train their codebooks: equal weights stay equal, zeros stay zero.

    where: which weights are shared; None chooses those that are held by a palette, and plain matrices and filters
    in which values repeat: at most half as many different values as there are nonzero elements. All other weights
    are copied into the model and stay plain. Works in place and returns the model.
    Raises UnknownNameError for a weight that is no parameter of the model, WeightsError for another shape.
    """
    sites = _sites(model)
    for name, weight in weights.items():
        if name in dict(model.named_buffers()):
            model.get_buffer(name).copy_(to_tensor(weight.array()))
            continue
        found = _find(sites, name)
        parameter = getattr(*found[0])
        values = to_tensor(weight.array()).to(parameter.device, parameter.dtype)
        _same_shape(name, values, parameter)
        with torch.no_grad():
            parameter.copy_(values)
        if where(weight) if where is not None else _has_palette(weight.scheme) or _repeats(values):
            _share(found, values)
    _refresh_recurrent(model)
    return model


def release(model: nn.Module) -> nn.Module:
    """Turn every constrained tensor into a plain parameter with exactly the values that it had; ties stay ties.

    Of `levelled` tensors the step becomes the nearest bfloat16, as `Multiples` holds it: a change of 0.2 % at most.
    Names and their order are as they were before. Parametrizations of other kinds (a weight norm, say) are left
    alone. Works in place and returns the model.
    """
    found = [(module, _ours(module)) for module in model.modules() if _ours(module)]
    values = [{name: _value(module, name, steps) for name, steps in ours.items()} for module, ours in found]
    for (module, ours), plain in zip(found, values, strict=True):
        _make_plain(module, ours)
        for name, value in plain.items():
            parameter = getattr(module, name)
            parameter.grad, parameter.data = None, value
        order = max((steps[0].order for steps in ours.values()), key=len)
        for name in [name for name in order if name in module._parameters]:
            module._parameters[name] = module._parameters.pop(name)  # to the end; after the last, all are in order
    _refresh_recurrent(model)
    return model


def _ours(module: nn.Module) -> dict[str, Any]:
    """The constrained parameters of one module and what constrains them."""
    if not parametrize.is_parametrized(module):
        return {}
    return {name: steps for name, steps in module.parametrizations.items() if isinstance(steps[0], Constraint)}


@torch.no_grad()
def _value(module: nn.Module, name: str, steps: Any) -> Tensor:
    """What becomes of a tensor; one that something else computes further is as it was."""
    found: Tensor = steps[0].settled(steps.original) if len(steps) == 1 else getattr(module, name)
    return found.detach().clone()


def _make_plain(module: nn.Module, ours: Mapping[str, Any]) -> None:
    """Put the original parameters back.

    A module and its copies share a class, and torch's function takes the attribute from that class: it would break
    the copies. So it serves only where somebody else's parametrization is on the same module.
    """
    if len(ours) < len(module.parametrizations):
        for name in ours:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        return
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, steps in ours.items():
        module._parameters[name] = steps.original


def _share(found: list[Site], values: Tensor) -> None:
    """Tied parameters get one codebook, because they are one Parameter."""
    mask = values != 0
    codebook, inverse = torch.unique(values[mask], return_inverse=True)
    codes = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    codes[mask] = inverse
    for module, attribute in found:
        _constrain(module, attribute, Shared(codebook, codes, mask))


def constrain(model: nn.Module, name: str, step: Constraint) -> None:
    """Compute the parameter of that name, wherever it is tied to, by one constraint, in place.

    Raises UnknownNameError for no parameter, WeightsError for one that is constrained already.
    """
    for module, attribute in _find(_sites(model), name):
        _constrain(module, attribute, step)
    _refresh_recurrent(model)


def _constrain(module: nn.Module, attribute: str, step: Constraint) -> None:
    step.order = tuple(module._parameters)
    parametrize.register_parametrization(module, attribute, step, unsafe=isinstance(step, Shared))


def _sites(model: nn.Module) -> dict[str, list[Site]]:
    """Every name of a parameter, and all places that hold that same parameter."""
    places: dict[int, dict[tuple[int, str], Site]] = {}
    names: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), {})[id(module), attribute] = (module, attribute)
            names[f"{prefix}.{attribute}" if prefix else attribute] = id(parameter)
    return {name: list(places[number].values()) for name, number in names.items()}


def _find(sites: dict[str, list[Site]], name: str) -> list[Site]:
    prefix, _, attribute = name.rpartition(".")
    if f"{prefix}{'.' if prefix else ''}parametrizations.{attribute}.original" in sites:
        raise WeightsError(f"{name} is constrained already: release the model first")
    if name not in sites:
        raise UnknownNameError("parameter of the model", name, sites)
    module, attribute = sites[name][0]
    if parametrize.is_parametrized(module, attribute):
        raise WeightsError(f"{name} is tied to a parameter that is also given: give one of them")
    return sites[name]


def _same_shape(name: str, found: Tensor, parameter: Any) -> None:
    if found.shape != parameter.shape:
        raise WeightsError(f"{name}: the model has {list(parameter.shape)}, given is {list(found.shape)}")


def _has_palette(plan: Plan) -> bool:
    if isinstance(plan, Scheme):
        return plan.codec.name == "palette" or any(_has_palette(part) for part in plan.parts.values())
    return isinstance(plan, Smallest) and any(_has_palette(option) for option in plan.options)


def _repeats(values: Tensor) -> bool:
    nonzero = values[values != 0]
    return values.ndim >= 2 and 2 * len(torch.unique(nonzero)) <= len(nonzero)


def _refresh_recurrent(model: nn.Module) -> None:
    """nn.RNN, LSTM and GRU keep a list of their weights, which torch renews before a pass if one of them changed.

    While a weight is computed the list holds a result of autograd, with which no module can be copied: after a
    pass it is detached.
    """
    for module in model.modules():
        if not isinstance(module, nn.RNNBase):
            continue
        for key in [key for key, hook in module._forward_hooks.items() if hook is _detach]:
            del module._forward_hooks[key]
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        if parametrize.is_parametrized(module):
            _detach(module)
            module.register_forward_hook(_detach)


def _detach(module: nn.RNNBase, *_: object) -> None:
    module._flat_weights = [weight.detach() for weight in module._flat_weights]

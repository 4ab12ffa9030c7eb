"""Units that are one unit: the same weights, and the same gradient, so that no step ever tells them apart.

Decides when the units of a layer are alike. Zeros alone are no symmetry: the last layer of a branch, or a head, may
start at zero, because its units get different gradients.

Source: Goodfellow et al., Deep Learning, 2016, 8.4 (initial parameters need to break symmetry).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from steelyard.learn.matrices import biases, matrices
from steelyard.learn.passage import Call, rows_alike

NOISE = 1e-5  # a gradient of this share of that of the layers above is what rounding has left of zero

Slope = Callable[[Tensor], Tensor | None]  # parameter -> its gradient


def symmetric(calls: Sequence[Call], found: Mapping[str, nn.Module], slope: Slope) -> set[str]:
    """The layers of which all units have the same weights and get the same gradient.

    found: the layers by name, at least those that are called. slope: the gradient of a parameter.

    Where a layer gets no gradient at all, the layers that it feeds decide: their gradients may still differ between
    the units in question, and then the next step tells them apart.
    """
    suspects = {name for name in {call.layer for call in calls} if same_weights(found[name])}
    if not suspects:
        return set()
    proven: set[str] = set()
    for call in reversed(calls):
        if call.layer in suspects and call.layer not in proven:
            fed = [c for c in calls if call.order in c.fed_by]
            own = [_rows(part, unit) for part, unit in _parts(found[call.layer], slope)]
            shut = (call.gradient or 0.0) <= NOISE * max((c.gradient or 0.0 for c in fed), default=0.0)
            if fed and (shut or not any(bool(rows.any()) for rows in own)):
                alike = all(_tells_nothing(found[c.layer], slope) for c in fed)
            else:
                alike = bool(own) and all(map(rows_alike, own))
            if alike:
                proven.add(call.layer)
    return proven


def same_weights(layer: nn.Module) -> bool:
    """Whether all units of a layer have the same weights and biases; False where they are computed from others."""
    if is_parametrized(layer) or not has_units(layer):
        return False
    return all(rows_alike(_rows(part, unit)) for part, unit in _parts(layer, lambda parameter: parameter))


def has_units(layer: nn.Module) -> bool:
    """Whether a layer has several units that could be alike."""
    return any(m.values.shape[1 if m.role == "table" else 0] > 1 for m in matrices(layer))


def _tells_nothing(layer: nn.Module, slope: Slope) -> bool:
    """Whether the gradient of a layer is the same for all of its inputs, or zero."""
    return all(rows_alike(part.transpose(0, 1)) for part, unit in _parts(layer, slope) if unit == 0 and part.ndim > 1)


def _rows(part: Tensor, unit: int) -> Tensor:
    return part.movedim(unit, 0).reshape(part.shape[unit], -1)


def _parts(layer: nn.Module, of: Slope) -> Iterator[tuple[Tensor, int]]:
    """For each matrix and bias of a layer its part of a tensor that belongs to the parameter, and the axis of units."""
    units = 1
    for matrix in matrices(layer):
        parameter = getattr(layer, matrix.parameter)
        given = of(parameter)
        if given is None:
            continue
        like = torch.empty_strided(parameter.shape, parameter.stride(), dtype=given.dtype, device=given.device)
        view, start = matrix.values, matrix.values.storage_offset() - parameter.storage_offset()
        units = view.shape[0]
        part = like.copy_(given.detach()).as_strided(view.shape, view.stride(), start)
        yield part, 1 if matrix.role == "table" else 0
    for name, _ in biases(layer):
        given = of(getattr(layer, name))
        if given is not None and given.numel() % units == 0:
            yield given.detach().reshape(-1, units), 1

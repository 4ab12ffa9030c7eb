"""Structured pruning: channels, heads and neurons go, with all that only they feed, and the module becomes smaller.

Decides which units go: by importance, all families ranked together, until a budget is met. What belongs to a unit and
how layers are resized is `steelyard.graph`. Knows nothing of files: `from_module` and ``into_module(resize=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.core.where import where as choose
from steelyard.edit.importance import importance
from steelyard.errors import ModelError, RecipeError, WeightsError, quoted
from steelyard.formats.module import from_module
from steelyard.graph.units import Family, Units, narrow_, runs, units_of
from steelyard.learn.evaluate import evaluating
from steelyard.learn.options import check_choice, check_whole
from steelyard.learn.task import Batch, batch_arguments
from steelyard.learn.unharmed import unmoved

Budget = Literal["parameters", "multiplications"]
EXAMPLES = 2  # of a batch are enough to see who feeds whom


def prune_structured_(
    model: nn.Module,
    batch: Any,
    fraction: float,
    *,
    budget: Budget = "parameters",
    by: Weights | None = None,
    where: Where | str | None = None,
    floor: float = 0.1,
    multiple: int = 1,
    normalize: bool | None = None,
) -> Table:
    """Remove the least important channels, heads and hidden units of a model, in place: its tensors become smaller.

    What can only go together is found from the operations of one forward pass over `batch` (a tensor, a tuple of
    arguments or a Batch): through sums, concatenations, convolutions in groups, norms, flattening, attention heads,
    recurrent layers and tied weights (`steelyard.graph.units`). That the smaller model runs is tried before.

    fraction: the share of the budget that goes, above 0 and below 1, and hardly more: of all parameters, or of the
    multiplications of a forward pass. by: scores for every weight, summed over all weights of a unit, the absolute sum
    counts; so gradients times weights give the first-order Taylor criterion of a whole unit (Molchanov et al. 2019);
    or evidence that ranks weights, as `Prune` takes it, for every weight (fisher, taylor). None: the root of the sum
    of squares (L2; with a group penalty before, Li et al. 2017, Wen et al. 2016). Families of units
    are ranked together, with `normalize` relative to the mean of their family (None: for L2 alone; Fang et al. 2023).
    where: only units along the first axis of one of these tensors: what its layer gives (along another axis if the
    first one cannot lose anything, as that of an embedding). floor: the share of each family that stays in any
    case, and at least one unit: no layer goes as a whole. multiple: families keep whole multiples of so many units,
    where they have as many.

    Returns a table: for each family its tensors, units before and after; the totals are in the metadata. Train the
    model on after this, with a new optimizer. Raises RecipeError for numbers out of range, WeightsError for scores
    that are missing, of another shape or NaN, ModelError, with the model untouched, if nothing may go or the budget
    cannot be met.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prune_structured_(net, torch.zeros(1, 4), 0.5).rows[0]["after"], net[0]
    (7, Linear(in_features=4, out_features=7, bias=True))

    Sources: Li et al., "Pruning Filters for Efficient ConvNets", 2017; Fang et al., "DepGraph: Towards Any Structural
    Pruning", 2023.
    """
    _check_numbers(fraction, floor, budget)
    check_whole(multiple=multiple)
    with unmoved(model), evaluating(model):
        units = units_of(model, few(batch))
        found = [f for f in units.families if len(f.units) > 1 and _chosen(f, where, model, units)]
        if not found:
            raise ModelError("there are no units to remove: the model returns, or its code fixes, all that was chosen")
        scores = unit_scores(model, units, by)
        if normalize if normalize is not None else by is None:
            scores = _relative(scores, found)
        alive = _Ranking(model, units, found, scores, budget, floor, multiple).alive(1 - fraction)
        before, after = (_totals(model, units, a) for a in (np.ones(units.count, bool), alive))
        if not runs(model, few(batch), units.kept(alive)):
            raise ModelError(f"{type(model).__name__} does not run at these widths: choose other layers (where=)")
    narrow_(model, units.kept(alive))
    return _table(found, alive, _meta(before, after))


def _table(families: list[Family], alive: np.ndarray, meta: Mapping[str, Any]) -> Table:
    rows = []
    for family in families:
        sites = ", ".join(f"{name}[{axis}]" for name, axis in family.sites)
        rows.append({"tensors": sites, "before": len(family.units), "after": int(alive[family.units].sum())})
    first = Column("tensors", "", "names, and the axis along which the units lie")
    return Table.of("units kept", [first, Column("before"), Column("after")], rows, meta)


def few(batch: Any) -> tuple[Any, ...]:
    """The arguments of a batch, cut to a few examples."""
    arguments = batch_arguments(batch)
    if not isinstance(batch, Batch) and len(arguments) > 1:
        return arguments  # which axis counts the examples is known of a Batch and of a single tensor
    return tuple(a[:EXAMPLES] if isinstance(a, Tensor) and a.dim() else a for a in arguments)


def _check_numbers(fraction: float, floor: float, budget: str) -> None:
    check_choice("budget", budget, get_args(Budget))
    if not 0 < fraction < 1:
        raise RecipeError(f"the fraction that goes is above 0 and below 1, not {fraction}")
    if not 0 <= floor <= 1:
        raise RecipeError(f"the floor, a share of each family, is between 0 and 1, not {floor}")


def _chosen(family: Family, where: Where | str | None, model: nn.Module, units: Units) -> bool:
    if where is None:
        return True
    condition, weights = choose(where) if isinstance(where, str) else where, from_module(model)
    outputs = [name for name, axis in family.sites if axis == 0 or (units.axes[name][0] < 0).all()]
    return any(condition(weights[name]) for name in outputs if name in weights)


def unit_scores(model: nn.Module, units: Units, by: Weights | None = None) -> np.ndarray:
    """The importance of each unit, (units,): the sum of `by` over its weights, absolute; None: their L2 norm."""
    total, weights = np.zeros(units.count), from_module(model)
    for name, parameter in model.named_parameters():
        axes = units.axes[name]
        if not any((a >= 0).any() for a in axes):
            continue
        if by is None:
            values = parameter.detach().double().square().cpu().numpy()
        else:
            values = importance(by, weights[name]).of().astype(np.float64)
        if not np.isfinite(values).all():
            raise WeightsError(f"{quoted(name)} has NaN or infinite values, which have no rank")
        for axis, owners in enumerate(axes):
            along = values.sum(tuple(i for i in range(values.ndim) if i != axis))
            np.add.at(total, owners[owners >= 0], along[owners >= 0])
    return np.sqrt(total) if by is None else np.abs(total)


def _relative(scores: np.ndarray, families: list[Family]) -> np.ndarray:
    found = scores.copy()
    for family in families:
        found[family.units] /= scores[family.units].mean() or 1.0
    return found


@dataclass(frozen=True)
class _Ranking:
    """Units in the order in which they go, and what stays of a budget when so many have gone."""

    model: nn.Module
    units: Units
    families: list[Family]
    scores: np.ndarray
    budget: Budget
    floor: float
    multiple: int

    def alive(self, keep: float) -> np.ndarray:
        """The units that stay: the least ones have gone, until `keep` of the budget is left."""
        order = self._order()
        whole = self._cost(np.ones(self.units.count, bool))
        low, high = 0, len(order)  # so many units go: too few, and perhaps enough
        if self._cost(self._without(order)) > keep * whole:
            least = self._cost(self._without(order)) / whole
            raise ModelError(f"{1 - keep:.1%} of the {self.budget} cannot go: {1 - least:.1%} at most, with a floor of "
                             f"{self.floor:g}: remove less, lower the floor, or choose more layers")  # fmt: skip
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._cost(self._without(order[:middle])) <= keep * whole else (middle, high)
        return self._without(order[:high])

    def _order(self) -> np.ndarray:
        """All units that may go, the least first."""
        going = []
        for family in self.families:
            stays = max(1, math.ceil(self.floor * len(family.units)))
            going.append(
                family.units[np.argsort(self.scores[family.units], kind="stable")][: len(family.units) - stays]
            )
        every = np.concatenate(going)
        return every[np.argsort(self.scores[every], kind="stable")]

    def _without(self, gone: np.ndarray) -> np.ndarray:
        alive = np.ones(self.units.count, bool)
        alive[gone] = False
        if self.multiple > 1:
            for family in self.families:
                short = min(-int(alive[family.units].sum()) % self.multiple, int((~alive[family.units]).sum()))
                out = family.units[~alive[family.units]]
                alive[out[np.argsort(-self.scores[out], kind="stable")][:short]] = True
        return alive

    def _cost(self, alive: np.ndarray) -> float:
        if self.budget == "parameters":
            return self.units.parameters(alive, _parameter_names(self.model))
        return self.units.multiplications(alive)


def _parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _totals(model: nn.Module, units: Units, alive: np.ndarray) -> tuple[int, int]:
    return units.parameters(alive, _parameter_names(model)), round(units.multiplications(alive))


def _meta(before: tuple[int, int], after: tuple[int, int]) -> Mapping[str, Any]:
    return {
        "parameters before": before[0],
        "parameters": after[0],
        "multiplications before": before[1],
        "multiplications": after[1],
    }

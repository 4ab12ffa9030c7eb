"""Rounding to uniform levels layer by layer, each by the Hessian of its inputs. How one is rounded is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from steelyard.core.packed import Packed, Plan, Scheme, pack
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import Levels, finite
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.edit.prune import scoped
from steelyard.edit.quantize import held_so

# (weight, its matrix (outputs, inputs), the Hessian, inputs that share a scale) -> codes, scales, zero points
Solver = Callable[[Weight, np.ndarray, np.ndarray | None, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def by_layer(
    weights: Weights, by: Weights | None, levels: Levels, plans: Mapping[str, Plan], min_ndim: int, solve: Solver
) -> Weights:
    """The weights, those in scope rounded by `solve` and held by the affine codec, if they are not already.

    Raises WeightsError if there are tensors and none is in scope.
    """
    about = About() if by is None else About.of(by)
    chosen = {item.name for item in scoped(weights, min_ndim, "rounded")}

    def one(item: Weight) -> Weight:
        codec = levels.codec(Rows(item.spec.shape, item.name in about.first))
        if item.name not in chosen or held_so(item, codec):
            return item
        return item.then(partial(_rounded, item, by, levels, plans, solve), scheme=Scheme(codec, plans))

    return weights.with_items(one(item) for item in weights.values())


def _rounded(
    weight: Weight, by: Weights | None, levels: Levels, plans: Mapping[str, Plan], solve: Solver, x: np.ndarray
) -> Packed | np.ndarray:
    """`x`, the values of `weight`, rounded by `solve`: as one matrix, or several where outputs have own inputs.

    Raises WeightsError for evidence that is missing, of another kind or of other weights, CodecError for NaN.
    """
    rows, h = (Rows(weight.spec.shape), None) if by is None else hessian_of(by, weight)
    if by is not None:
        check_same(About.of(by), weight, x)
    if not finite(weight, x).size:
        return pack(x, Scheme(levels.codec(rows), plans))
    group = levels.grouped(rows)
    blocks = enumerate(np.split(rows.matrix(x), rows.blocks))
    parts = [solve(weight, own, None if h is None else h[i], group) for i, own in blocks]
    codes, scale, zero = (np.concatenate(found) for found in zip(*parts, strict=True))
    return levels.packed(rows, weight.spec, codes, scale, zero, plans)

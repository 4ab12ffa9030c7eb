"""Pieces of tensors and tensors of pieces, read in blocks where the files allow it.

Every tensor is seen as (outer, length, inner) around one axis. Knows nothing of names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight

if TYPE_CHECKING:
    import numpy as np


def piece(weight: Weight, name: str, axis: int, start: int, length: int, shape: tuple[int, ...]) -> Weight:
    """The `length` indices from `start` on along `axis`, in the given `shape`, under another name."""
    before = weight.spec.shape
    spec = Spec(shape, weight.spec.dtype)
    index = (slice(None),) * axis + (slice(start, start + length),)

    def read() -> np.ndarray:
        import numpy as np

        return np.ascontiguousarray(weight.array()[index]).reshape(shape)

    fill = None if weight.fill is None else partial(_fill_piece, weight, before, axis, start, length)
    if fill is not None:
        read = partial(_whole, fill, spec)
    return replace(weight, name=name, spec=spec, read=read, fill=fill, stored=None, scheme=None)


def together(weights: Sequence[Weight], name: str, axis: int, shapes: Sequence[tuple[int, ...]]) -> Weight:
    """The `weights`, seen in `shapes` that differ along `axis` at most, one after the other along it."""
    lengths = [shape[axis] for shape in shapes]
    first = shapes[0]
    spec = Spec((*first[:axis], sum(lengths), *first[axis + 1 :]), weights[0].spec.dtype)

    def read() -> np.ndarray:
        import numpy as np

        return np.concatenate([w.array().reshape(s) for w, s in zip(weights, shapes, strict=True)], axis)

    fill = None
    if all(weight.fill is not None for weight in weights):
        fill = partial(_fill_together, weights, lengths, math.prod(first[:axis]), math.prod(first[axis + 1 :]))
        read = partial(_whole, fill, spec)
    return Weight(name, spec, read, origin=weights[0].origin, fill=fill)


def _whole(fill: partial[None], spec: Spec) -> np.ndarray:
    import numpy as np

    array = np.empty(spec.shape, spec.dtype.numpy)
    fill(0, array.reshape(-1))
    return array


def _fill_piece(
    weight: Weight, shape: tuple[int, ...], axis: int, start: int, length: int, first: int, flat: np.ndarray
) -> None:
    """Fill `flat` with the elements of a piece from `first` on."""
    import numpy as np

    outer, whole, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if weight.fill is None or not flat.size:
        return
    if outer == 1:
        weight.fill(start * inner + first, flat)
        return
    row = length * inner  # elements of the piece for each outer index
    low, high = first // row, -(-(first + flat.size) // row)
    rows = np.empty((high - low, whole, inner), flat.dtype)
    weight.fill(low * whole * inner, rows.reshape(-1))
    flat[:] = rows[:, start : start + length].reshape(-1)[first - low * row :][: flat.size]


def _fill_together(
    weights: Sequence[Weight], lengths: Sequence[int], outer: int, inner: int, first: int, flat: np.ndarray
) -> None:
    """Fill `flat` with the elements, from `first` on, of tensors that lie one after the other along an axis."""
    import numpy as np

    if not flat.size:
        return
    if outer == 1:
        at = 0
        for weight, length in zip(weights, lengths, strict=True):
            low, high = max(first, at), min(first + flat.size, at + length * inner)
            if low < high and weight.fill is not None:
                weight.fill(low - at, flat[low - first : high - first])
            at += length * inner
        return
    row = sum(lengths) * inner
    low, high = first // row, -(-(first + flat.size) // row)
    rows = [np.empty((high - low, length, inner), flat.dtype) for length in lengths]
    for weight, length, part in zip(weights, lengths, rows, strict=True):
        if weight.fill is not None:
            weight.fill(low * length * inner, part.reshape(-1))
    flat[:] = np.concatenate(rows, 1).reshape(-1)[first - low * row :][: flat.size]

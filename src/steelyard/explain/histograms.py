"""How the values of weights are distributed: counts per bin, and how many distinct values there are.

Works on any Weights, one tensor at a time, packed or plain; needs no torch and no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.errors import WeightsError


def histogram(weights: Weights, bins: int = 64, span: tuple[float, float] | None = None) -> Table:
    """The number of values in each of `bins` equal bins, for every numeric tensor.

    Args:
        weights: tied tensors are counted once; values that are not finite are counted apart.
        bins: how many, at least 1.
        span: the lowest and the highest edge for all tensors; None = each tensor's own minimum and maximum.
            What lies outside is not counted.

    Returns a row per tensor with its edges (bins + 1 of them) and counts. Raises WeightsError for no bins.

    >>> table = histogram(Weights.of({"w": np.float32([0.0, 0.1, 1.0])}), bins=2)
    >>> table.column("counts"), table.column("edges")
    ([[2, 1]], [[0.0, 0.5, 1.0]])
    """
    if bins < 1:
        raise WeightsError(f"a histogram has at least one bin, got {bins}")
    rows = [_row(item, bins, span) for item in weights.values() if item.spec.dtype.kind != "complex"]
    columns = [
        *(Column("name"), Column("elements"), Column("minimum"), Column("maximum")),
        Column("zeros", about="values that are exactly zero"),
        *(Column("not finite"), Column("edges"), Column("counts")),
    ]
    return Table.of("histogram of the weights", columns, rows, {"bins": bins})


def _row(item: Weight, bins: int, span: tuple[float, float] | None) -> dict[str, Any]:
    values = item.array().astype(np.float64).ravel()
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
    counts, edges = np.histogram(finite, bins, span or ((low, high) if low != high and low is not None else None))
    return {
        "name": item.name,
        "elements": len(values),
        "minimum": low,
        "maximum": high,
        "zeros": int((finite == 0).sum()),
        "not finite": len(values) - len(finite),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def unique_values(weights: Weights) -> Table:
    """How many distinct bit patterns each tensor holds, and the bits that an index into them needs.

    -0.0 and 0.0 are two patterns, and so are different NaNs: what counts is what a codebook must hold.

    >>> unique_values(Weights.of({"w": np.float32([1, 1, 2])})).column("distinct")
    [2]
    """
    rows = []
    for item in weights.values():
        array = np.ascontiguousarray(item.array()).ravel()
        patterns = array.view(f"V{array.dtype.itemsize}" if array.dtype.itemsize > 8 else f"u{array.dtype.itemsize}")
        distinct = len(np.unique(patterns))
        bits = max(distinct - 1, 0).bit_length()
        rows.append({"name": item.name, "elements": array.size, "distinct": distinct, "index": bits})
    columns = [Column("name"), Column("elements"), Column("distinct"), Column("index", "bits", "width of an index")]
    return Table.of("distinct values", columns, rows)

"""How the values of weights are distributed: counts per bin, and how many distinct values there are.

Works on any Weights, one tensor at a time, packed or plain; needs no torch and no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.errors import WeightsError

LARGEST = np.finfo(np.float64).max


def histogram(weights: Weights, bins: int = 64, span: tuple[float, float] | None = None) -> Table:
    """The number of values in each of `bins` equal bins, for every numeric tensor.

    Args:
        weights: tied tensors are counted once; values that are not finite are counted apart.
        bins: how many, at least 1.
        span: the lowest and the highest edge for all tensors; None = each tensor's own minimum and maximum.
            What lies outside is not counted.

    Returns a row per tensor with its edges (bins + 1 of them) and counts. Raises WeightsError for no bins
    or a span that is none.

    >>> table = histogram(Weights.of({"w": np.float32([0.0, 0.1, 1.0])}), bins=2)
    >>> table.column("counts"), table.column("edges")
    ([[2, 1]], [[0.0, 0.5, 1.0]])
    """
    if span is not None and not -np.inf < span[0] < span[1] < np.inf:
        raise WeightsError(f"the span of a histogram is two finite numbers, the lower first, not {span}")
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
    scale = 4.0 if len(finite) and max(-finite.min(), finite.max()) > 1e307 else 1.0  # or the range would overflow
    ends = _wide_enough(low / scale, high / scale, bins) if low is not None and high is not None else (0.0, 1.0)
    counts, edges = np.histogram(finite / scale, bins, (span[0] / scale, span[1] / scale) if span else ends)
    return {
        "name": item.name,
        "elements": len(values),
        "minimum": low,
        "maximum": high,
        "zeros": int((finite == 0).sum()),
        "not finite": len(values) - len(finite),
        "edges": (np.clip(edges, -LARGEST / scale, LARGEST / scale) * scale).tolist(),
        "counts": counts.tolist(),
    }


def _wide_enough(low: float, high: float, bins: int) -> tuple[float, float]:
    """The range itself, or one around it where the values are too close for that many distinct edges."""
    least = bins * max(8 * np.finfo(np.float64).eps * max(abs(low), abs(high)), 1e-300)
    if high - low > least:
        return low, high
    middle = low + (high - low) / 2
    pad = max(abs(middle) / 2, least) if middle else 0.5
    return middle - pad, middle + pad


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

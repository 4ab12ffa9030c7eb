"""Exact statistics of every tensor: extremes, moments, norms, quantiles, distribution, and what is not a number.

NaN and infinities are counted and take no part in anything else, so that every figure is defined for every tensor;
without a finite value, minimum, maximum, mean, standard deviation and quantiles are missing. The numbers of a complex
tensor are its real and imaginary parts.

Mean, L1 and the sums behind the standard deviation and L2 are whole numbers until they are rounded once, at the end.
Quantiles are values that occur: the least one that at least the given share of the values does not exceed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights, given
from steelyard.core.where import Where
from steelyard.errors import WeightsError
from steelyard.explain.patterns import WIDE, part
from steelyard.explain.reading import Progress, Workspace
from steelyard.explain.sums import Tally, entropy, exact_mean_and_spread, median
from steelyard.explain.tally import tally

SMALL = 4_000_000  # bytes up to which numpy alone is as quick, and nothing is compiled at a first use
THOUSANDTHS = (1, 10, 50, 250, 500, 750, 950, 990, 999)  # the quantiles that are shown
BINS = 32
_BARS = "▁▂▃▄▅▆▇█"

_COLUMNS = (
    Column("name"),
    Column("dtype"),
    Column("elements"),
    Column("minimum", "", "of the finite values, as all that follows"),
    Column("maximum"),
    Column("mean"),
    Column("std", "", "of the population: the squares are divided by the number of values"),
    Column("distribution", "", "from minimum to maximum, the height as the square root of the count"),
    Column("zeros", "", "0.0 and -0.0"),
    Column("-0", "", "those of the zeros whose sign bit is set"),
    Column("subnormal", "", "nearer to zero than the least normal number of the dtype"),
    Column("NaN"),
    Column("+Inf"),
    Column("-Inf"),
    Column("L1", "", "the sum of absolute values"),
    Column("L2", "", "the root of the sum of squares"),
    Column("entropy", "bits", "of a value drawn at random; missing: the dtype has more than 16 bits"),
    Column("entropy of leading 16 bits", "bits", "of those of a value drawn at random, where it has more"),
    Column("distinct", "", "bit patterns that occur; missing: more than 4096 of a dtype of more than 16 bits"),
    Column("row norms", "", "least, median and largest L2 norm of a slice along the first axis"),
    Column("column norms", "", "the same of a place in such a slice"),
)


def statistics(
    weights: Weights,
    where: Where | None = None,
    bins: int = BINS,
    norms: bool = True,
    progress: Progress | None = None,
) -> list[Table]:
    """Three tables with a row for each tensor: statistics, quantiles, and histogram.

    Args:
        weights: tied tensors are looked at once. Tensors are read in blocks where their file allows it: memory does
            not grow with them.
        where: which tensors; None = all.
        bins: of the histogram, at least 1, between minimum and maximum. For dtypes of more than 16 bits its inner
            edges are numbers of 16 significant leading bits, so that the counts are exact and the widths nearly equal.
        norms: whether rows and columns are looked at as well.
        progress: is told of bytes that have been looked at.

    Raises WeightsError for no bins, or if no tensor matches.

    >>> w = Weights.of({"w": np.float32([[0.0, 3.0], [4.0, np.nan]])})
    >>> shown, quantiles, histogram = statistics(w, bins=4)
    >>> [shown.rows[0][key] for key in ("minimum", "maximum", "mean", "L2", "zeros", "NaN", "row norms")]
    [0.0, 4.0, 2.3333333333333335, 5.0, 1, 1, [3.0, 3.5, 4.0]]
    >>> quantiles.rows[0]["50 %"], histogram.rows[0]["counts"]
    (3.0, [1, 0, 0, 2])
    """
    if bins < 1:
        raise WeightsError(f"a histogram has at least one bin, got {bins}")
    chosen = given(weights).choose(where)
    space = Workspace(compiled=chosen.nbytes > SMALL)
    rows = [_row(item, tally(item, space, norms, progress), bins) for item in chosen.values()]
    kept = [c for c in _COLUMNS if norms or not c.name.endswith(" norms")]
    quantile_columns = [
        Column("name"),
        Column("minimum"),
        *(Column(_percent(q), "", "at least this share of the finite values is no larger") for q in THOUSANDTHS),
        Column("maximum"),
    ]
    histogram_columns = [Column("name"), Column("edges"), Column("counts", "", "finite values between the edges")]
    return [
        Table.of("statistics", kept, [_only(row, kept) for row in rows]),
        Table.of("quantiles", quantile_columns, [_only(row, quantile_columns) for row in rows]),
        Table.of("histogram", histogram_columns, [_only(row, histogram_columns) for row in rows], {"bins": bins}),
    ]


def distributions(histogram: Table, tensors: int = 12) -> Table:
    """The bins of the largest tensors of a histogram, a row for each, as densities: widths differ a little.

    >>> bars = distributions(statistics(Weights.of({"w": np.float32([0.0, 0.0, 1.0, 4.0])}), bins=2)[2])
    >>> bars.column("share per unit")
    [0.375, 0.125]
    """
    whole = [row for row in histogram.rows if row["counts"] is not None and len(row["edges"]) > 2]  # type: ignore[arg-type]
    whole.sort(key=lambda row: -sum(row["counts"]))  # type: ignore[arg-type]
    rows = []
    for row in whole[:tensors]:
        edges, counts = np.array(row["edges"]), np.array(row["counts"])
        shares = counts / counts.sum() / np.maximum(np.diff(edges), np.finfo(np.float64).tiny)
        for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
            rows.append({"name": row["name"], "from": low, "to": high, "share per unit": share})
    columns = [Column("name"), Column("from"), Column("to"), Column("share per unit", "", "of the values")]
    return Table.of("distributions", columns, rows)


def bytes_to_read(weights: Weights, where: Where | None = None) -> int:
    """The bytes that `progress` will be told of."""
    return sum(item.spec.size * item.spec.dtype.numpy.itemsize for item in weights.choose(where).values())


def _only(row: dict[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    return {c.name: row[c.name] for c in columns}


def _percent(thousandths: int) -> str:
    return f"{thousandths / 10:g} %"


def _row(item: Weight, found: Tally, bins: int) -> dict[str, Any]:
    wide = part(item.spec.dtype) in WIDE
    row: dict[str, Any] = {
        "name": item.name,
        "dtype": item.spec.dtype.name,
        "elements": item.spec.size,
        "zeros": found.zeros,
        "-0": found.negative_zeros,
        "subnormal": found.subnormal,
        "NaN": found.nan,
        "+Inf": found.infinite[0],
        "-Inf": found.infinite[1],
        "entropy": None if wide else entropy(found.counts),
        "entropy of leading 16 bits": entropy(found.counts) if wide else None,
        "distinct": found.distinct,
        "row norms": _spread(found.rows),
        "column norms": _spread(found.columns),
    }
    names = ["minimum", *map(_percent, THOUSANDTHS), "maximum"]
    if not found.finite:
        nothing = dict.fromkeys([*names, "mean", "std", "edges", "distribution"])
        return row | nothing | {"L1": 0.0, "L2": 0.0, "counts": None}
    last = found.finite - 1
    values = found.ordered([0, *(-(-found.finite * q // 1000) - 1 for q in THOUSANDTHS), last])
    if item.spec.dtype.kind in ("int", "uint", "bool"):
        values = [int(v) for v in values]
    mean, std, l1, l2 = exact_mean_and_spread(found.sums, found.finite)
    edges, counts = _histogram(found, float(values[0]), float(values[-1]), bins)
    return {
        **row,
        **dict(zip(names, values, strict=True)),
        "mean": mean,
        "std": std,
        "L1": l1,
        "L2": l2,
        "edges": edges,
        "counts": counts,
        "distribution": _sparkline(counts),
    }


def _histogram(found: Tally, low: float, high: float, bins: int) -> tuple[list[float], list[int]]:
    """One bin for one value; otherwise as many as were asked for, or as there are edges to tell apart."""
    if low == high:
        return [low, high], [found.finite]
    return found.bins(low, high, bins)


def _spread(norms: np.ndarray | None) -> list[float] | None:
    if norms is None or not norms.size:
        return None
    return [float(norms.min()), median(norms), float(norms.max())]


def _sparkline(counts: list[int], width: int = 16) -> str:
    step = -(-len(counts) // width)
    heights = np.sqrt([sum(counts[i : i + step]) for i in range(0, len(counts), step)])
    levels = np.minimum(heights / heights.max() * len(_BARS), len(_BARS) - 1).astype(int).tolist()
    return "".join(_BARS[level] if height else " " for level, height in zip(levels, heights, strict=True))

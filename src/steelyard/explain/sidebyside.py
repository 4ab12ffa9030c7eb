"""The same tensors at several moments of their life, side by side: their bytes, and how their values are spread.

Works on any Weights, one tensor at a time; needs no torch and no model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.errors import WeightsError


def bytes_by_tensor(moments: Mapping[str, Weights]) -> Table:
    """The stored bytes of every tensor, one column for each moment; None where it was not in a file.

    >>> w = Weights.of({"a": np.zeros(3, np.float32)})
    >>> bytes_by_tensor({"now": w}).rows[0]
    {'tensor': 'a', 'elements': 3, 'now': None}
    """
    _check(moments)
    names = list(dict.fromkeys(name for weights in moments.values() for name in weights))
    columns = [Column("tensor"), Column("elements"), *(Column(moment, "B", "in the file") for moment in moments)]
    rows = []
    for name in names:
        found = {moment: weights[name] for moment, weights in moments.items() if name in weights}
        row = {"tensor": name, "elements": next(iter(found.values())).spec.size}
        rows.append(row | {moment: weight.stored for moment, weight in found.items()})
    return Table.of("bytes by tensor", columns, rows)


def distributions(moments: Mapping[str, Weights], bins: int = 41, min_ndim: int = 2) -> Table:
    """How the values of each tensor are spread at each moment: counts in equal bins that all moments share.

    Exact zeros are counted apart, in the column ``zeros`` of a tensor's first bin: in a pruned tensor they would hide
    everything else. Only floating-point tensors of at least `min_ndim` axes; the bins reach from -m to m, m = the
    largest finite magnitude at any moment.

    Returns a row for each tensor, moment and bin.
    """
    _check(moments)
    rows = []
    first = next(iter(moments.values()))
    for name, weight in first.items():
        if weight.spec.dtype.kind != "float" or len(weight.spec.shape) < min_ndim:
            continue
        values = {m: w[name].array().astype(np.float64).ravel() for m, w in moments.items() if name in w}
        finite = {moment: x[np.isfinite(x)] for moment, x in values.items()}
        reach = max((float(np.abs(x).max()) for x in finite.values() if x.size), default=0.0) or 1.0
        edges = np.linspace(-reach, reach, bins + 1)
        for moment, x in finite.items():
            counts = np.histogram(x[x != 0], edges)[0].tolist()
            zeros = [int((x == 0).sum()), *[None] * (bins - 1)]
            rows += [
                {"tensor": name, "moment": moment, "left": a, "right": b, "count": c, "zeros": z}
                for a, b, c, z in zip(edges[:-1].tolist(), edges[1:].tolist(), counts, zeros, strict=True)
            ]
    columns = [Column(n) for n in ("tensor", "moment", "left", "right")]
    columns += [Column("count", "", "values in the bin, exact zeros left out"), Column("zeros", "", "of the tensor")]
    return Table.of("distribution of the weights", columns, rows, {"bins": bins})


def _check(moments: Mapping[str, Weights]) -> None:
    if not moments:
        raise WeightsError("nothing to compare: give at least one collection of weights")

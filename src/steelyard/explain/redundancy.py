"""How many of a layer's dimensions it takes to do what it does: the redundancy of each matrix, proved by cutting.

Decides what a rank is worth from singular values, by data where there are any. Knows nothing of how factors are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.edit.prune import in_scope
from steelyard.errors import RecipeError, WeightsError, quoted

COLUMNS = (
    Column("name"),
    Column("outputs"),
    Column("inputs"),
    Column("effective rank", "", "exp of the entropy of squared singular values over their sum"),
    Column("rank", "", "the least at which no more than the stated share of the squares is lost"),
    Column("redundant", "%", "of the weights: what two factors of that rank need not have"),
)


def redundancy(
    weights: Weights, by: Weights | None = None, *, error: float = 0.01, where: Where | None = None
) -> Table:
    """For each matrix the rank that it takes, and the share of its weights that would not be needed.

    With evidence `by` (``steelyard.score(model, data, "hessian")``, H = E[x x^T]) the squares are those of the layer's
    outputs on data: the singular values s are those of W H^(1/2). Without, those of the weights. The rank r is the
    least with sum of s_i^2 over i > r at most `error` of the whole; `truncated` cuts there. A matrix of m by n in two
    factors has r (m + n) elements. Kernels are matrices of outputs by all else.

    Raises RecipeError for an error outside 0 to 1, WeightsError for weights that are not finite, for evidence that is
    missing or of other weights, and where there is no matrix.

    >>> w = Weights.of({"a": np.outer(np.arange(8), np.arange(8)).astype(np.float32)})
    >>> row = redundancy(w).rows[0]
    >>> row["rank"], row["redundant"]
    (1, 0.75)

    Source: Denil et al., "Predicting Parameters in Deep Learning", 2013.
    """
    if not 0 <= error < 1:
        raise RecipeError(f"the share of the squares that may be lost is at least 0 and below 1, not {error}")
    rows, whole, needed = [], 0, 0
    for item in _matrices(weights, where):
        matrix, _, s = _decomposed(item, by, item.array())
        m, n = matrix.shape
        rank = _rank(s, error)
        kept = min(rank * (m + n), m * n)
        whole, needed = whole + m * n, needed + kept
        rows.append({"name": item.name, "outputs": m, "inputs": n, "effective rank": _effective(s), "rank": rank,
                     "redundant": 1 - kept / (m * n)})  # fmt: skip
    return Table.of("redundancy", COLUMNS, rows, {"error": error, "redundant": 1 - needed / whole})


def truncated(weights: Weights, ranks: Mapping[str, int], by: Weights | None = None) -> Weights:
    """Each matrix in `ranks` at that rank, with the least squared error of its outputs (or of itself, without `by`).

    The projection of W on the first left singular vectors of W H^(1/2): U U^T W.
    """
    return weights.with_items(
        item.then(partial(_cut, item, ranks[name], by)) if name in ranks else item for name, item in weights.items()
    )


def _matrices(weights: Weights, where: Where | None) -> list[Weight]:
    found = [item for item in weights.choose(where).values() if in_scope(item, 2) and item.spec.size]
    if not found:
        raise WeightsError("there is no matrix or kernel among these weights")
    return found


def _decomposed(weight: Weight, by: Weights | None, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix, the left singular vectors and the singular values of what it gives."""
    rows, h = (Rows(weight.spec.shape), None) if by is None else hessian_of(by, weight)
    matrix = rows.matrix(x)
    if not np.isfinite(matrix).all():
        raise WeightsError(f"{weight.origin}: {quoted(weight.name)} has NaN or infinite values")
    if h is None or by is None:
        u, s, _ = np.linalg.svd(matrix, full_matrices=False)
        return matrix, u, s
    check_same(About.of(by), weight, x)
    squares, u = np.linalg.eigh(matrix @ h.mean(0) @ matrix.T)  # (outputs, outputs): W H W^T
    return matrix, u[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0))


def _rank(s: np.ndarray, error: float) -> int:
    lost = np.append(np.cumsum((s**2)[::-1])[::-1], 0.0)  # by the rank that is kept
    return int(np.argmax(lost <= error * lost[0]))


def _effective(s: np.ndarray) -> float:
    total = float((s**2).sum())
    p = s[s > 0] ** 2 / total if total else np.ones(1)
    return float(np.exp(-(p * np.log(p)).sum()))


def _cut(weight: Weight, rank: int, by: Weights | None, x: np.ndarray) -> np.ndarray:
    matrix, u, _ = _decomposed(weight, by, x)
    first = u[:, :rank]
    rows = Rows(weight.spec.shape) if by is None else hessian_of(by, weight)[0]
    return rows.tensor(first @ (first.T @ matrix)).astype(x.dtype)

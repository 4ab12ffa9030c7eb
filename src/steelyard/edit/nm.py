"""N of every M: the least important weights of each small group become zero, the pattern that hardware can skip."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.edit._options import check_options
from steelyard.edit.evidence import Rows
from steelyard.edit.importance import Importance, importance
from steelyard.edit.prune import scoped
from steelyard.errors import RecipeError, WeightsError, quoted


@dataclass(frozen=True)
class PruneNM(Step):
    """Keep the N most important of every M consecutive inputs of each output: ``PruneNM("2:4")`` keeps half.

    The inputs are the second axis (of a convolution, at each place of its kernel), or the first where evidence says
    so. `by` is as in `Prune`: None ranks by magnitude, evidence of the kind norms as Wanda does. Equal scores: the
    first go first. Only floating-point tensors of at least `min_ndim` axes are in scope.

    Held small by the codec `NM`. Raises RecipeError for a pattern that is not N:M with 0 < N <= M <= 16, WeightsError
    if no tensor is in scope, for one whose inputs M does not divide, for scores that are missing, of another shape, or
    NaN, and for weights that are NaN or infinite.

    >>> w = Weights.of({"a": np.float32([[1, -4, 3, 2]])})
    >>> PruneNM("2:4")(w)["a"].array().tolist()
    [[0.0, -4.0, 3.0, 0.0]]

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """

    name: ClassVar[str] = "prune_nm"
    pattern: str = "2:4"
    by: Weights | None = None
    min_ndim: int = 2

    def __post_init__(self) -> None:
        check_options(self)
        numbers(self.pattern)

    def __call__(self, weights: Weights) -> Weights:
        n, m = numbers(self.pattern)
        chosen = [item for item in scoped(weights, max(self.min_ndim, 2), "pruned") if item.spec.size]
        ranks = {item.name: importance(self.by, item) for item in chosen}
        check_divides(self.pattern, {name: rank.rows for name, rank in ranks.items()})
        return weights.with_items(
            item.then(partial(_keep, ranks[name], n, m)) if name in ranks else item for name, item in weights.items()
        )


def numbers(pattern: str) -> tuple[int, int]:
    """N and M of a pattern; raises RecipeError for anything but N:M with 0 < N <= M <= 16.

    >>> numbers("4:8")
    (4, 8)
    """
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern) if isinstance(pattern, str) else None
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n <= m <= 16:
        raise RecipeError(f"a pattern is N:M with 0 < N <= M <= 16, such as 2:4, not {pattern!r}")
    return n, m


def check_divides(pattern: str, matrices: Mapping[str, Rows]) -> None:
    """Raise WeightsError if a tensor has no whole number of groups; it says what leaves all such tensors out."""
    inputs = {name: rows.shape[0 if rows.first else 1] for name, rows in matrices.items()}
    wrong = [name for name, count in inputs.items() if count % numbers(pattern)[1]]
    if wrong:
        name, more = wrong[0], f" and of {len(wrong) - 1} more" if wrong[1:] else ""
        leave = ",".join(f"!{glob.escape(name)}" for name in wrong[:5])
        raise WeightsError(
            f"the pattern {pattern} does not divide the {inputs[name]} inputs of {quoted(name)} "
            f"{list(matrices[name].shape)}{more}; leave out what it does not fit: --where {quoted(leave)} (where)"
        )


def _keep(rank: Importance, n: int, m: int, x: np.ndarray) -> np.ndarray:
    axis = 0 if rank.rows.first else 1
    scores = np.moveaxis(rank.of(x), axis, -1)
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    gone = np.zeros(groups.shape, bool)
    np.put_along_axis(gone, np.argsort(groups, axis=-1, kind="stable")[..., : m - n], True, axis=-1)
    return np.where(np.moveaxis(gone.reshape(scores.shape), -1, axis), x.dtype.type(0), x)

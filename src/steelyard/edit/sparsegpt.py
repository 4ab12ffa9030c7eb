"""Weights go one input after the other, and those that are left make up for it: optimal brain surgery by layers.

Decides which weights go, and how the others change, from the second moments of each layer's inputs alone. Knows
nothing of how they were measured: ``steelyard.score(model, data, "hessian")`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import finite
from steelyard.edit._options import check_options
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.edit.nm import check_divides, numbers
from steelyard.edit.prune import scoped
from steelyard.errors import RecipeError, WeightsError

FAINT = 1e-9  # of the mean second moment: what an input counts that was always zero, without damping
SHARES = (1.0, 0.75, 0.5)  # the spans of levels that are tried, of one that reaches the greatest weight that stays


@dataclass(frozen=True)
class SparseGPT(Step):
    """Prune each layer so that its outputs change little: min ||W X - W' X||^2 with `fraction` of W' zero.

    With H = X X^T + `damping` mean(diag(X X^T)) I (evidence of the kind hessian), inputs are gone through in order;
    those that go have the least w^2 / [H^-1]_jj among each `block` of inputs (of each output, with a `pattern` such
    as "2:4", n of m), and the error is passed on to the inputs that come after, by the inverse of H. With `bits`, what
    stays is rounded in the same pass to 2^bits - 1 levels per output, and that error is passed on, too; the first of
    four passes does not round, and shows how far levels must reach, three try steps for each output. With `refit`
    what stays becomes the exact optimum for the zeros that were found; one system of equations for each output, so it
    takes a multiple of the time: outputs x inputs^3 / 24 at half of the zeros.

    Without `by` inputs count as uncorrelated and of one size: nothing is passed on, and the least magnitudes go.
    Only floating-point tensors of at least `min_ndim` axes are in scope. Numbers are float64 inside; one layer's
    Hessian, inputs x inputs, is in memory at a time.

    Raises RecipeError for settings out of range, WeightsError if no tensor is in scope, for evidence that is missing,
    of another kind or shape, or measured on other weights, for a pattern that does not divide, and for weights that
    are not finite.

    >>> h = Weights.of({"a": np.float32([[1, 0.9], [0.9, 1]])})
    >>> w = Weights.of({"a": np.float32([[1, 2]])})
    >>> pruned = SparseGPT(0.5, by=h, damping=0)(w)  # the second input makes up for the first
    >>> pruned["a"].array().astype(float).round(2).tolist()
    [[0.0, 2.9]]

    Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """

    name: ClassVar[str] = "sparsegpt"
    fraction: float = 0.5
    by: Weights | None = None
    pattern: str | None = None
    damping: float = 0.01
    block: int = 128
    bits: int | None = None
    refit: bool = False
    min_ndim: int = 2

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.fraction <= 1:
            raise RecipeError(f"the fraction to prune is between 0 and 1, not {self.fraction}")
        if not 0 <= self.damping <= 1:
            raise RecipeError(f"the damping is between 0 and 1, not {self.damping}")
        if self.block < 1:
            raise RecipeError(f"a block has at least 1 input, not {self.block}")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise RecipeError(f"the bits are 2 to 8, not {self.bits}")
        if self.refit and self.bits is not None:
            raise RecipeError("refit finds weights of any value, bits levels: choose one")
        if self.pattern is not None and self.block % numbers(self.pattern)[1]:
            raise RecipeError(f"a block of {self.block} inputs is no whole number of groups of {self.pattern}")

    def __call__(self, weights: Weights) -> Weights:
        chosen = [item for item in scoped(weights, max(self.min_ndim, 2), "pruned") if item.spec.size]
        matrices = {item.name: self._rows(item) for item in chosen}
        if self.pattern is not None:
            check_divides(self.pattern, matrices)
        return weights.with_items(
            item.then(partial(self._prune, item)) if name in matrices else item for name, item in weights.items()
        )

    def _rows(self, weight: Weight) -> Rows:
        first = self.by is not None and weight.name in About.of(self.by).first
        rows = Rows(weight.spec.shape, first)
        if self.by is not None and weight.name not in self.by:
            hessian_of(self.by, weight)  # says so
        return rows

    def _prune(self, weight: Weight, x: np.ndarray) -> np.ndarray:
        rows = self._rows(weight)
        matrix = rows.matrix(finite(weight, x, WeightsError))
        h = np.eye(matrix.shape[1])[None]
        if self.by is not None:
            check_same(About.of(self.by), weight, x)
            _, h = hessian_of(self.by, weight)
        order = self._order(rows, matrix.shape[1])
        out = np.empty_like(matrix)
        for part, moments in zip(np.split(np.arange(len(matrix)), len(h)), h, strict=True):
            done = surgery(matrix[part][:, order], moments[np.ix_(order, order)], self)
            out[np.ix_(part, order)] = done
            if self.refit:
                out[part] = optimum(matrix[part], out[part] != 0, moments, self.damping)
        return rows.tensor(out).astype(x.dtype)

    def _order(self, rows: Rows, inputs: int) -> np.ndarray:
        """The inputs with those of a group beside each other: channels first where a kernel has several places."""
        order = np.arange(inputs)
        if self.pattern is None or len(rows.shape) < 3 or rows.first:
            return order
        return order.reshape(rows.shape[1], -1).T.reshape(-1)


def surgery(w: np.ndarray, h: np.ndarray, how: SparseGPT) -> np.ndarray:
    """The pruned matrix. w: (outputs, inputs); h: (inputs, inputs), the second moments of the inputs."""
    upper = _inverse_factor(_damped(h, how.damping))
    pruned, _, _ = _passed(w, upper, how)
    return pruned if how.bits is None else _rounded_too(w, pruned, upper, how)


def _rounded_too(w: np.ndarray, pruned: np.ndarray, upper: np.ndarray, how: SparseGPT) -> np.ndarray:
    """The matrix pruned and rounded in one pass, each output with the step that loses least there.

    pruned: the matrix after a pass without rounding. What stays has grown, often several times, to make up for what
    went: levels must reach as far as that, and not only as far as `w`.
    """
    widest = np.abs(pruned).max(axis=1, initial=0) / (2 ** ((how.bits or 0) - 1) - 1)
    best, least, gone = _passed(w, upper, how, widest * SHARES[0])
    for share in SHARES[1:]:  # with the same zeros, so that outputs do not depend on each other
        found, lost, _ = _passed(w, upper, how, widest * share, gone)
        better = lost < least
        best[better], least[better] = found[better], lost[better]
    return best


def _passed(
    w: np.ndarray, upper: np.ndarray, how: SparseGPT, step: np.ndarray | None = None, given: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix after one pass over its inputs, what each output has lost, and which elements went.

    step: for each output the distance of its levels, None: nothing is rounded; given: which elements are to go.
    """
    w = w.copy()
    all_gone = np.zeros(w.shape, bool) if given is None else given
    lost = np.zeros(len(w))
    for start in range(0, len(upper), how.block):
        end = min(start + how.block, len(upper))
        here, inverse, gone = w[:, start:end], upper[start:end, start:end], all_gone[:, start:end]
        if given is None and how.pattern is None:
            gone[:] = _least(here, inverse, how)
        errors = np.zeros_like(here)
        for j in range(end - start):
            if given is None and how.pattern is not None and j % numbers(how.pattern)[1] == 0:
                _mark_group(gone, here, inverse, j, how.pattern)
            column = here[:, j].copy()
            kept = np.where(gone[:, j], 0.0, column if step is None else _rounded(column, step, how.bits or 0))
            errors[:, j] = (column - kept) / inverse[j, j]
            here[:, j + 1 :] -= np.outer(errors[:, j], inverse[j, j + 1 :])
            here[:, j] = kept
        w[:, end:] -= errors @ upper[start:end, end:]
        lost += np.square(errors).sum(axis=1)
    return w, lost, all_gone


def optimum(w: np.ndarray, kept: np.ndarray, h: np.ndarray, damping: float) -> np.ndarray:
    """The best weights where `kept` says, (outputs, inputs) bool, and zeros elsewhere."""
    h = _damped(h, damping)
    found = np.zeros_like(w)
    for row, here, target in zip(found, kept, w @ h, strict=True):
        if here.any():
            row[here] = np.linalg.lstsq(h[np.ix_(here, here)], target[here], rcond=None)[0]
    return found


def _damped(h: np.ndarray, damping: float) -> np.ndarray:
    """The moments, with a share of their mean on the diagonal.

    Inputs that were always zero count as much as that share says: examples to come may have them. The published code
    sets all of their weights to zero, however many are to go.
    """
    h = h.copy()
    mean = float(np.diag(h).mean()) or 1.0
    h[np.diag_indices(len(h))] += damping * mean
    dead = np.diag(h) <= 0
    h[dead, dead] = FAINT * mean
    return h


def _inverse_factor(h: np.ndarray) -> np.ndarray:
    """The upper U with U^T U = H^-1: row j has what is passed on from input j, given that those before it are done."""
    try:
        upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]  # V with V V^T = H: U is its inverse
        return np.ascontiguousarray(np.linalg.inv(upper))
    except np.linalg.LinAlgError:
        raise WeightsError("the Hessian is not positive definite: measure it on more examples (score)") from None


def _least(w: np.ndarray, inverse: np.ndarray, how: SparseGPT) -> np.ndarray:
    """Which elements of a block go: exactly round(fraction size), equal ones the first first."""
    saliency = np.square(w / np.diag(inverse))
    gone = np.zeros(w.size, bool)
    gone[np.argsort(saliency.reshape(-1), kind="stable")[: round(how.fraction * w.size)]] = True
    return gone.reshape(w.shape)


def _mark_group(gone: np.ndarray, w: np.ndarray, inverse: np.ndarray, start: int, pattern: str) -> None:
    """Decide on the group of inputs that begins here, of every output, by its weights as they are now."""
    n, m = numbers(pattern)
    group = slice(start, start + m)
    saliency = np.square(w[:, group] / np.diag(inverse)[group])
    np.put_along_axis(gone[:, group], np.argsort(saliency, axis=1, kind="stable")[:, : m - n], True, axis=1)


def _rounded(column: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    most = 2 ** (bits - 1) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        levels = np.where(step > 0, np.rint(column / step), 0)
    return np.asarray(levels.clip(-most, most) * step)

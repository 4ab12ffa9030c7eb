"""Round a matrix column by column, and let the columns that follow make up for what each one lost.

Decides codes by the second moments of the inputs alone. Knows nothing of models, or of how the moments were measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Plan
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._feed import upper_of
from steelyard.edit._layers import by_layer
from steelyard.edit._levels import Levels, plans_of
from steelyard.edit._options import check_options
from steelyard.errors import RecipeError, WeightsError, quoted

BLOCK = 64  # columns whose effect on all that follow is added up before it is applied
ENOUGH = 2e-3  # a sweep that lowers the loss by a smaller share is the last


@dataclass(frozen=True)
class Gptq(Step):
    """Round to 2^bits uniform levels so that the outputs of each layer change least: tr(D H Dᵀ) for the error D.

    `by` is evidence of the kind 'hessian': H = mean x xᵀ of the inputs of each weight. Columns are rounded one
    after the other, and the error of each is spread over those that are still to come by the inverse of H
    (optimal brain surgery); then, in `sweeps` over all columns, each code moves to the level that is best given
    all others, and scales are fitted again, as long as that helps. Without `by` all inputs count alike, and this is
    rounding to nearest with the best scales.

    Levels have a scale for each output channel, or for each `group` of consecutive inputs of a matrix whose last
    axis they are. The result is held by the affine codec. Only floating-point tensors of at least `min_ndim` axes
    take part; the others pass untouched, and so do those that are held in this way already.

    Args:
        symmetric: 2^bits - 1 levels around zero, or 2^bits between two ends.
        order: take the inputs with the largest second moments first (act-order), with scales of the weights as
            they were; else from the first to the last, with the scales of each group fitted when it begins.
        damping: what is added to the diagonal of H, as a share of its mean.
        step: the scale of a row as a multiple of the root mean square of its weights, instead of a search. With
            many bits and entropy-coded `codes`, a wide grid of coarse steps takes fewer bytes than a narrow one.
        codes, scale: how the codes, and the scales and zero points, are held: by `Bits` and plain unless said.

    Raises RecipeError for settings out of range, WeightsError if no tensor takes part and for evidence that is
    missing, of another kind or of other weights, CodecError for NaN or infinite weights.

    >>> h = Weights.of({"a": np.float32([[1, 0.9], [0.9, 1]])})
    >>> w = Weights.of({"a": np.float32([[0.45, 0.45], [1, 0]])})
    >>> np.float64(Gptq(bits=2, by=h, step=1.415)(w)["a"].array()).round(2).tolist()
    [[0.64, 0.0], [1.0, 0.0]]

    Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    ICLR 2023; the sweeps: Behdin et al., "QuantEase", 2023.
    """

    name: ClassVar[str] = "gptq"
    bits: int = 4
    symmetric: bool = True
    group: int | None = None
    by: Weights | None = None
    order: bool = True
    damping: float = 0.01
    sweeps: int = 4
    step: float | None = None
    min_ndim: int = 2
    codes: Plan = None
    scale: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        Levels(self.bits, self.symmetric, self.group)
        if not 0 < self.damping < 1e6:
            raise RecipeError(f"damping is a share of the mean of the diagonal, above 0, not {self.damping}")
        if self.sweeps < 0:
            raise RecipeError(f"the number of sweeps is 0 or more, not {self.sweeps}")
        if self.step is not None and not (0 < self.step < 1e6 and self.symmetric and self.group is None):
            raise RecipeError("step is a positive number, for symmetric levels without groups")

    def __call__(self, weights: Weights) -> Weights:
        plans = plans_of(self.codes, self.scale, self.symmetric)
        levels = Levels(self.bits, self.symmetric, self.group)
        return by_layer(weights, self.by, levels, plans, self.min_ndim, partial(self._solve, levels))

    def _solve(
        self, levels: Levels, weight: Weight, w: np.ndarray, h: np.ndarray | None, group: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `rounded`."""
        try:
            return rounded(w, np.eye(w.shape[1]) if h is None else h, levels, group, self)
        except np.linalg.LinAlgError:
            raise WeightsError(
                f"{weight.origin}: the Hessian of {quoted(weight.name)} is not positive definite even with "
                f"damping={self.damping}; measure it on more examples (score), or raise damping= in Python"
            ) from None


def rounded(
    w: np.ndarray,  # (outputs, inputs)
    h: np.ndarray,  # (inputs, inputs)
    levels: Levels,
    group: int,  # inputs that share a scale
    settings: Gptq,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (outputs, inputs), scales and zero points (outputs, groups) of one matrix.

    The factor of the Hessian is float64, all else float32. Raises LinAlgError if the damped Hessian has no Cholesky
    factor.
    """
    diagonal = np.diag(h).copy()
    mean = float(diagonal.mean())
    if mean < 0:
        raise np.linalg.LinAlgError
    h = h / (mean or 1.0)
    h[np.diag_indices(len(h))] += settings.damping
    order = np.argsort(-diagonal, kind="stable") if settings.order else np.arange(len(h))
    upper = upper_of(h[np.ix_(order, order)])
    problem = _Problem(np.ascontiguousarray(w.T, np.float32), h.astype(np.float32), levels, group)
    fixed = settings.step is not None
    scales = problem.searched() if settings.step is None else problem.scaled(settings.step)
    codes = problem.compensated(order, upper.astype(np.float32), scales, moving=not fixed and not settings.order)
    loss = problem.loss(codes, scales)
    for _ in range(settings.sweeps):
        tried = scales if fixed else problem.refitted(codes, scales)
        new = problem.swept(codes, tried)
        lower = problem.loss(new, tried)
        if not lower < loss:
            break
        done = lower > loss * (1 - ENOUGH)
        codes, scales, loss = new, tried, lower
        if done:
            break
    return codes.T, scales[0].T, scales[1].T


Scales = tuple[np.ndarray, np.ndarray]  # scale and zero point: (groups, outputs)


@dataclass(frozen=True)
class _Problem:
    """One matrix to be rounded. Inputs are the first axis here, so that what belongs to an input lies together."""

    w: np.ndarray  # (inputs, outputs)
    h: np.ndarray  # (inputs, inputs)
    levels: Levels
    group: int

    @property
    def inputs(self) -> int:
        return len(self.w)

    def searched(self) -> Scales:
        """The scales with the least squared error, weighed by the diagonal of h."""
        found = [self.fit(self.w, at) for at in range(0, self.inputs, self.group)]
        return np.stack([s for s, _ in found]), np.stack([z for _, z in found])

    def fit(self, w: np.ndarray, at: int) -> Scales:
        """Scale and zero point (outputs,) of the group that begins with the input `at`."""
        part = slice(at, at + self.group)
        scale, zero = self.levels.search(w[part].T, np.diag(self.h)[None, part], 2)
        return scale.astype(np.float32), zero.astype(np.float32)

    def scaled(self, step: float) -> Scales:
        """Scales as a multiple of the rms of all weights that an output has."""
        rms = np.sqrt(np.square(self.w).mean(axis=0, keepdims=True))
        return self.levels.stored(np.float32(step) * rms, np.zeros_like(rms))

    def values(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        scale, zero = (np.repeat(s, self.group, axis=0)[: self.inputs] if len(s) > 1 else s for s in scales)
        return np.asarray(self.levels.values(codes, scale, zero))

    def loss(self, codes: np.ndarray, scales: Scales) -> float:
        d = self.w - self.values(codes, scales)
        return float(np.einsum("io,io->", self.h @ d, d))

    def compensated(self, order: np.ndarray, upper: np.ndarray, scales: Scales, *, moving: bool) -> np.ndarray:
        """The codes by optimal brain surgery in `order`.

        upper: the Cholesky factor of the inverse of h in that order; moving: scales are fitted as their groups begin,
        and changed in place.
        """
        w, codes = self.w[order], np.zeros_like(self.w)
        for start in range(0, self.inputs, BLOCK):
            stop = min(start + BLOCK, self.inputs)
            lost = np.zeros((stop - start, w.shape[1]), np.float32)
            for j in range(start, stop):
                g = int(order[j]) // self.group
                if moving and j % self.group == 0:
                    ahead = w.copy()  # what was lost in this block has reached the inputs of the block only
                    ahead[stop:] -= upper[start:j, stop:].T @ lost[: j - start]
                    scales[0][g], scales[1][g] = self.fit(ahead, j)
                scale, zero = scales[0][g], scales[1][g]
                code = self.levels.round(w[j], scale, zero)
                lost[j - start] = (w[j] - self.levels.values(code, scale, zero)) / upper[j, j]
                w[j:stop] -= upper[j, j:stop, None] * lost[j - start]
                codes[order[j]] = code
            w[stop:] -= upper[start:stop, stop:].T @ lost
        return codes

    def refitted(self, codes: np.ndarray, scales: Scales) -> Scales:
        """Scales, group after group, with the least loss for these codes and zero points."""
        scale, zero = scales[0].copy(), scales[1]
        middle = self.levels.top // 2 if self.levels.symmetric else 0
        left = self.h @ (self.w - self.values(codes, scales))
        for g, start in enumerate(range(0, self.inputs, self.group)):
            part = slice(start, start + self.group)
            steps = codes[part] - middle
            curve = (self.h[part, part] @ steps * steps).sum(axis=0)
            best = scale[g] + (left[part] * steps).sum(axis=0) / np.where(curve > 0, curve, 1)
            best = np.where((curve > 0) & (best > 0), self.levels.stored(best, best)[0], scale[g])
            left -= self.h[:, part] @ (steps * (best - scale[g]))
            scale[g] = best
        return scale, zero

    def swept(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        """Each code in turn at the level that is best given all others."""
        codes, q = codes.copy(), self.values(codes, scales)
        left = self.h @ (self.w - q)  # (inputs, outputs): the gradient of half the loss
        for start in range(0, self.inputs, BLOCK):
            stop = min(start + BLOCK, self.inputs)
            inner, moved = self.h[start:stop, start:stop], np.zeros((stop - start, q.shape[1]), np.float32)
            for j in range(start, stop):
                scale, zero = scales[0][j // self.group], scales[1][j // self.group]
                codes[j] = self.levels.round(q[j] + left[j] / self.h[j, j], scale, zero)
                change = self.levels.values(codes[j], scale, zero) - q[j]
                moved[j - start] = change
                left[start:stop] -= inner[:, j - start, None] * change
            left[:start] -= self.h[:start, start:stop] @ moved
            left[stop:] -= self.h[stop:, start:stop] @ moved
        return codes

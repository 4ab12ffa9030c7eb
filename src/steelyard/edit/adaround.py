"""Round each weight up or down, whichever the outputs of its layer like better: learned by gradient descent.

Decides between the two nearest levels by the second moments of the inputs alone. Knows nothing of models, or of how the
moments were measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Plan
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._layers import by_layer
from steelyard.edit._levels import Levels, plans_of
from steelyard.edit._options import check_options
from steelyard.errors import RecipeError, WeightsError, quoted

LOW, HIGH = -0.1, 1.1  # between which the sigmoid is stretched, so that it reaches 0 and 1
SHARP, BLUNT = 20.0, 2.0  # exponents of the push towards 0 and 1: from first to last
FREE = 0.2  # share of the rounds before the push begins
MOMENTA = 0.9, 0.999  # of Adam, and what keeps its quotient finite
FAINT = 1e-8
SWEEPS = 20  # over all weights, each of which may go the other way, at most


@dataclass(frozen=True)
class AdaRound(Step):
    """Round to 2^bits uniform levels, up or down as learned: the least tr(D H Dᵀ) for the error D of each layer.

    `by` is evidence of the kind 'hessian': H = mean x xᵀ of the inputs of each weight, which is all that the mean
    squared change of a layer's outputs depends on, so that no inputs are kept. Each weight w = (k + f) steps, k whole,
    becomes k + h(v) steps, h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1), from h = f on. Adam minimises the change of the
    outputs, counted in steps, plus ``push`` times sum 1 - |2 h - 1|^b, where b falls from 20 to 2: at the end h is 0 or
    1. Then single weights go the other way as long as that helps, which the source leaves out. A row (an output) for
    which rounding to nearest changes less is rounded to nearest. Without `by` that is all.

    Levels have the scale with the least squared error, weighed by the inputs, for each output channel, or for each
    `group` of consecutive inputs of a matrix whose last axis they are. The affine codec holds the result. Only
    floating-point tensors of at least `min_ndim` axes take part; the others pass untouched, and so do those that are
    held in this way already.

    A round takes outputs x inputs² multiplications: matrices with thousands of inputs take minutes, where `Gptq` takes
    the time of a few rounds.

    Args:
        symmetric: 2^bits - 1 levels around zero, or 2^bits between two ends.
        rounds: steps of Adam.
        rate: its learning rate.
        push: what being undecided costs, in squared steps of a mean input.
        codes, scale: how the codes, and the scales and zero points, are held: by `Bits` and plain unless said.

    Raises RecipeError for settings out of range, WeightsError if no tensor takes part and for evidence that is
    missing, of another kind or of other weights, CodecError for NaN or infinite weights.

    >>> h = Weights.of({"a": np.float32([[1, 0.9], [0.9, 1]])})
    >>> w = Weights.of({"a": np.float32([[0.4, 0.4], [3, 0]])})  # both inputs are nearly the same: one goes up
    >>> AdaRound(bits=3, by=h)(w)["a"].array()[1].tolist()
    [3.0, 0.0]

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.
    """

    name: ClassVar[str] = "adaround"
    bits: int = 4
    symmetric: bool = True
    group: int | None = None
    by: Weights | None = None
    rounds: int = 500
    rate: float = 0.05
    push: float = 1.0
    min_ndim: int = 2
    codes: Plan = None
    scale: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        Levels(self.bits, self.symmetric, self.group)
        if self.rounds < 1:
            raise RecipeError(f"the number of rounds is at least 1, not {self.rounds}")
        if not 0 < self.rate < 10:
            raise RecipeError(f"the rate is above 0 and below 10, not {self.rate}")
        if not 0 <= self.push < 1e6:
            raise RecipeError(f"the push towards 0 and 1 is at least 0, not {self.push}")

    def __call__(self, weights: Weights) -> Weights:
        plans = plans_of(self.codes, self.scale, self.symmetric)
        levels = Levels(self.bits, self.symmetric, self.group)
        return by_layer(weights, self.by, levels, plans, self.min_ndim, partial(self._solve, levels))

    def _solve(
        self, levels: Levels, weight: Weight, w: np.ndarray, h: np.ndarray | None, group: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes (outputs, inputs), scales and zero points (outputs, groups) of one matrix."""
        inputs = w.shape[1]
        moments = np.ones(inputs) if h is None else np.diag(h)
        if moments.min() < 0:
            raise WeightsError(f"{weight.origin}: the Hessian of {quoted(weight.name)} is not positive definite")
        parts = [slice(at, at + group) for at in range(0, inputs, group)]
        mass = moments + 1e-12 * (float(moments.mean()) or 1.0)
        found = [levels.search(w[:, part], mass[None, part], 2) for part in parts]
        scale, zero = (np.stack([f[i] for f in found], axis=1) for i in (0, 1))
        wide, start = (np.repeat(s, group, axis=1)[:, :inputs] for s in (scale, zero))
        codes = levels.round(w, wide, start)
        if h is None or not moments.any():
            return codes, scale, zero
        learned = self._learned(w, h, wide, start, codes, levels)
        learned = _flipped(w, h, wide, start, learned, levels)
        before, after = (_losses(w - levels.values(c, wide, start), h) for c in (codes, learned))
        return np.where((after < before)[:, None], learned, codes), scale, zero

    def _learned(
        self, w: np.ndarray, h: np.ndarray, scale: np.ndarray, zero: np.ndarray, codes: np.ndarray, levels: Levels
    ) -> np.ndarray:
        """The codes that gradient descent finds; all (outputs, inputs) but `h`."""
        middle = levels.top // 2 if levels.symmetric else 0
        steps = (w - zero) / np.where(scale > 0, scale, 1) + middle
        low = np.floor(steps)
        free = (low >= 0) & (low < levels.top) & (scale > 0)
        unit = np.sqrt(np.square(scale).mean(axis=1, keepdims=True))
        size = (scale / np.where(unit > 0, unit, 1)).astype(np.float32)  # of a step, about 1
        curve = (h / np.diag(h).mean()).astype(np.float32)
        part = (steps - low).astype(np.float32)
        fixed = np.where(free, 0, (codes - steps) * size).astype(np.float32)  # errors of those beyond the last level
        v = np.log((part - LOW) / (HIGH - part))
        mean, square = np.zeros_like(v), np.zeros_like(v)
        for turn in range(self.rounds):
            sigmoid = 1 / (1 + np.exp(-v))
            up = np.clip(LOW + (HIGH - LOW) * sigmoid, 0, 1)
            slope = 2 * size * (np.where(free, (up - part) * size, fixed) @ curve) + self._pushed(up, turn)
            slope *= np.where((up > 0) & (up < 1) & free, (HIGH - LOW) * sigmoid * (1 - sigmoid), 0)
            mean += (1 - MOMENTA[0]) * (slope - mean)
            square += (1 - MOMENTA[1]) * (np.square(slope) - square)
            rate = self.rate * np.sqrt(1 - MOMENTA[1] ** (turn + 1)) / (1 - MOMENTA[0] ** (turn + 1))
            v -= np.float32(rate) * mean / (np.sqrt(square) + FAINT)
        return np.where(free, low + (v > 0), codes)

    def _pushed(self, up: np.ndarray, turn: int) -> np.ndarray | float:
        """The gradient of the push towards 0 and 1."""
        done = (turn / self.rounds - FREE) / (1 - FREE)
        if done < 0:
            return 0.0
        power = BLUNT + (SHARP - BLUNT) * (1 - done)
        far = 2 * up - 1
        return np.asarray(-2 * self.push * power * np.sign(far) * np.abs(far) ** (power - 1))


def _flipped(
    w: np.ndarray, h: np.ndarray, scale: np.ndarray, zero: np.ndarray, codes: np.ndarray, levels: Levels
) -> np.ndarray:
    """`codes` after weights, one after the other, went to the other of their two levels where that changes less."""
    codes, near = codes.copy(), levels.values(codes, scale, zero)
    low = np.where(near > w, codes - 1, codes)
    low, high = np.clip(low, 0, levels.top), np.clip(low + 1, 0, levels.top)  # the same beyond the last level
    below, above = levels.values(low, scale, zero), levels.values(high, scale, zero)
    slope = (w - near) @ h
    for _ in range(SWEEPS):
        before = codes.copy()
        for j in np.flatnonzero(np.diag(h) > 0):
            wanted = near[:, j] + slope[:, j] / h[j, j]
            up = np.abs(above[:, j] - wanted) < np.abs(below[:, j] - wanted)
            value = np.where(up, above[:, j], below[:, j])
            codes[:, j] = np.where(up, high[:, j], low[:, j])
            slope -= np.outer(value - near[:, j], h[j])
            near[:, j] = value
        if (codes == before).all():
            break
    return codes


def _losses(d: np.ndarray, h: np.ndarray) -> np.ndarray:
    """d_i H d_iᵀ of each row."""
    return np.asarray(np.einsum("oi,oi->o", d @ h, d))

"""Scale up the input channels that matter before rounding, and down again after it.

Decides the scales by the second moments of the inputs. Knows nothing of what comes before a layer: the scales stay with
the weight, in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.codecs.scaled import Scaled
from steelyard.core.packed import Packed, Plan, Scheme, pack
from steelyard.core.spec import Spec
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import Levels, finite, plans_of, short
from steelyard.edit._options import check_options
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.edit.prune import scoped
from steelyard.edit.quantize import held_so
from steelyard.errors import RecipeError, WeightsError, quoted

TRIED = 20  # exponents between 0 and 1
ROWS = 256  # outputs, spread over all, on which exponents are tried


@dataclass(frozen=True)
class Awq(Step):
    """Round W diag(s) to 2^bits uniform levels, with s_j = (rms of input j)^a, and hold it beside 1 / s.

    The exponent a is the one of 21 between 0 and 1 by which the outputs of the layer change least: tr(D H Dᵀ) for the
    error D, with H from evidence `by` of the kind 'hessian'. Then each scale of the levels is chosen for the least
    squared error, weighed by the inputs. The published method folds 1 / s into the operation before the layer; here
    it stays in the file (the codec `scaled`, around the affine one), so that no other tensor changes and every
    architecture will do. Without `by` all inputs count alike, and s is 1.

    An input that was zero in all examples, or nearly, is not believed to stay so: `damping`, a share of the mean of
    the diagonal of H, is added to the whole diagonal, as in GPTQ. Without that, the weights of such an input would be
    rounded to steps that are thousands of times as wide as the others', and ruin the first output that sees it.

    Only floating-point matrices (two axes) take part, whose inputs are the last axis; the others pass untouched,
    convolutions among them (`Gptq` and `AdaRound` round those), and so do those that are held in this way already.

    Raises RecipeError for settings out of range, WeightsError if no tensor takes part and for evidence that is
    missing, of another kind or of other weights, CodecError for NaN or infinite weights.

    >>> h = Weights.of({"a": np.float32([[100, 0], [0, 0.01]])})
    >>> w = Weights.of({"a": np.float32([[0.3, 1]])})
    >>> round(float(Awq(bits=2, group=None, by=h)(w)["a"].array()[0, 0]), 2)
    0.3

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024.
    """

    name: ClassVar[str] = "awq"
    bits: int = 4
    symmetric: bool = False
    group: int | None = 128
    by: Weights | None = None
    damping: float = 0.01
    codes: Plan = None
    scale: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        Levels(self.bits, self.symmetric, self.group)
        if not 0 < self.damping < 1e6:
            raise RecipeError(f"damping is a share of the mean of the diagonal, above 0, not {self.damping}")

    def __call__(self, weights: Weights) -> Weights:
        plans = plans_of(self.codes, self.scale, self.symmetric)
        about = About() if self.by is None else About.of(self.by)
        levels = Levels(self.bits, self.symmetric, self.group)

        def means(item: Weight) -> bool:
            return len(item.spec.shape) == 2 and item.name not in about.first

        chosen = {item.name for item in scoped(weights, 2, "rounded by awq", means, "2 axes, the inputs last")}

        def one(item: Weight) -> Weight:
            if item.name not in chosen or held_so(item, Scaled()):
                return item
            inner = Scheme(levels.codec(Rows(item.spec.shape)), plans)
            return item.then(partial(self._round, item, levels, plans), scheme=Scheme(Scaled(), {"values": inner}))

        return weights.with_items(one(item) for item in weights.values())

    def _round(self, weight: Weight, levels: Levels, plans: dict[str, Plan], x: np.ndarray) -> Packed | np.ndarray:
        rows, h = (Rows(weight.spec.shape), None) if self.by is None else hessian_of(self.by, weight)
        if self.by is not None:
            check_same(About.of(self.by), weight, x)
        if not finite(weight, x).size:
            return pack(x, Scheme(Scaled(), {"values": Scheme(levels.codec(rows), plans)}))
        w, group = rows.matrix(x), levels.grouped(rows)
        factor = np.ones(w.shape[1], np.float32)
        moments = np.ones(w.shape[1])
        if h is not None and h.any():
            mean = h.mean(axis=0)  # the same inputs, of whichever outputs
            if mean.diagonal().min() < 0:
                raise WeightsError(f"{weight.origin}: the Hessian of {quoted(weight.name)} is not positive definite")
            mean[np.diag_indices(len(mean))] += self.damping * mean.diagonal().mean()
            factor, moments = _best(w, mean, levels, group), mean.diagonal()
        wide = factor.astype(np.float64)
        scaled = w / wide
        starts = range(0, w.shape[1], group)
        mass = moments * wide * wide
        found = [levels.search(scaled[:, a : a + group], mass[None, a : a + group], 2) for a in starts]
        scale, zero = (np.stack([f[i] for f in found], axis=1) for i in (0, 1))
        codes = levels.round(scaled, _wide(scale, group, w.shape[1]), _wide(zero, group, w.shape[1]))
        values = levels.packed(rows, Spec(weight.spec.shape, weight.spec.dtype), codes, scale, zero, plans)
        return Packed(weight.spec, Scaled(), {"values": values, "factor": factor})


def _best(w: np.ndarray, h: np.ndarray, levels: Levels, group: int) -> np.ndarray:
    """1 / s for the exponent that changes the outputs least, float32 with a few significant bits; h: damped."""
    norms = np.sqrt(np.diag(h))
    best, kept = np.inf, np.ones(len(h), np.float32)
    w = w[:: max(1, len(w) // ROWS)]
    for exponent in np.linspace(0, 1, TRIED + 1):
        s = norms**exponent
        factor = short((np.sqrt(s.max() * s.min()) / s).astype(np.float32), 8)
        wide = factor.astype(np.float64)
        d = w - _nearest(w / wide, levels, group) * wide
        loss = float(np.einsum("oi,oi->", d @ h, d))
        if loss < best:
            best, kept = loss, factor
    return kept


def _nearest(w: np.ndarray, levels: Levels, group: int) -> np.ndarray:
    """Rounded to levels that span each group."""
    out = np.empty_like(w)
    for at in range(0, w.shape[1], group):
        part = w[:, at : at + group]
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        zero = np.zeros_like(low) if levels.symmetric else low
        scale = np.maximum(-low, high) / (levels.top // 2) if levels.symmetric else (high - low) / levels.top
        out[:, at : at + group] = levels.values(levels.round(part, scale, zero), scale, zero)
    return out


def _wide(scale: np.ndarray, group: int, inputs: int) -> np.ndarray:
    return np.repeat(scale, group, axis=1)[:, :inputs]

"""Round to uniform levels whose zero points make the error sparse: half-quadratic, without data.

Decides zero points by the weights alone. Knows nothing of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Packed, Plan, Scheme, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import Levels, finite, plans_of, short
from steelyard.edit._options import check_options
from steelyard.edit.evidence import Rows
from steelyard.edit.prune import scoped
from steelyard.edit.quantize import held_so
from steelyard.errors import RecipeError


@dataclass(frozen=True)
class Hqq(Step):
    """Round to 2^bits levels; zero points minimise sum |w - q(w)|^power, power < 1, so that few errors are large.

    The problem is split in two, solved in turn: a shrinkage of the error to what is large in it, and zero points as
    means of what then is left. Scales span each group. No data is needed, and seconds are enough for a large model.

    Levels have a scale and a zero point for each `group` of consecutive inputs of a matrix (None: of each row), or for
    each output channel of other tensors; the affine codec holds them. Only floating-point tensors of at least
    `min_ndim` axes take part; the others pass untouched, and so do those that are held in this way already.

    Raises RecipeError for settings out of range, WeightsError if no tensor takes part, CodecError for NaN or infinite
    weights.

    >>> w = Weights.of({"a": np.float32([[0, 0.1, 1, 1.1, 2, 2.1, 3, 4]])})
    >>> np.float64(Hqq(bits=2)(w)["a"].array()).round(1).tolist()
    [[0.0, 0.0, 1.3, 1.3, 1.3, 2.7, 2.7, 4.0]]

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
    (mobiusml.github.io/hqq_blog), whose settings these are: power 0.7, beta 10 growing by 1 % in 20 rounds.
    """

    name: ClassVar[str] = "hqq"
    bits: int = 4
    group: int | None = 64
    power: float = 0.7
    rounds: int = 20
    min_ndim: int = 2
    codes: Plan = None
    scale: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        Levels(self.bits, symmetric=False, group=self.group)
        if not 0 < self.power <= 1:
            raise RecipeError(f"the power is above 0 and at most 1, not {self.power}")
        if self.rounds < 0:
            raise RecipeError(f"the number of rounds is 0 or more, not {self.rounds}")

    def __call__(self, weights: Weights) -> Weights:
        plans = plans_of(self.codes, self.scale, symmetric=False)
        levels = Levels(self.bits, symmetric=False, group=self.group)
        chosen = {item.name for item in scoped(weights, self.min_ndim, "rounded")}

        def one(item: Weight) -> Weight:
            codec = levels.codec(Rows(item.spec.shape))
            if item.name not in chosen or held_so(item, codec):
                return item
            return item.then(partial(self._round, item, levels, plans), scheme=Scheme(codec, plans))

        return weights.with_items(one(item) for item in weights.values())

    def _round(self, weight: Weight, levels: Levels, plans: dict[str, Plan], x: np.ndarray) -> Packed | np.ndarray:
        rows = Rows(weight.spec.shape)
        if not finite(weight, x).size:
            return pack(x, Scheme(levels.codec(rows), plans))
        w, group = rows.matrix(x), levels.grouped(rows)
        found = [self._group(w[:, at : at + group], levels) for at in range(0, w.shape[1], group)]
        codes = np.concatenate([c for c, _, _ in found], axis=1)
        scale, zero = (np.stack([f[i] for f in found], axis=1) for i in (1, 2))
        return levels.packed(rows, weight.spec, codes, scale, zero, plans)

    def _group(self, w: np.ndarray, levels: Levels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes (rows, members), scale and zero point (rows,) of one group of each row."""
        low, high = w.min(axis=1), w.max(axis=1)
        scale, zero = levels.stored((high - low) / levels.top, low)
        step = np.where(scale > 0, scale, 1)[:, None]
        w = w / step  # in steps, as the settings of the source are meant
        start = zero / step[:, 0]
        best, kept, beta = np.full(len(w), np.inf), start, 10.0
        for _ in range(self.rounds + 1):
            codes = np.clip(np.rint(w - start[:, None]), 0, levels.top)
            error = w - start[:, None] - codes
            loss = (np.abs(error) ** self.power).sum(axis=1)
            kept = np.where(loss < best, start, kept)
            best = np.minimum(loss, best)
            size = np.abs(error)
            shrunk = np.maximum(size - np.where(size > 0, size, 1) ** (self.power - 1) / beta, 0) * np.sign(error)
            start = (w - codes - shrunk).mean(axis=1)
            beta *= 1.01
        zero = short(kept * step[:, 0], 8 + levels.bits // 2)
        codes = np.clip(np.rint(w - (zero / step[:, 0])[:, None]), 0, levels.top)
        return codes, scale, zero

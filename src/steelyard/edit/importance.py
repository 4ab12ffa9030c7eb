"""How important each weight is: its magnitude, scores that somebody made, or what evidence says of it.

Decides how each kind of evidence becomes a score. Knows nothing of how many weights go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import finite
from steelyard.edit.evidence import About, Rows, check_same, evidence_of
from steelyard.errors import WeightsError, quoted

KINDS = ("norms", "fisher", "taylor")  # of evidence (`learn.evidence.score`) that ranks single weights


@dataclass(frozen=True)
class Importance:
    """What ranks the elements of one weight."""

    weight: Weight
    by: Weight | None  # None: the magnitude
    about: About

    @property
    def rows(self) -> Rows:
        """Which axis the inputs are."""
        return Rows(self.weight.spec.shape, self.weight.name in self.about.first)

    @property
    def wide(self) -> bool:
        """Whether it takes float64 to tell scores apart as finely as they are given."""
        made = self.by is not None and self.about.kind in (None, "taylor")
        dtype = (self.by if made and self.by is not None else self.weight).spec.dtype
        return dtype.kind != "float" or dtype.bits > 32

    def of(self, x: np.ndarray | None = None) -> np.ndarray:
        """The scores, in the shape of the weight; `x`: its values, if they were read already.

        Raises WeightsError for scores that are NaN, for weights that are not finite, and for evidence that was
        measured on other weights.
        """
        kind = self.about.kind
        if x is not None:
            finite(self.weight, x, WeightsError)
        if self.by is not None and kind is None:
            return self._ranked(self.by.array())
        values = finite(self.weight, self.weight.array(), WeightsError) if x is None else x
        if self.by is None:
            return np.abs(values)
        check_same(self.about, self.weight, values)
        found = self._ranked(self.by.array())
        size = np.abs(values.astype(found.dtype if self.wide else np.float32))
        with np.errstate(over="ignore"):
            if kind == "norms":
                return np.asarray(size * found)
            return np.asarray(size * size * found) if kind == "fisher" else found

    def _ranked(self, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind not in "iub" and np.isnan(x).any():
            raise WeightsError(f"{self.weight.origin}: the scores of {quoted(self.weight.name)} have NaN: no rank")
        return x


def importance(by: Weights | None, weight: Weight) -> Importance:
    """What ranks `weight`: None its magnitude |w|; evidence of the kinds norms |w| sqrt(mean x^2) (Wanda; Sun et al.
    2023), fisher w^2 F (the saliency of optimal brain damage with the Fisher information as the Hessian; LeCun et al.
    1990, Theis et al. 2018) and taylor; any other Weights are the scores themselves.

    Raises WeightsError if `by` has no tensor for it, one of another shape, or evidence of another kind.
    """
    if by is None:
        return Importance(weight, None, About())
    about = About.of(by)
    if about.kind is None:
        return Importance(weight, scores_of(by, weight), about)
    found = evidence_of(by, weight, KINDS)
    shape = weight.spec.shape
    same = len(found.spec.shape) == len(shape) and all(
        a == b or (a == 1 and about.kind == "norms") for a, b in zip(found.spec.shape, shape, strict=True)
    )
    if not same:
        raise WeightsError(
            f"{found.origin}: the evidence ({about.kind}) of {quoted(weight.name)} is {found.spec}, "
            f"its weights {weight.spec}; measure it on these (score)"
        )
    return Importance(weight, found, about)


def scores_of(by: Weights | None, weight: Weight) -> Weight | None:
    """The scores of `weight` in `by`; raises WeightsError if there are none or their shape is another."""
    if by is None:
        return None
    found = by.get(weight.name)
    if found is None:
        raise WeightsError(
            f"the scores have no tensor {quoted(weight.name)}; "
            "give one for every weight in scope, or choose fewer weights (where, or --where)"
        )
    if found.spec.shape != weight.spec.shape:
        raise WeightsError(
            f"{found.origin}: the scores of {quoted(weight.name)} are {found.spec}, its weights {weight.spec}; "
            "give one for each of them"
        )
    return found

"""Errors of a matrix that cost tr(A D B Dᵀ): steps for rows and columns, and rounding that makes up for what it lost.

Decides the levels for a step that all matrices share. Knows nothing of how the two factors were measured
(`learn.kronecker`), nor of how many bits there are (`edit.ratedistortion`).

Sources: rounding with the inverse Hessian: Frantar et al., "GPTQ", ICLR 2023, the same as the nearest-plane algorithm
of Babai, "On Lovász' lattice reduction and the nearest lattice point problem", 1986; a trellis within: A. Tseng et al.,
"QTIP", NeurIPS 2024; both sides: A. Tseng et al., "Model-Preserving Adaptive Rounding", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steelyard.codecs._grades import Grades
from steelyard.codecs._rowwise import Rowwise
from steelyard.codecs.trellis import Trellis, stored
from steelyard.core.weights import Weight, Weights
from steelyard.edit._feed import feed, gathered, upper_of
from steelyard.edit.evidence import About
from steelyard.errors import WeightsError, quoted

KIND = "kronecker"  # of evidence
OUTPUTS, INPUTS = "|outputs", "|inputs"  # after the name of a weight
DAMPING = 0.03  # added to the diagonal of a factor, as a share of its mean
PAIRED = 0.1  # squared steps that a bit is worth without a trellis: see `Trellis`


def is_kronecker(by: Weights | None) -> bool:
    return by is not None and About.of(by).kind == KIND


@dataclass(frozen=True)
class Kronecker:
    """What errors of one matrix (outputs, inputs) cost."""

    outputs: np.ndarray  # A: (outputs, outputs), or its diagonal
    inputs: np.ndarray  # B: (inputs, inputs), or its diagonal

    @staticmethod
    def of(by: Weights, weight: Weight) -> Kronecker:
        """Raises WeightsError if a factor is missing, has another shape or is no matrix of moments."""
        rows = weight.spec.shape[0] if weight.spec.shape else 1
        found = []
        for part, size in ((OUTPUTS, rows), (INPUTS, weight.spec.size // max(rows, 1))):
            factor = by.get(weight.name + part)
            if factor is None or factor.spec.shape not in ((size,), (size, size)):
                told = "has none" if factor is None else f"has {factor.spec}"
                raise WeightsError(f"the evidence for {quoted(weight.name)} {weight.spec} {told} for its {part[1:]}; "
                                   "measure it on these weights (sy.kronecker)")  # fmt: skip
            values = factor.array().astype(np.float64)
            diagonal = values.diagonal() if values.ndim > 1 else values
            if not np.isfinite(values).all() or (diagonal < 0).any():
                raise WeightsError(f"the evidence for {quoted(weight.name)} is not finite, or negative")
            found.append(values)
        return Kronecker(*found)

    @staticmethod
    def paired(by: Weights, weight: Weight) -> bool:
        """Whether pairs of outputs are known; reads nothing."""
        factor = by.get(weight.name + OUTPUTS)
        return factor is not None and len(factor.spec.shape) > 1

    @property
    def single(self) -> np.ndarray:
        """What a squared error of each single element costs: (outputs, inputs)."""
        rows, columns = (x.diagonal() if x.ndim > 1 else x for x in (self.outputs, self.inputs))
        return np.outer(rows, columns)

    def cost(self, error: np.ndarray) -> float:
        """tr(A D B Dᵀ) of an error in the shape of the weight."""
        d = error.astype(np.float64).reshape(len(self.outputs), -1)
        left = self.outputs @ d if self.outputs.ndim > 1 else self.outputs[:, None] * d
        right = d @ self.inputs if self.inputs.ndim > 1 else d * self.inputs
        return float(np.vdot(left, right))

    @property
    def counts(self) -> bool:
        """Whether any error costs anything."""
        return bool(self.outputs.any() and self.inputs.any())

    @cached_property
    def uppers(self) -> tuple[np.ndarray, np.ndarray]:
        """For outputs and inputs the upper triangular factor of the inverse, or the root of its diagonal."""
        return _upper(self.outputs), _upper(self.inputs)

    @cached_property
    def grades(self) -> Grades:
        """Steps of rows and columns: so much error in one element costs the same everywhere."""
        rows, columns = (x.diagonal() if x.ndim > 1 else x for x in self.uppers)
        return Grades.nearest(rows, columns)

    @property
    def noise(self) -> tuple[np.ndarray, np.ndarray]:
        """By what the errors before it multiply the variance of an element's own error: for rows times for columns."""
        rows, columns = (1 + gathered(x) if x.ndim > 1 else np.ones(len(x)) for x in self.uppers)
        return rows, columns

    def held(self, x: np.ndarray, step: float, codec: Trellis) -> dict[str, np.ndarray]:
        """Parts of the codec for a tensor; step: in units of the grades. Raises CodecError where it is too small."""
        rows, columns = self.grades.factors
        own, upper = self.uppers
        w = np.ascontiguousarray(x.reshape(len(rows), -1).T, np.float64)  # (inputs, outputs)
        w /= rows
        if upper.ndim == 1:
            upper = np.diag(upper)
        mix = None if own.ndim == 1 else np.ascontiguousarray(own / own.diagonal()[:, None] * rows[:, None] / rows)
        step = stored(step)
        chosen = Rowwise(codec, w / (step * columns[:, None]), mix)
        feed(w, upper, step * columns, chosen.take)
        return chosen.parts(step, self.grades)


def _upper(factor: np.ndarray) -> np.ndarray:
    if factor.ndim == 1:
        return np.asarray((factor + DAMPING * factor.mean()) ** -0.5)
    damped = factor + DAMPING * factor.diagonal().mean() * np.eye(len(factor))
    return upper_of(damped)

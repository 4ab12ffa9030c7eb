"""Errors of a matrix that cost tr(A D B Dᵀ): steps for rows and columns, and rounding that makes up for what it lost.

Decides what evidence says of pairs, and the levels for a step that all matrices share. Knows nothing of how evidence
was measured (`learn.kronecker`, `learn.evidence`), nor of how many bits there are (`edit.ratedistortion`).

Sources: rounding with the inverse Hessian: Frantar et al., "GPTQ", ICLR 2023, the same as the nearest-plane algorithm
of Babai, "On Lovász' lattice reduction and the nearest lattice point problem", 1986; steps in proportion to its factor:
Lifar, Savkin, Ordentlich and Polyanskiy, "WaterSIC: information-theoretically (near) optimal linear layer
quantization", 2026 (arXiv 2603.04956); a trellis within: A. Tseng et al., "QTIP", NeurIPS 2024; both sides: A. Tseng et
al., "Model-Preserving Adaptive Rounding", 2025; importances of rows beside a Hessian as in K-FAC: Martens and Grosse,
2015.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from steelyard.codecs.trellis import Trellis
from steelyard.core.weights import Weight, Weights
from steelyard.edit._apart import Apart
from steelyard.edit._components import Components, separable
from steelyard.edit._feed import upper_of
from steelyard.edit.evidence import About, check_same, evidence_of, hessian_of
from steelyard.errors import WeightsError, quoted

KIND = "kronecker"  # of evidence
PAIRS = (KIND, "hessian")  # kinds that know what errors of pairs cost
OUTPUTS, INPUTS = "|outputs", "|inputs"  # after the name of a weight
DAMPING = {KIND: 0.03, "hessian": 0.01}  # added to the diagonal of a factor, as a share of its mean
LEAST = 0.1  # of the mean importance of outputs, which each has besides its own
SINGLE = 0.1  # squared steps that a bit is worth without a trellis: see `Trellis`


@dataclass(frozen=True)
class Kronecker:
    """What errors of one matrix (outputs, inputs) cost."""

    outputs: np.ndarray  # A: (outputs, outputs), or its diagonal
    inputs: np.ndarray  # B: (inputs, inputs), or its diagonal
    damping: float = DAMPING[KIND]

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
    def by(by: Weights, fisher: Weights | None, weight: Weight, x: np.ndarray) -> Kronecker:
        """By evidence of either kind, for a weight of values `x`; raises WeightsError for what is no evidence of it."""
        check_same(About.of(by), weight, x)
        return Kronecker.of(by, weight) if About.of(by).kind == KIND else Kronecker.of_inputs(by, fisher, weight, x)

    @staticmethod
    def of_inputs(by: Weights, fisher: Weights | None, weight: Weight, x: np.ndarray) -> Kronecker:
        """By second moments of the inputs, and what each output matters: mean_j F_ij / mean_j B_jj, or all the same.

        Raises WeightsError for evidence that is missing, does not fit, or was measured on other values than `x`.
        """
        rows, moments = hessian_of(by, weight)
        inputs = moments.mean(axis=0)  # the same inputs, of whichever outputs
        outputs = np.ones(weight.spec.size // max(rows.inputs, 1))
        if fisher is not None:
            mean = rows.matrix(sensitive(fisher, weight, x)).mean(axis=1) / (inputs.diagonal().mean() or 1.0)
            outputs = mean + LEAST * mean.mean()
        return Kronecker(*((inputs, outputs) if rows.first else (outputs, inputs)), DAMPING["hessian"])

    @property
    def single(self) -> np.ndarray:
        """What a squared error of each single element costs: (outputs, inputs)."""
        rows, columns = (x.diagonal() if x.ndim > 1 else x for x in (self.outputs, self.inputs))
        return np.outer(rows, columns)

    def cost(self, error: np.ndarray) -> float:
        """tr(A D B Dᵀ) of an error in the shape of the weight."""
        d = error.astype(np.float64).reshape(len(self.outputs), -1)
        left = self.outputs @ d if self.outputs.ndim > 1 else self.outputs[:, None] * d
        if self.inputs.ndim > 1:
            return float(np.vdot(d.T @ left, self.inputs))
        return float((np.einsum("oi,oi->i", d, left) * self.inputs).sum())

    @property
    def counts(self) -> bool:
        """Whether any error costs anything."""
        return bool(self.outputs.any() and self.inputs.any())

    def apart(self, x: np.ndarray, *, turn: bool) -> Apart:
        """What rounding a tensor of values `x` asks for; turn: in components, where pairs of inputs alone are known.

        Raises LinAlgError for what is no matrix of moments.
        """
        uppers = self._upper(self.outputs), self._upper(self.inputs)
        if not turn:
            return Apart.of(uppers)
        damped = self.inputs + self.damping * self.inputs.diagonal().mean() * np.eye(len(self.inputs))
        return Apart.of(uppers, Components.of(x.reshape(len(x), -1), uppers[0], damped))

    def _upper(self, factor: np.ndarray) -> np.ndarray:
        """The upper triangular factor of the inverse, or the root of its diagonal."""
        if factor.ndim == 1:
            return np.asarray((factor + self.damping * factor.mean()) ** -0.5)
        return upper_of(factor + self.damping * factor.diagonal().mean() * np.eye(len(factor)))


def routed(by: Weights, weight: Weight, codec: Trellis) -> Trellis | None:
    """The codec as rounding by pairs goes through a weight; None if `by` knows no pairs of it. Reads nothing.

    Lines of which pairs are known follow one another, and a trellis goes along each; where pairs are known within lines
    too, those are the shorter ones: what is made up for there takes time with the square of their length. A tall matrix
    is held in components (`turn`).
    """
    about = About.of(by)
    codec = Trellis(states=1, lagrangian=SINGLE) if codec.states == 1 else codec
    if len(weight.spec.shape) < 2:
        return None
    if about.kind == KIND:
        sides = (by.get(weight.name + part) for part in (OUTPUTS, INPUTS))
        rows, columns = (factor is not None and len(factor.spec.shape) > 1 for factor in sides)
        if rows and columns:
            return replace(codec, turn=False, down=weight.spec.shape[0] ** 2 <= weight.spec.size)
        turn = columns and separable(weight)
        return replace(codec, turn=turn, down=not rows and not turn)
    first = weight.name in about.first
    if about.kind != "hessian" or weight.name not in by or (first and len(weight.spec.shape) > 2):
        return None
    turn = not first and separable(weight)
    return replace(codec, turn=turn, down=not first and not turn)


def sensitivities(fisher: Weights, weight: Weight) -> Weight:
    """What an error of each element costs; raises WeightsError if it is missing, or of another kind or shape."""
    found = evidence_of(fisher, weight, ("fisher",))
    if found.spec.shape != weight.spec.shape:
        raise WeightsError(f"{found.origin}: the importances of {quoted(weight.name)} are {found.spec}, "
                           f"its weights {weight.spec}; measure them on these (score)")  # fmt: skip
    return found


def sensitive(fisher: Weights, weight: Weight, x: np.ndarray) -> np.ndarray:
    """The values of `sensitivities`, float64, of a weight of values `x`; raises WeightsError for negative ones."""
    check_same(About.of(fisher), weight, x)
    found = sensitivities(fisher, weight)
    values = found.array().astype(np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise WeightsError(f"{found.origin}: the importances of {quoted(weight.name)} must be finite and >= 0")
    return values

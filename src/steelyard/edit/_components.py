"""The rows of a tall matrix in components of which each error costs alike, whichever others there are.

Decides which matrices are told so, and in which components: by what errors cost and how the rows vary. A transform that
takes apart both at once (principal components of the rows, whitened by the loss) needs no feedback, and spends nothing
on components that are small in every row: see V. K. Goyal, "Theoretical foundations of transform coding", 2001.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steelyard.codecs._basis import may_turn, principal
from steelyard.codecs._grades import Grades
from steelyard.codecs.trellis import Trellis, streams_of
from steelyard.core.weights import Weight

TALL = 48  # rows for each column: the basis then takes at most some 0.08 bits a weight
CONDITION = 64  # an error in any direction counts at least such a part of that in the costliest one


def separable(weight: Weight) -> bool:
    """Whether a weight is tall enough for a basis of its own."""
    rows = weight.spec.shape[0] if weight.spec.shape else 0
    columns = weight.spec.size // max(rows, 1)
    return may_turn(rows, columns) and rows >= TALL * columns


@dataclass(frozen=True)
class Components:
    """x = down * (z @ components) * across, with grades down and across; an error of 1 in any z costs 1."""

    components: np.ndarray  # (components, columns)
    grades: Grades
    analysis: np.ndarray  # (columns, components): z = x / down @ analysis

    @staticmethod
    def of(x: np.ndarray, rows: np.ndarray, costs: np.ndarray) -> Components:
        """For a matrix x, factors of its rows in which their errors cost alike, and what pairs of columns cost."""
        values, vectors = np.linalg.eigh(costs)
        root = np.sqrt(np.maximum(values, values[-1] / CONDITION))
        white = vectors * root @ vectors.T
        turn = principal(x.astype(np.float64) @ white)  # (components, columns)
        found = turn @ (vectors / root @ vectors.T)
        grades = Grades.nearest(rows, np.linalg.norm(found, axis=0))
        return Components(found / grades.factors[1], grades, white @ turn.T)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return sum(x.nbytes for x in (self.components, self.analysis, self.grades.rows, self.grades.columns))

    @property
    def told(self) -> int:
        """The bytes that the grades and the basis take."""
        return sum(map(len, streams_of(self.grades))) + len(Trellis().basis(self.components, True)[0])

    def some(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Components of some rows of x, in units of the grades."""
        return np.asarray(x[rows] / self.grades.factors[0][rows, None] @ self.analysis)

    def held(self, x: np.ndarray, step: float, codec: Trellis) -> dict[str, np.ndarray]:
        """Parts of the codec. Raises CodecError where the step is too small."""
        return codec.turned(x.astype(np.float64), step, self.components, self.grades)

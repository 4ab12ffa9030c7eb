"""Evidence of pairs, taken apart: what rounding a matrix by it asks for, which is the same at each number of bits.

Decides how levels are chosen along a matrix. How its evidence is taken apart is `kronecker`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steelyard.codecs._grades import Grades
from steelyard.codecs._rowwise import Rowwise
from steelyard.codecs.trellis import Trellis, stored, streams_of
from steelyard.edit._components import Components
from steelyard.edit._feed import feed, gathered


@dataclass(frozen=True)
class Apart:
    """Of a matrix (outputs, inputs): steps of its rows and columns, and how an error of one moves the others."""

    grades: Grades
    moves: tuple[np.ndarray | None, np.ndarray | None]  # of rows and of columns, in their steps, float32; None: not
    added: tuple[np.ndarray, np.ndarray]  # to a squared error of each row and column, by those before it
    components: Components | None = None  # in which the matrix is held instead

    @staticmethod
    def of(uppers: tuple[np.ndarray, np.ndarray], components: Components | None = None) -> Apart:
        """From the upper triangular factors of the inverses for outputs and inputs, or the roots of their diagonals."""
        grades = Grades.nearest(*(x.diagonal() if x.ndim > 1 else x for x in uppers))
        moves = tuple(_moves(*both) for both in zip(uppers, grades.factors, strict=True))
        added = tuple(gathered(x) if x.ndim > 1 else np.zeros(len(x)) for x in uppers)
        if components is not None:
            moves = (None, None)
        return Apart(grades, moves, added, components)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """In memory."""
        arrays = [self.grades.rows, self.grades.columns, *self.added, *(x for x in self.moves if x is not None)]
        return sum(x.nbytes for x in arrays) + (0 if self.components is None else self.components.nbytes)

    @property
    def told(self) -> int:
        """The bytes that the grades take, or the components."""
        return sum(map(len, streams_of(self.grades))) if self.components is None else self.components.told

    def spread(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """What others' errors add to elements where rows and columns cross: its deviation, as a share of an error's."""
        by_row, by_column = (1 + x for x in self.added)
        return np.sqrt(np.outer(by_row[rows], by_column[columns]) - 1)

    def held(self, x: np.ndarray, step: float, codec: Trellis) -> dict[str, np.ndarray]:
        """Parts of the codec for a tensor; step: in units of the grades. Raises CodecError where it is too small."""
        if self.components is not None:
            return self.components.held(x.reshape(len(x), -1), step, codec)
        factors, step = self.grades.factors, stored(step)
        w = x.reshape(len(self.grades.rows), -1) / (step * factors[0][:, None])
        w /= factors[1]
        w = np.ascontiguousarray(w.T if codec.down else w, np.float32)  # (lines, width), in steps
        lines, width = reversed(self.moves) if codec.down else self.moves
        chosen = Rowwise(codec, w, width)
        feed(w, lines, chosen.take)
        return chosen.parts(step, self.grades)


def _moves(upper: np.ndarray, factors: np.ndarray) -> np.ndarray | None:
    """How an error of one line moves the others, both in their steps; None: not at all."""
    if upper.ndim == 1:
        return None
    return np.asarray(upper / upper.diagonal()[:, None] * factors[:, None] / factors, np.float32)

"""The trellis codec's choice of levels, one row after the other: each row may depend on what those before became.

Decides levels as `Trellis.encode` does, from statistics of a first guess at all rows. Knows nothing of what rows are.
"""

from __future__ import annotations

import numpy as np

from steelyard.codecs._grades import Grades
from steelyard.codecs.trellis import LIMIT, Trellis, prices_of, starts_of
from steelyard.errors import CodecError
from steelyard.kernels import feedback, trellis


class Rowwise:
    """Levels of one row after another, for a matrix whose rows are only known one by one.

    >>> guess = np.float32([[0.2, 3.1], [1.9, -2.2]])
    >>> rows = Rowwise(Trellis(states=8, lagrangian=0.0), guess)
    >>> [rows.take(row).tolist() for row in guess]
    [[0.0, 4.0], [2.0, -2.0]]
    """

    def __init__(self, codec: Trellis, guess: np.ndarray, mix: np.ndarray | None = None):
        """`guess`: (rows, width), about what the rows will be, in steps. Raises CodecError for what has no level.

        mix: (width, width), how an error of one element moves those after it in the row (None: not at all).
        """
        if not np.abs(guess).max(initial=0) < LIMIT:
            raise CodecError("trellis: NaN, infinite or more than 2^28 steps from 0; take a greater step")
        self._codec = codec
        self._following, self._second = trellis.tables(codec.states)
        self._kinds, self._prices = prices_of(guess, codec.states)
        self._starts = frozenset(starts_of(*guess.shape).tolist())
        self._mix = None if mix is None else mix.astype(np.float32)
        self._levels, self._row, self._state = np.empty(guess.shape, np.int32), 0, 0

    def take(self, row: np.ndarray) -> np.ndarray:
        """The whole numbers of steps (float32) that the next row, (width,) in steps, becomes."""
        if self._row in self._starts:
            self._state = 0
        levels, wide = self._levels[self._row], row.astype(np.float64)
        given = (wide, np.ones(1), self._kinds[self._row], self._prices, self._codec.lagrangian)
        self._row += 1
        if self._codec.states == 1:
            if self._mix is None:
                trellis.nearest(*given, levels)
            else:
                feedback.rounded(wide, self._mix, *given[2:], levels)
            return np.asarray(levels, np.float32)
        before, path = self._state, (self._following, self._second, self._state, levels)
        if self._mix is None:
            self._state = trellis.choose(*given, *path)
        else:
            self._state = feedback.survived(wide, self._mix, *given[2:], *path)
        whole = np.empty(len(row), np.int32)
        trellis.placed(levels, self._following, self._second, before, whole)
        return whole.astype(np.float32)

    def parts(self, step: float, grades: Grades | None = None) -> dict[str, np.ndarray]:
        """The parts of the codec, when all rows were taken."""
        return self._codec.told(self._levels, step, grades)

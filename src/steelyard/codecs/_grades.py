"""Steps for the rows and columns of a matrix: powers of two to the quarter, the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROOTS = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])  # 2^(k/4)


@dataclass(frozen=True)
class Grades:
    """Whole numbers k for rows and columns of a matrix: what multiplies their steps is 2^(k/4)."""

    rows: np.ndarray  # int32
    columns: np.ndarray  # int32

    @staticmethod
    def nearest(rows: np.ndarray, columns: np.ndarray) -> Grades:
        """To factors > 0.

        >>> Grades.nearest(np.array([1.0, 2.1]), np.array([0.7])).factors[0].tolist()
        [1.0, 2.0]
        """
        return Grades(*(np.rint(4 * np.log2(x)).astype(np.int32) for x in (rows, columns)))

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Of rows and of columns, float64, the same on every machine: damaged ones may be 0 or infinite."""
        rows, columns = (np.ldexp(_ROOTS[k & 3], np.clip(k >> 2, -1100, 1100)) for k in (self.rows, self.columns))
        return rows, columns

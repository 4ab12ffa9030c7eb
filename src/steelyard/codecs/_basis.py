"""A basis for the rows of a tall matrix: whole numbers of a step that its width says, products with them exact.

Decides which matrices may have one, and how fine it is; how it is coded is the trellis codec's.
"""

from __future__ import annotations

import math

import numpy as np

from steelyard.errors import CodecError

TALL = 16  # a matrix with so many rows for each column may be worth turning
WIDE = 1024  # columns of the widest matrix that is turned


def may_turn(count: int, width: int) -> bool:
    """Whether a matrix (count, width) may be held in a basis of its own."""
    return 1 < width <= WIDE and count >= TALL * width


def fineness(width: int, graded: bool) -> float:
    """Steps of a basis within 1, a power of two: some eight for the root mean square of its elements.

    Twice as many where columns have grades: then the rows of a basis need not be of one length.
    """
    return float(2.0 ** math.floor(math.log2((16 if graded else 8) * math.sqrt(width))))


def principal(rows: np.ndarray) -> np.ndarray:
    """The directions in which rows vary, the greatest first: (components, columns), orthonormal rows."""
    _, vectors = np.linalg.eigh(rows.T @ rows)
    return np.ascontiguousarray(vectors[:, ::-1].T)


def product(wholes: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The matrix product of whole numbers, exact: in floats that hold every sum on the way."""
    most = np.abs(wholes).max(0).astype(np.float64) @ np.abs(basis).astype(np.float64)
    if most.max() >= 2.0**53:
        raise CodecError("trellis: levels beyond what the product with a basis can hold; the stream is damaged")
    kind = np.float32 if most.max() < 2.0**24 else np.float64
    return np.asarray(wholes.astype(kind) @ basis.astype(kind))

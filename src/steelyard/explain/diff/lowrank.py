"""The rank of a difference of two matrices: is it a few directions, as a merged LoRA leaves it?

Decides by a randomised range finder over row blocks: Q is an orthonormal basis of D'W with a random W. The singular
values of DQ are lower bounds of those of D, and ||D - DQQ'||_F^2 = ||D||_F^2 - ||DQ||_F^2 exactly, so that what is
left out is known and not estimated. Storing the sum in few bits adds noise of full rank; what is not larger than that
noise counts as nothing. One basis, as wide as the ranks that are looked for, and a few blocks are in memory.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.tally import BLOCK, Tally, aligned, epsilon, wide

LARGEST = 64  # a rank that is looked for
_OVER = 8  # directions more than that
_PROBE = (48, 96)  # rows and columns of the piece that is looked at first: one thread multiplies it
_SEED = 0


@dataclass(frozen=True)
class Rank:
    """A numerical rank of D and what is left beyond it."""

    rank: int | None  # None: more than LARGEST
    residual: float  # ||D - QB||_F / ||D||_F at that rank
    noise: float  # what rounding alone explains, in the same unit

    @property
    def text(self) -> str:
        """What there is to say, in a few words."""
        if self.rank is None:
            return f"the difference has a rank over {LARGEST} (residual {self.residual:.2g})"
        return (
            f"the difference has rank {self.rank} (residual {self.residual:.2g} of its norm, rounding {self.noise:.2g})"
        )


def is_matrix(a: Weight, b: Weight) -> bool:
    """Whether a rank has a meaning here: two real matrices of one shape with more than one row and column."""
    kinds = {a.spec.dtype.kind, b.spec.dtype.kind}
    return a.spec.shape == b.spec.shape and len(a.spec.shape) == 2 and min(a.spec.shape) > 1 and kinds == {"float"}


def rounding(a: Weight, b: Weight, tally: Tally) -> float:
    """||noise||_F that rounding both sides may have left in the difference.

    A number x is stored within eps/2 |x|, and on average within less than eps |x| / sqrt(12).
    """
    return math.sqrt(sum((epsilon(w.spec.dtype) ** 2 / 12) * tally.total(row) for w, row in ((a, 2), (b, 3))))


def looks_low(a: Weight, b: Weight, tally: Tally) -> bool:
    """Whether a piece of the difference, some 48 by 96, has a rank of at most 24."""
    rows, columns = a.spec.shape
    count, width = min(_PROBE[0], rows, max(BLOCK // columns, 1)), min(_PROBE[1], columns)
    if min(count, width) < 8 or not tally.all_finite or not math.isfinite(tally.total(1)):
        return False
    x, y = next(iter(aligned(a, b, count * columns)))
    piece = (wide(y).astype(np.float64) - wide(x)).reshape(count, columns)[:, :width]
    if not piece.any():
        return False
    gram = piece @ piece.T if count <= width else piece.T @ piece
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    level = rounding(a, b, tally) / math.sqrt(tally.elements)  # of one element
    edge = max(1.2 * level * (math.sqrt(count) + math.sqrt(width)), 1e-6 * float(values[-1]))
    clear = float(values[-1]) > 3 * edge  # else it is noise, whose spectrum has no gap
    return clear and int(np.count_nonzero(values > edge)) <= min(count, width) // 2


def rank(a: Weight, b: Weight, tally: Tally) -> Rank | None:
    """The numerical rank of D = b - a; None where D is not finite throughout, or nothing but rounding.

    It is the number of singular values above the largest that rounding noise has, level (sqrt(m) + sqrt(n)), given
    only if no more than rounding is left beyond them.
    """
    rows, columns = a.spec.shape
    square = tally.total(1)
    if not square or not math.isfinite(square) or not tally.all_finite:
        return None
    noise = rounding(a, b, tally)
    values = _singular_values(a, b, min(LARGEST + _OVER, rows, columns))
    edge = noise / math.sqrt(rows * columns) * (math.sqrt(rows) + math.sqrt(columns))
    found = int(np.count_nonzero(values > max(edge, 1e-6 * float(values.max(initial=0.0)))))
    if found == 0:
        return None
    left = math.sqrt(max(square - math.fsum(values[:found] ** 2), 0.0) / square)
    told = left <= max(1.5 * noise / math.sqrt(square), 1e-5) and found <= LARGEST
    return Rank(found if told else None, left, noise / math.sqrt(square))


def _singular_values(a: Weight, b: Weight, width: int) -> np.ndarray:
    """Those of DQ, largest first, where Q (columns, width) is an orthonormal basis of D'W with a random W."""
    generator = np.random.default_rng(_SEED)
    image = np.zeros((a.spec.shape[1], width))
    for d in _differences(a, b):
        image += d.T @ generator.standard_normal((len(d), width))
    basis, _ = np.linalg.qr(image)
    gram = np.zeros((width, width))
    for d in _differences(a, b):
        part = d @ basis
        gram += part.T @ part
    values: np.ndarray = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    return values


def _differences(a: Weight, b: Weight) -> Iterator[np.ndarray]:
    """b - a by some whole rows, in float64."""
    columns = a.spec.shape[1]
    for x, y in aligned(a, b, max(BLOCK // columns, 1) * columns):
        yield (wide(y).astype(np.float64) - wide(x)).reshape(-1, columns)

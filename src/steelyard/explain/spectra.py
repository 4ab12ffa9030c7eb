"""Singular values of weight matrices: norms, ranks, condition, and the exponent of the tail.

Decides what the matrix of a tensor is (the first axis against all others), and when a spectrum is computed in
full or bounded. Knows nothing of what a layer does.

A matrix whose shorter side is at most ``exact`` gets all its singular values, from the eigenvalues of its Gram
matrix in float64, accumulated in panels; singular values below some 1e-8 of the largest are lost in rounding, and
are given as 0. A larger one gets bounds from three passes over it (see `bounds`), after one that looks for its
largest value, in the memory of a few blocks of `SKETCH` vectors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights, given
from steelyard.core.where import Where
from steelyard.errors import RecipeError, WeightsError, quoted
from steelyard.explain.powerlaw import fit_power_law

if TYPE_CHECKING:
    import numpy as np

EXACT = 4096  # the shorter side up to which all singular values are computed: some 10 s of a core at the limit
PANEL = 1 << 20  # elements that are in memory at a time: 8 MB in float64
WORKERS = 4  # matrices at a time: each takes twice the square of its shorter side in memory
SKETCH = 128  # random vectors of the bounds
DOUBT = 1e-10  # the probability that a bound from above is wrong
FITTED = 50  # eigenvalues from which on the tail is fitted: fewer leave the exponent to chance
NOISE = 1e-16  # an eigenvalue of the Gram matrix below this part of the largest, times its side, is rounding

COLUMNS = (
    Column("name"),
    Column("rows"),
    Column("columns", "", "all axes but the first together"),
    Column("norm", "", "Frobenius norm"),
    Column("largest", "", "largest singular value; of an interval, its lower end"),
    Column("largest below", "", "upper end of the interval; the same number where it is exact"),
    Column("smallest", "", "smallest singular value"),
    Column("condition", "", "largest over smallest singular value"),
    Column("rank", "", "singular values that are not lost in rounding"),
    Column("stable rank", "", "squared Frobenius norm over squared largest singular value; or the lower end"),
    Column("stable rank below", "", "upper end of the interval"),
    Column("effective rank", "", "exp of the entropy of squared singular values over their sum; or the lower end"),
    Column("effective rank below", "", "upper end of the interval"),
    Column("90 % energy", "", "singular values that hold 90 % of the squared norm"),
    Column("alpha", "", "exponent of the power-law tail of the squared singular values; 2 to 6 is usual when trained"),
    Column("distance", "", "Kolmogorov-Smirnov distance of the tail to its power law; above 0.1 the fit says little"),
    Column("tail", "", "squared singular values in the tail"),
    Column("how", "", "exact, bounds, or why there is nothing"),
)


def spectra(
    weights: Weights,
    where: Where | None = None,
    exact: int = EXACT,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """One row for each tensor of two or more axes: its singular values in figures.

    The matrix of a tensor is its first axis against all others, so that a row is one output of a layer of torch.
    ``exact`` is the shorter side up to which all singular values are computed; of larger matrices the table has
    lower ends, and upper ends that hold but for a chance of 1e-10, from random vectors of ``seed``. ``progress`` is
    told the bytes of each matrix when it is done.

    >>> import numpy as np
    >>> row = spectra(Weights.of({"w": np.diag([4.0, 3.0, 0.0]).astype(np.float32)})).rows[0]
    >>> row["largest"], row["rank"], row["stable rank"]
    (4.0, 2, 1.5625)

    Raises WeightsError if no tensor of two or more axes matches, RecipeError for an ``exact`` below 0.
    """
    if exact < 0:
        raise RecipeError(f"exact is a number of singular values, at least 0, not {exact}")
    chosen = [item for item in given(weights).choose(where).values() if _is_matrix(item)]
    if not chosen:
        raise WeightsError("none of the tensors is a matrix of numbers: a spectrum needs two axes; choose others")

    def one(item: Weight) -> dict[str, Any]:
        matrix = Matrix.of(item)
        row = {"name": item.name, "rows": matrix.rows, "columns": matrix.columns, **_row(matrix, exact, seed)}
        if progress is not None:
            progress(item.spec.nbytes)
        return row

    rows = _side_by_side(one, chosen)
    return Table.of("spectra", COLUMNS, rows, {"exact up to": exact, "chance of a wrong bound": DOUBT})


def _side_by_side(one: Callable[[Weight], dict[str, Any]], items: Sequence[Weight]) -> list[dict[str, Any]]:
    """What `one` gives for each item, in order: a matrix a core, since LAPACK's own threads mostly wait here."""
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))
    try:
        with threadpool_limits(1, "blas"):
            return list(pool.map(one, items))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt waits for the matrices at hand, not for all


def singular_values(weight: Weight) -> np.ndarray:
    """All singular values of a tensor as a matrix, largest first, in float64; those lost in rounding are 0.

    >>> import numpy as np
    >>> singular_values(Weight.of("w", np.float32([[0, 2], [1, 0], [0, 0]]))).tolist()
    [2.0, 1.0]

    Raises WeightsError for a tensor that is no matrix, or has values that are not finite.
    """
    import numpy as np

    if not _is_matrix(weight):
        raise WeightsError(f"{weight.origin}: {quoted(weight.name)} is {weight.spec}; a spectrum needs two axes")
    energies, scale = _energies(Matrix.of(weight))
    with np.errstate(over="ignore"):  # a singular value may be beyond float64 where no element is
        values: np.ndarray = np.sqrt(energies) * scale
    return values


def _energies(matrix: Matrix) -> tuple[np.ndarray, float]:
    """The squared singular values in units of a scale, largest first, and the scale: no square leaves the range."""
    import numpy as np

    scale = _scale(matrix)
    if not scale:
        return np.zeros(matrix.short), 1.0
    gram = np.zeros((matrix.short, matrix.short), _wide(matrix.weight))
    for panel in matrix.panels(1 / scale):
        gram += _adjoint(panel) @ panel
    energies = np.linalg.eigvalsh(gram)[::-1]
    energies[energies < NOISE * matrix.short * energies[0]] = 0
    return energies, scale


@dataclass(frozen=True)
class Matrix:
    """A tensor as the matrix of its first axis against all others, read in panels."""

    weight: Weight
    rows: int
    columns: int

    @staticmethod
    def of(weight: Weight) -> Matrix:
        """The matrix of a tensor of two or more axes."""
        shape = weight.spec.shape
        return Matrix(weight, shape[0], math.prod(shape[1:]))

    @property
    def short(self) -> int:
        """The length of the shorter side: the number of singular values."""
        return min(self.rows, self.columns)

    def panels(self, factor: float) -> Iterator[np.ndarray]:
        """`factor` times the matrix, or its transpose if it is wide, some rows at a time: (some, short) in float64.

        All lie in one buffer: a panel is valid until the next one is asked for.
        """
        import numpy as np

        rows = max(PANEL // self.short, 1)
        buffer = np.empty((min(rows, max(self.rows, self.columns)), self.short), _wide(self.weight))
        tall = self.columns <= self.rows
        parts = self.weight.blocks(rows * self.columns) if tall else self._upright()
        for part in parts:
            values = part.reshape(-1, self.short) if tall else part.T
            panel = buffer[: len(values)]
            panel[...] = values  # cast as it is copied
            panel *= factor
            yield panel

    def _upright(self) -> Iterator[np.ndarray]:
        """Of a wide matrix, some columns at a time: (rows, some), as they are held."""
        import numpy as np

        width = max(PANEL // self.rows, 1)
        fill = self.weight.fill
        whole = self.weight.array().reshape(self.rows, self.columns) if fill is None else None
        for left in range(0, self.columns, width):
            count = min(width, self.columns - left)
            if whole is not None:
                panel = whole[:, left : left + count]
            else:
                panel = np.empty((self.rows, count), self.weight.spec.dtype.numpy)
                for row in range(self.rows):
                    fill(row * self.columns + left, panel[row])  # type: ignore[misc]
            yield panel


@dataclass(frozen=True)
class Bounds:
    """What is known of a spectrum: `energies` are squared singular values from below, largest first.

    Singular values are in units of `scale`, so that no square overflows or vanishes.
    """

    scale: float
    total: float  # the sum of all squared singular values
    energies: np.ndarray
    most: float  # the largest squared singular value from above
    short: int

    def effective_rank(self) -> tuple[float, float]:
        """The least and the greatest effective rank of a spectrum that keeps these bounds."""
        import numpy as np

        below = np.zeros(self.short)
        below[: self.energies.size] = self.energies[: self.short]
        below *= min(1.0, self.total / max(float(below.sum()), 1e-300))
        return _effective(self._gathered(below)), _effective(self._levelled(below))

    def _gathered(self, below: np.ndarray) -> np.ndarray:
        """The spectrum of least entropy: what is not known lies in the largest values, as far as they may go."""
        rest, found = self.total - float(below.sum()), below.copy()
        for i in range(found.size):
            more = min(rest, max(self.most - found[i], 0.0))
            found[i] += more
            rest -= more
            if rest <= 0:
                break
        return found

    def _levelled(self, below: np.ndarray) -> np.ndarray:
        """The spectrum of greatest entropy: what is not known fills the smallest values up to one level."""
        import numpy as np

        rest = self.total - float(below.sum())
        rising = below[::-1]
        needed = np.arange(1, rising.size + 1) * rising - np.cumsum(rising)  # to lift the first i to value i
        count = int(np.searchsorted(needed, rest, side="right"))
        level = (rest + float(rising[:count].sum())) / max(count, 1)
        raised: np.ndarray = np.maximum(below, level)
        return raised


def bounds(matrix: Matrix, seed: int = 0) -> Bounds:
    """What three passes over a matrix of any size tell of its spectrum, with certainty but for a chance of 1e-10.

    With M the Gram matrix of the shorter side, Omega of k Gaussian columns, and an orthonormal Q of M^2 Omega,
    the eigenvalues of Q'MQ bound those of M from below (Cauchy's interlacing). From above,
    |M^3 Omega| >= lambda^3 |v'Omega| for the largest eigenvalue and its vector, and |v'Omega|^2 is chi-squared of k
    degrees of freedom, so that lambda <= (|M^3 Omega| / c)^(1/3) unless |v'Omega| < c. The sum of all eigenvalues,
    the squared Frobenius norm, is exact. Rounding of float64 is not part of the certificate.

    Source: Halko, Martinsson and Tropp, SIAM Review 53(2), 2011; Dixon, SIAM J. Numer. Anal. 20(4), 1983.
    """
    import numpy as np

    scale = _scale(matrix)
    count = min(SKETCH, matrix.short)
    if not scale:
        return Bounds(1.0, 0.0, np.zeros(count), 0.0, matrix.short)
    basis = np.random.default_rng(seed).standard_normal((matrix.short, count))
    product, total = np.eye(count), 0.0
    for turn in range(3):
        image = np.zeros((matrix.short, count), _wide(matrix.weight))
        for panel in matrix.panels(1 / scale):
            image += _adjoint(panel) @ (panel @ basis)
            total += float(np.vdot(panel, panel).real) if turn == 0 else 0.0
        if turn == 2:
            energies = np.linalg.eigvalsh(basis.conj().T @ image)[::-1]
        basis, triangle = np.linalg.qr(image)
        product = triangle @ product
    most = (float(np.linalg.norm(product, 2)) / math.sqrt(_least_chi_squared(count))) ** (1 / 3)
    energies = np.clip(energies * (1 - 1e-12), 0, None)
    return Bounds(scale, total, energies, max(min(most, total), float(energies[0])), matrix.short)


def _least_chi_squared(freedom: int) -> float:
    """What a chi-squared variable falls below with a chance of at most DOUBT: (x e^(1-x))^(freedom/2) = DOUBT."""
    target, low, high = 2 * math.log(DOUBT) / freedom, 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle <= 0 or math.log(middle) + 1 - middle < target else (low, middle)
    return freedom * low


def _row(matrix: Matrix, exact: int, seed: int) -> dict[str, Any]:
    if not matrix.weight.spec.size:
        return {"how": "no elements"}
    try:
        if matrix.short <= exact:
            return _exact_row(*_energies(matrix))
        return _bounds_row(bounds(matrix, seed))
    except _NotFiniteError as error:
        return {"how": str(error)}


def _exact_row(squares: np.ndarray, scale: float) -> dict[str, Any]:
    first, last = float(squares[0]) ** 0.5, float(squares[-1]) ** 0.5
    row: dict[str, Any] = {"largest": scale * first, "largest below": scale * first, "smallest": scale * last}
    if not first:
        return row | {"norm": 0.0, "rank": 0, "how": "all zero"}
    energies = squares / squares[0]
    total, rank = float(energies.sum()), int((squares > 0).sum())
    row |= {"norm": scale * first * total**0.5, "condition": first / last if last else math.inf, "rank": rank}
    row["how"] = "exact"
    stable, effective = total, _effective(energies)
    row |= {"stable rank": stable, "stable rank below": stable}
    row |= {"effective rank": effective, "effective rank below": effective}
    row["90 % energy"] = int((energies.cumsum() < 0.9 * total).sum()) + 1
    if rank >= FITTED:
        law = fit_power_law(energies[:rank])
        row |= {"alpha": law.alpha, "distance": law.distance, "tail": law.tail}
    return row


def _bounds_row(found: Bounds) -> dict[str, Any]:
    least, scale = float(found.energies[0]), found.scale
    row = {"norm": scale * found.total**0.5, "largest": scale * least**0.5, "largest below": scale * found.most**0.5}
    row["how"] = "bounds"
    if not found.total:
        return row | {"rank": 0, "how": "all zero"}
    low, high = found.effective_rank()
    row |= {"stable rank": found.total / found.most, "stable rank below": found.total / least if least else math.inf}
    return row | {"effective rank": low, "effective rank below": high}


def _effective(energies: np.ndarray) -> float:
    """exp(-sum p log p) with p = energies / their sum. Source: Roy and Vetterli, EUSIPCO 2007, of squared values."""
    import numpy as np

    p = energies[energies > 0] / energies.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


class _NotFiniteError(WeightsError):
    """A matrix with NaN or infinite values has no singular values."""


def _scale(matrix: Matrix) -> float:
    """A power of two near the largest magnitude, so that squares neither overflow nor vanish; 0 of a zero matrix."""
    import numpy as np

    largest, bad = 0.0, 0
    native = matrix.weight.spec.dtype.kind != "complex" and matrix.weight.spec.dtype.numpy.isbuiltin == 1
    for block in matrix.weight.blocks(PANEL):
        with np.errstate(invalid="ignore"):
            values = block if native else np.abs(block.astype(_wide(matrix.weight)))
            ends = [float(values.min()), float(values.max())]  # NaN wherever there is one
        if np.isfinite(ends).all():
            largest = max(largest, -ends[0], ends[1])
        else:
            bad += int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        text = f"{bad} values are not finite; repair them first"
        raise _NotFiniteError(f"{matrix.weight.origin}: {quoted(matrix.weight.name)}: {text}")
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000) if largest else 0.0  # its inverse must be finite, too


def _adjoint(panel: np.ndarray) -> np.ndarray:
    """The conjugate transpose; of real numbers a view, so that the product with itself is seen to be symmetric."""
    return panel.T if panel.dtype.kind == "f" else panel.conj().T


def _is_matrix(weight: Weight) -> bool:
    return len(weight.spec.shape) >= 2 and weight.spec.dtype.kind != "bool"


def _wide(weight: Weight) -> Any:
    import numpy as np

    return np.complex128 if weight.spec.dtype.kind == "complex" else np.float64

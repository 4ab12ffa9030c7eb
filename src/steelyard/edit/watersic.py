"""Round with a step for each row and column, such that a bit buys as much of the loss everywhere, and entropy-code it.

Decides steps by the second moments of the inputs and the Fisher information; how levels are chosen and held is the
trellis codec. Knows nothing of models, or of how evidence was measured.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar

import numpy as np

from steelyard.codecs._rowwise import Rowwise
from steelyard.codecs.entropy import Entropy
from steelyard.codecs.scaled import Scaled
from steelyard.codecs.trellis import Trellis
from steelyard.core.packed import Packed, Scheme, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._feed import feed, gathered, upper_of
from steelyard.edit._levels import finite, short
from steelyard.edit._solved import solved
from steelyard.edit.evidence import About, check_same, evidence_of, hessian_of
from steelyard.edit.prune import in_scope
from steelyard.edit.quantize import held_so
from steelyard.errors import CodecError, RecipeError, WeightsError, quoted

SAMPLE = 1 << 15  # elements by which the bits of a tensor are foreseen
LEAST = 0.1  # of the mean importance of rows, which every row has besides its own
OUTPUTS = 4096  # rows whose products are in memory at once
REFITS = 2  # of the factors of columns and rows
SIGNIFICANT = 8  # bits of a factor
HEAD = 6  # bytes before the numbers of a stream
UNIT = Trellis(step=1.0, lagrangian=0.3, turn=False, down=True)


@dataclass(frozen=True)
class WaterSic(Step):
    """Round to `bits` a weight in the mean over all tensors, where they keep the loss least.

    The loss is the quadratic one of layers: sum over tensors and rows i of g_i d_i H d_iᵀ, with d_i the error of a row
    (an output), H = mean x xᵀ of the inputs from evidence `by` of the kind 'hessian', and g_i what an output matters:
    mean_j F_ij / mean_j H_jj with the Fisher information F (`fisher`), a tenth of the tensor's mean added. Without
    `fisher` what each matrix makes of its inputs counts as much as what any other does: g = 1 / tr(W H Wᵀ). Without
    `by` all inputs count alike.

    Columns are rounded one after the other, and the error of each is spread over those that follow, as in GPTQ. An
    error e of w_ij then costs g_i (e / u_j)², with u the diagonal of the Cholesky factor of the inverse of H. So the
    step of w_ij is proportional to u_j / sqrt(g_i): everywhere a bit buys as much, and what is below the water
    level is 0. Levels are those of the trellis codec, chosen for error plus price of their bits along each column, and
    entropy-coded. At last the factors of columns and rows are fitted again (least squares).

    The bits are foreseen from samples: a few per cent may be missing. The tensors are read once before the first is
    rounded, one at a time. Only floating-point matrices (two axes) take part, whose inputs are the last axis; the
    others pass untouched, and so do those that are held in this way already. The result is held by two `scaled` codecs,
    for rows and columns, around the `trellis` codec.

    Args:
        states: of the trellis: more take less space for the same loss, and more time.
        damping: what is added to the diagonal of H, as a share of its mean.

    Raises RecipeError for settings out of range, WeightsError for evidence that is missing, of another kind or of
    other weights, CodecError, naming the tensor, for NaN or infinite weights.

    >>> random = np.random.default_rng(0)
    >>> x, w = random.normal(size=(500, 64)) * np.linspace(0.1, 3, 64), random.normal(size=(256, 64))
    >>> h = Weights.of({"a": (x.T @ x / 500).astype(np.float32)})
    >>> held = WaterSic(bits=2, by=h)(Weights.of({"a": w.astype(np.float32)}))["a"]
    >>> lost = np.square((held.array() - w) @ x.T).mean() / np.square(w @ x.T).mean()
    >>> round(8 * held.read().nbytes / w.size, 1), bool(lost < 0.05)
    (2.1, True)

    Source: Lifar, Savkin, Ordentlich and Polyanskiy, "WaterSIC: information-theoretically (near) optimal linear layer
    quantization", 2026 (arXiv 2603.04956), with importances of rows as in K-FAC (Martens and Grosse, 2015) and a
    trellis along the columns in place of rounding.
    """

    name: ClassVar[str] = "watersic"
    bits: float = 3.0
    by: Weights | None = None
    fisher: Weights | None = None
    states: int = 8
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 16:
            raise RecipeError(f"bits is {self.bits:g}, expected more than 0 and at most 16")
        if not 0 < self.damping < 1e6:
            raise RecipeError(f"damping is a share of the mean of the diagonal, above 0, not {self.damping}")
        self.codec()

    def codec(self) -> Trellis:
        """The codec that holds the levels."""
        try:
            return Trellis(1.0, self.states, UNIT.lagrangian, turn=False, down=True)  # type: ignore[arg-type]
        except CodecError as error:
            raise RecipeError(str(error)) from error

    def scheme(self) -> Scheme:
        """How the result is held."""
        inner = Scheme(Scaled(), {"values": self.codec(), "factor": Entropy()})
        return Scheme(Scaled(0), {"values": inner, "factor": Entropy()})

    def __call__(self, weights: Weights) -> Weights:
        about = About() if self.by is None else About.of(self.by)
        chosen = {
            name: item
            for name, item in weights.items()
            if in_scope(item, 2)
            and len(item.spec.shape) == 2
            and name not in about.first
            and not held_so(item, Scaled(0))
        }
        together = _Together(self, chosen)
        scheme = self.scheme()
        return weights.with_items(
            item.then(partial(together.hold, name), scheme=scheme) if name in chosen else item
            for name, item in weights.items()
        )


@dataclass(frozen=True)
class _Matrix:
    """One weight in units in which every error counts alike: w / row / column, up to the step that all share."""

    w: np.ndarray  # (outputs, inputs), float32
    h: np.ndarray  # (inputs, inputs), with damping
    upper: np.ndarray  # the Cholesky factor of the inverse of h, (inputs, inputs)
    importance: np.ndarray  # of rows, (outputs,)

    @staticmethod
    def of(weight: Weight, x: np.ndarray, how: WaterSic) -> _Matrix:
        """Raises WeightsError for evidence that does not fit, CodecError for NaN."""
        w = finite(weight, x).astype(np.float32)
        h = np.eye(w.shape[1])
        if how.by is not None:
            check_same(About.of(how.by), weight, x)
            h = hessian_of(how.by, weight)[1].mean(axis=0)  # the same inputs, of whichever outputs
        diagonal = float(np.diag(h).mean())
        h = h + how.damping * (diagonal or 1.0) * np.eye(len(h))
        try:
            if diagonal < 0:
                raise np.linalg.LinAlgError
            upper = upper_of(h)
        except np.linalg.LinAlgError:
            raise WeightsError(
                f"{weight.origin}: the Hessian of {quoted(weight.name)} is not positive definite even with "
                f"damping={how.damping}; measure it on more examples, or raise the damping"
            ) from None
        if how.fisher is None:
            whole = float(np.vdot(w.T.astype(np.float64) @ w, h))
            return _Matrix(w, h, upper, np.full(len(w), 1 / whole if whole > 0 else 0.0))
        rows = _fisher_of(how.fisher, weight, x).mean(axis=1) / (diagonal or 1.0)
        return _Matrix(w, h, upper, rows + LEAST * rows.mean())

    @property
    def matters(self) -> bool:
        """Whether any error does."""
        return bool(self.w.any() and self.importance.any())

    @property
    def row(self) -> np.ndarray:
        """Steps of rows, as far as they differ."""
        return np.asarray(1 / np.sqrt(self.importance))  # float64

    @property
    def column(self) -> np.ndarray:
        """Steps of columns, as far as they differ."""
        return np.diag(self.upper)

    def sample(self) -> np.ndarray:
        """Some rows in the units, (rows, inputs)."""
        few = max(1, SAMPLE // max(1, self.w.shape[1]))
        every = max(1, -(-len(self.w) // few))
        return np.asarray(self.w[::every] / self.row[::every, None] / self.column)

    def rounded(self, step: float, codec: Trellis) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """The parts of the codec, and the factors of rows and columns."""
        column, upper = (step * self.column).astype(np.float32), self.upper.astype(np.float32)
        w = np.ascontiguousarray(self.w.T)  # (inputs, outputs)
        w /= self.row.astype(np.float32)
        rows = Rowwise(codec, feed(w, upper, column, np.rint)[0])
        wholes = feed(w, upper, column, rows.take)[1]
        return rows.parts(1.0), *self._fitted(wholes, step * self.column)

    def _fitted(self, wholes: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The factors of rows and columns with the least loss for whole numbers (inputs, outputs)."""
        row, column, used = self.row.copy(), column.copy(), wholes.any(axis=1)
        h = self.h[np.ix_(used, used)]
        parts = [slice(at, at + OUTPUTS) for at in range(0, len(row), OUTPUTS)]  # so that memory is bounded
        for _ in range(REFITS if used.any() else 0):
            products, slope = np.zeros_like(h), np.zeros(len(h))
            for part in parts:
                k, target = wholes[used, part].astype(np.float64), self.h[used] @ self.w[part].T
                products += (k * (np.square(row[part]) * self.importance[part])) @ k.T
                slope += (k * target) @ (row[part] * self.importance[part])
            curve = h * products
            ridge = 1e-3 * np.diag(curve)  # a column that hardly differs from others stays as it was
            column[used] = np.linalg.solve(curve + np.diag(ridge), slope + ridge * column[used])
            for part in parts:
                k, target = wholes[used, part] * column[used, None], self.h[used] @ self.w[part].T
                size, own = (h @ k * k).sum(axis=0), (k * target).sum(axis=0)
                row[part] = np.where(size > 0, own / np.where(size > 0, size, 1), row[part])
        return row, column


def _fisher_of(fisher: Weights, weight: Weight, x: np.ndarray) -> np.ndarray:
    """The Fisher information of each element, finite and not negative."""
    check_same(About.of(fisher), weight, x)
    found = evidence_of(fisher, weight, ("fisher",))
    if found.spec.shape != weight.spec.shape:
        raise WeightsError(
            f"{found.origin}: the Fisher information of {quoted(weight.name)} is {found.spec}, "
            f"its weights {weight.spec}"
        )
    values = found.array().astype(np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise WeightsError(f"{found.origin}: the Fisher information of {quoted(weight.name)} must be finite and >= 0")
    return values


@dataclass
class _Together:
    """The step that all share, found when the first tensor is read. Safe with several threads."""

    how: WaterSic
    members: dict[str, Weight]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, name: str, x: np.ndarray) -> Packed | np.ndarray:
        """`x`, the values of the weight of that name, rounded."""
        with self.lock:
            step = self._step
        weight, scheme = self.members[name], self.how.scheme()
        if not x.size:
            return pack(x, scheme)
        matrix = _Matrix.of(weight, x, self.how)
        if not matrix.matters:
            return pack(np.zeros_like(x), scheme)
        codec = self.how.codec()
        stream, row, column = matrix.rounded(step, codec)
        unit = float(np.median(np.abs(row))) or 1.0  # so that factors of rows are about 1
        values = Packed(weight.spec, codec, stream)
        factors = [short(f.astype(np.float32), SIGNIFICANT) for f in (row / unit, column * unit)]
        first, second = (pack(f, Entropy()) for f in factors)
        inner = Packed(weight.spec, Scaled(), {"values": values, "factor": second})
        return Packed(weight.spec, Scaled(0), {"values": inner, "factor": first})

    @cached_property
    def _step(self) -> float:
        random, codec = np.random.default_rng(0), self.how.codec()
        samples, count, squares, most = [], 0, 0.0, 0.0
        for weight in self.members.values():
            x = weight.array()
            count += x.size
            if x.size and (matrix := _Matrix.of(weight, x, self.how)).matters:
                own = matrix.sample()
                noise = random.normal(size=own.shape) * np.sqrt(gathered(matrix.upper) / 12)
                samples.append((x.size / own.size, own.astype(np.float32), noise.astype(np.float32)))
                squares += x.size * float(np.square(own).mean())
                most = max(most, float(np.abs(own).max()))

        def bits(step: float) -> float:
            found = 0
            for share, own, noise in samples:
                found += share * 8 * (codec.held(own / min(step, most) + noise, 1.0)["stream"].size - HEAD)
            return found / count

        start = math.sqrt(squares / count) / 2.0**self.how.bits if samples else 1.0
        return min(solved(bits, self.how.bits, start), most) if samples else 1.0

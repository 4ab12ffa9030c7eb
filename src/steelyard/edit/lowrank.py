"""Matrices as products of thin ones. Decides the rank of each, by bytes or by error, and by data where there are any.

How factors become values again is the codec `lowrank`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import is_whole
from steelyard.codecs.lowrank import LowRank
from steelyard.core.packed import Packed, Plan, Scheme, Smallest, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import finite
from steelyard.edit._options import check_options
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.edit.prune import scoped
from steelyard.errors import RecipeError, WeightsError, quoted

_EITHER = Smallest((LowRank(), None))  # until its values are read nobody knows whether factors take less


@dataclass(frozen=True)
class Factorize(Step):
    """Hold each matrix W (outputs, inputs) as a product of rank r, with the least error.

    Without data the error is ||W - L R||², and the product the truncated singular value decomposition. With evidence
    `by` of the kind 'hessian' it is that of the outputs, tr(D H Dᵀ) for D = W - L R: the decomposition of W C, where
    H + damping is C Cᵀ, and R times the inverse of C. Kernels are matrices of outputs by all else.

    Say one of three:

    Args:
        rank: r itself; of a matrix whose smaller side is less, that side.
        keep: the share of the bytes of each matrix that its factors may take, as long as they are of its type.
        error: the largest share of the squared norm (with data: of the squared outputs) that may be lost.
        by: evidence.
        damping: what is added to the diagonal of H, as a share of its mean.
        left, right: how the factors are held, for instance quantized; plain unless said.

    A matrix whose factors would take no fewer elements stays as it is. Only floating-point tensors of at least two axes
    take part; the others pass untouched, and so do those that are factored already. The factor of the inputs is fitted
    again after that of the outputs was rounded, and makes up for some of it.

    Raises RecipeError for settings out of range, WeightsError if no tensor takes part, for a rank that no matrix has,
    and for evidence that is missing, of another kind or of other weights, CodecError for NaN or infinite weights.

    >>> w = Weights.of({"a": np.outer(np.arange(4), [1, 2, 3]).astype(np.float32)})
    >>> held = Factorize(rank=1)(w)["a"].read()
    >>> held.nbytes, held.array().round(3)[2].tolist()
    (28, [2.0, 4.0, 6.0])

    Sources: Eckart and Young 1936; with data: Yuan et al., "ASVD", 2023, and Wang et al., "SVD-LLM", ICLR 2025.
    """

    name: ClassVar[str] = "lowrank"
    rank: int | None = None
    keep: float | None = None
    error: float | None = None
    by: Weights | None = None
    damping: float = 1e-4
    left: Plan = None
    right: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        given = [n for n in ("rank", "keep", "error") if getattr(self, n) is not None]
        if len(given) != 1:
            raise RecipeError(f"say one of rank, keep and error, not {' and '.join(given) or 'none'}")
        if self.rank is not None and not is_whole(self.rank, 1):
            raise RecipeError(f"the rank is a whole number of at least 1, not {self.rank!r}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"the share of the bytes to keep is above 0 and at most 1, not {self.keep}")
        if self.error is not None and not 0 <= self.error < 1:
            raise RecipeError(f"the share of the squares that may be lost is at least 0 and below 1, not {self.error}")
        if not 0 < self.damping < 1e6:
            raise RecipeError(f"damping is a share of the mean of the diagonal, above 0, not {self.damping}")

    def __call__(self, weights: Weights) -> Weights:
        chosen = {item.name: item for item in scoped(weights, 2, "factored") if item.spec.size}
        sides = [min(_sides(item)) for item in chosen.values()]
        if self.rank is not None and sides and self.rank > max(sides):
            text = f"rank {self.rank} is more than any of the {len(sides)} matrices has: {max(sides)} at most"
            raise WeightsError(text)

        def one(item: Weight) -> Weight:
            if item.name not in chosen or _factored(item):
                return item
            rank = self._known(item)
            if rank is not None and not _pays(item, rank):
                return item
            scheme = _EITHER if rank is None else self._scheme(rank)
            return item.then(partial(self._factor, item), scheme=scheme)

        return weights.with_items(one(item) for item in weights.values())

    def _scheme(self, rank: int) -> Scheme:
        plans = {n: p for n, p in (("left", self.left), ("right", self.right)) if p is not None}
        return Scheme(LowRank(rank), plans)

    def _known(self, weight: Weight) -> int | None:
        """The rank, where it depends on the shape alone; 0 where not even 1 fits."""
        rows, columns = _sides(weight)
        if self.keep is not None:
            return int(self.keep * rows * columns / (rows + columns))
        return None if self.rank is None else min(self.rank, rows, columns)

    def _factor(self, weight: Weight, x: np.ndarray) -> Packed | np.ndarray:
        rows, root = Rows(weight.spec.shape), None
        if self.by is not None:
            rows, h = hessian_of(self.by, weight)
            check_same(About.of(self.by), weight, x)
            try:
                root = self._root(h.mean(axis=0))
            except np.linalg.LinAlgError:
                raise WeightsError(
                    f"the Hessian of {quoted(weight.name)} is not positive; measure it on more examples (score)"
                ) from None
        w = rows.matrix(finite(weight, x))  # (outputs, inputs)
        weighed = w if root is None else w @ root
        u, s, v = np.linalg.svd(weighed, full_matrices=False)
        rank = self._known(weight)
        if rank is None:
            rank = _by_error(s, self.error or 0.0)
            if not _pays(weight, rank):
                return x
        scale = np.sqrt(s[:rank])
        names = ("right", "left") if rows.first else ("left", "right")  # of the factors of the outputs, of the inputs
        plans = {"left": self.left, "right": self.right}
        of_outputs = (u[:, :rank] * scale).astype(x.dtype)
        held = {names[0]: pack(_turned(of_outputs, rows.first), plans[names[0]])}
        of_inputs = scale[:, None] * v[:rank]
        if isinstance(first := held[names[0]], Packed):
            rounded = _turned(first.array().astype(np.float64), rows.first)
            of_inputs = np.linalg.lstsq(rounded, weighed, rcond=None)[0]
        if root is not None:
            of_inputs = np.linalg.solve(root.T, of_inputs.T).T
        held[names[1]] = pack(_turned(of_inputs.astype(x.dtype), rows.first), plans[names[1]])
        return Packed(weight.spec, LowRank(rank), {"left": held["left"], "right": held["right"]})

    def _root(self, h: np.ndarray) -> np.ndarray:
        """C with C Cᵀ = H + damping."""
        h = h.copy()
        h[np.diag_indices(len(h))] += self.damping * (float(np.diag(h).mean()) or 1.0)
        return np.linalg.cholesky(h)


def _turned(x: np.ndarray, first: bool) -> np.ndarray:
    return np.ascontiguousarray(x.T) if first else x


def _sides(weight: Weight) -> tuple[int, int]:
    rows = weight.spec.shape[0]
    return rows, math.prod(weight.spec.shape[1:])


def _pays(weight: Weight, rank: int) -> bool:
    """Whether factors of this rank have fewer elements than the matrix."""
    rows, columns = _sides(weight)
    return 0 < rank * (rows + columns) < rows * columns


def _factored(weight: Weight) -> bool:
    return weight.scheme == _EITHER or (isinstance(weight.scheme, Scheme) and weight.scheme.codec.name == "lowrank")


def _by_error(s: np.ndarray, error: float) -> int:
    """The least rank that loses at most this share of the squares."""
    squares = s * s
    lost = squares.sum() - np.cumsum(squares)
    return max(1, int(np.searchsorted(-lost, -error * squares.sum())) + 1)

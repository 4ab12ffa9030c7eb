"""A matrix as the product of two thin ones: W = left right. Lossy; a part may itself be quantized.

Decides the factors by the singular value decomposition of the values. Source: C. Eckart and G. Young, The approximation
of one matrix by another of lower rank, Psychometrika 1 (1936).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import part, whole
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class LowRank(Codec):
    """Hold a tensor (m, ...) with n elements in each row as ``left`` (m, r) and ``right`` (r, n), of its dtype.

    The product, in float64 and rounded once, is the nearest matrix of rank r in the least squares: r = min(rank, m, n),
    the singular values shared equally between the factors. Factors weighed by data come from the step `lowrank`.

    Args:
        rank: the largest rank.

    >>> parts = LowRank(rank=1).encode(np.float32([[3, 6], [1, 2]]))
    >>> (parts["left"] @ parts["right"]).round(4).tolist()
    [[3.0, 6.0], [1.0, 2.0]]

    Raises CodecError for fewer than two axes, NaN, infinities and types other than float32, float16, bfloat16 and
    float64.
    """

    rank: int = 16

    name: ClassVar[str] = "lowrank"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("left", "right")
    settled: ClassVar[bool] = False  # factors are rounded, and those of a rounded product are a little different

    def __post_init__(self) -> None:
        whole(self.name, "rank", self.rank, 1)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"left", "right"}``; see the class."""
        rows, columns, rank = self._sizes(Spec.like(x))
        if not x.size:
            return {"left": np.zeros((rows, rank), x.dtype), "right": np.zeros((rank, columns), x.dtype)}
        with np.errstate(all="ignore"):
            wide = x.reshape(rows, columns).astype(np.float64)
            if not np.isfinite(wide).all():
                raise CodecError("lowrank: NaN or infinite values have no decomposition; repair or clip them")
            size = float(np.abs(wide).max()) or 1.0  # squares of the values must neither overflow nor vanish
            u, s, v = np.linalg.svd(wide / size, full_matrices=False)
            root = np.sqrt(s[:rank]) * np.sqrt(size)
            return {"left": (u[:, :rank] * root).astype(x.dtype), "right": (root[:, None] * v[:rank]).astype(x.dtype)}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """left @ right; raises CodecError for parts of other shapes or a product that is not finite."""
        rows, columns, rank = self._sizes(spec)
        left = part(parts, "left", self.name, dtypes=(spec.dtype.numpy,), shape=(rows, rank))
        right = part(parts, "right", self.name, dtypes=(spec.dtype.numpy,), shape=(rank, columns))
        with np.errstate(all="ignore"):
            wide = left.astype(np.float64) @ right.astype(np.float64)
            most = 2.0**128 - 2.0**120 if spec.dtype.name == "bfloat16" else float(np.finfo(spec.dtype.numpy).max)
            return np.asarray(np.clip(wide, -most, most).astype(spec.dtype.numpy)).reshape(spec.shape)

    def _sizes(self, spec: Spec) -> tuple[int, int, int]:
        """Rows, columns and rank."""
        if spec.dtype.name not in _FLOATS:
            raise CodecError(f"lowrank: cannot hold {spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")
        if len(spec.shape) < 2:
            raise CodecError(f"lowrank: a tensor with {len(spec.shape)} axes has no rank; choose matrices")
        rows = spec.shape[0]
        columns = int(np.prod(spec.shape[1:], dtype=np.int64))
        return rows, columns, min(self.rank, rows, columns)

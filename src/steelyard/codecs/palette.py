"""A codebook of at most k values, and for each element the index of its value.

Exact where the tensor has at most k distinct values; otherwise each element goes to the nearest centre of a
one-dimensional k-means. Knows nothing of training; the centres depend on the values alone.
Source: weight sharing of S. Han, H. Mao, W. J. Dally, Deep Compression, ICLR 2016 (arXiv 1510.00149), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part, patterns, whole
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec, dtype
from steelyard.errors import CodecError

_LARGEST = 1 << 16


@dataclass(frozen=True)
class Palette(Codec):
    """Hold a tensor as ``codes`` (its shape; uint8, above 256 entries uint16) and a rising ``codebook`` (its dtype).

    x[i] becomes codebook[codes[i]]. Values are told apart by their bits, so -0.0 and NaN survive in a tensor
    with at most k distinct ones. Only entries that are used are kept. Encoding what was decoded changes nothing.

    Args:
        k: the largest number of entries, 1 to 65536.

    >>> parts = Palette(k=4).encode(np.float32([[1, 0], [0, -2]]))
    >>> parts["codebook"], parts["codes"].tolist()
    (array([-2.,  0.,  1.], dtype=float32), [[2, 1], [1, 0]])

    Raises CodecError for NaN or infinite values among more than k distinct ones.
    """

    k: int = 16

    name: ClassVar[str] = "palette"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("codes", "codebook")
    inner: ClassVar[Mapping[str, Codec]] = {"codes": Bits()}

    def __post_init__(self) -> None:
        whole(self.name, "k", self.k, 1, _LARGEST)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"codes": indices, "codebook": values in ascending order}``."""
        found = _exact(x, self.k)
        if found is None:
            found = _exact(_nearest(x, self.k), self.k)  # centres that the dtype cannot tell apart become one
        if found is None:
            raise CodecError(f"palette: more than k = {self.k} centres were found")
        codes, codebook = found
        return {"codes": codes.astype(np.uint8 if codebook.size <= 256 else np.uint16), "codebook": codebook}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """codebook[codes]; raises CodecError for an index beyond the codebook."""
        codes = part(parts, "codes", self.name, dtypes=(np.uint8, np.uint16), shape=spec.shape)
        codebook = part(parts, "codebook", self.name, dtypes=(spec.dtype.numpy,))
        if codes.size and int(codes.max()) >= codebook.size:
            raise CodecError(f"palette: index {int(codes.max())} in a codebook of {codebook.size}")
        return codebook[codes] if codes.size else blank(spec)


def _exact(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and codebook of a tensor with at most `k` distinct bit patterns, else None."""
    if x.dtype.itemsize > 8:  # complex128: two words an element
        _, first, codes = np.unique(patterns(x).reshape(-1, 2), axis=0, return_index=True, return_inverse=True)
        return _ascending(x.reshape(-1)[first], codes.reshape(x.shape)) if first.size <= k else None
    from steelyard.kernels.distinct import distinct

    codes = np.empty(x.size, np.int32)
    found = distinct(patterns(x), min(k, max(x.size, 1)), codes)
    return _ascending(found.view(x.dtype), codes.reshape(x.shape)) if found.size <= k else None


def _ascending(codebook: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):  # a signalling NaN warns as it is cast
        sortable = codebook if codebook.dtype.kind in "biufc" else codebook.astype(np.float64)
    order = np.argsort(sortable, kind="stable")
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size, dtype=np.int32)
    return rank[codes], codebook[order]


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    """Every element of `x` moved to the nearest of k centres."""
    if dtype(x.dtype).kind == "complex":
        raise CodecError(f"palette: {x.dtype} with more than k = {k} distinct values; raise k, or split its parts")
    with np.errstate(invalid="ignore"):  # a signalling NaN warns as it is cast
        values = x.reshape(-1).astype(np.float64)
    if not np.isfinite(values).all():
        raise CodecError(f"palette: NaN or infinite among more than k = {k} distinct values; repair them or raise k")
    from steelyard.kernels.kmeans import kmeans_1d

    centres = np.asarray(kmeans_1d(values, k), np.float64)
    codes = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    if dtype(x.dtype).kind != "float":  # a float64 near the largest int64 would overflow it
        centres = np.clip(
            np.rint(centres), None, np.nextafter(float(values.max()), -np.inf) if values.max() >= 2**53 else None
        )
    return centres.astype(x.dtype)[codes].reshape(x.shape)

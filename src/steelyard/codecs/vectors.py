"""Short runs of elements as one index into a codebook of runs, or one codebook for each place: vectors. Lossy.

Exact where there are at most k distinct runs; otherwise each goes to the nearest centre of Lloyd's k-means. Knows
nothing of training. Sources: S. Lloyd, Least squares quantization in PCM, 1982; product codes: H. Jégou et al., Product
quantization for nearest neighbor search, 2011; of weights: Y. Gong et al., Compressing deep convolutional networks
using vector quantization, 2014 (arXiv 1412.6115).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part, patterns, whole
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_ROUNDS = 15  # of Lloyd's iteration at most
_CHUNK = 1 << 15  # runs that are compared with all centres at a time


@dataclass(frozen=True)
class Vectors(Codec):
    """Hold a tensor as ``codes``, a ``codebook`` (books, at most k, width) and, where any are left over, a ``rest``.

    A tensor is looked at as a matrix of its first axis by all else, and each row is cut into runs of `width`
    elements. Codes are (rows, runs), uint8 or above 256 entries uint16. One book serves all runs, or with `product`
    each place in the row has a book of its own. What is left of each row, (rows, fewer than width), is kept as it is.
    Encoding what was decoded changes nothing.

    Args:
        k: the largest number of entries of a book, 1 to 65536.
        width: elements of a run, 1 to 64.
        product: a book for each place.

    >>> parts = Vectors(k=2, width=2).encode(np.float32([1, 2, 0, 0, 1, 2]))
    >>> parts["codebook"].tolist(), parts["codes"].tolist()
    ([[[0.0, 0.0], [1.0, 2.0]]], [[1, 0, 1]])

    Raises CodecError for types other than float32, float16, bfloat16 and float64, and for NaN or infinite values among
    more than k distinct runs.
    """

    k: int = 256
    width: int = 4
    product: bool = False

    name: ClassVar[str] = "vectors"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("codes", "codebook", "rest")
    inner: ClassVar[Mapping[str, Codec]] = {"codes": Bits()}

    def __post_init__(self) -> None:
        whole(self.name, "k", self.k, 1, 1 << 16)
        whole(self.name, "width", self.width, 1, 64)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"codes", "codebook"}``, and ``"rest"`` if anything is left over; see the class."""
        rows, count, left = self._sizes(Spec.like(x))
        flat = np.ascontiguousarray(x).reshape(rows, count * self.width + left)
        runs = flat[:, : count * self.width].reshape(rows, count, self.width)
        together = [runs.reshape(rows * count, self.width)]
        found = [_encoded(own, self.k) for own in (runs.swapaxes(0, 1) if self.product else together)]
        most = max((len(book) for _, book in found), default=0)
        codebook = np.zeros((len(found), most, self.width), x.dtype)
        for held, (_, book) in zip(codebook, found, strict=True):
            held[: len(book)] = book
        codes = np.zeros((rows, count), np.uint8 if most <= 256 else np.uint16)
        for at, (own, _) in enumerate(found):
            codes[:, at : at + 1 if self.product else count] = own.reshape(rows, 1 if self.product else count)
        parts = {"codes": codes, "codebook": codebook}
        return {**parts, "rest": np.ascontiguousarray(flat[:, count * self.width :])} if left else parts

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The runs side by side; raises CodecError for parts of other shapes or an index beyond the codebook."""
        rows, count, left = self._sizes(spec)
        codes = part(parts, "codes", self.name, dtypes=(np.uint8, np.uint16), shape=(rows, count))
        books = count if self.product else 1
        found = parts.get("codebook")
        size = found.shape[1] if found is not None and found.ndim == 3 else 0
        codebook = part(parts, "codebook", self.name, dtypes=(spec.dtype.numpy,), shape=(books, size, self.width))
        if codes.size and int(codes.max()) >= size:
            raise CodecError(f"vectors: index {int(codes.max())} in a codebook of {size}")
        out = blank(spec)
        flat = out.reshape(rows, count * self.width + left)
        if codes.size:
            runs = codebook[np.arange(books), codes] if self.product else codebook[0][codes]
            flat[:, : count * self.width] = runs.reshape(rows, count * self.width)
        if left:
            rest = part(parts, "rest", self.name, dtypes=(spec.dtype.numpy,), shape=(rows, left))
            flat[:, count * self.width :] = rest
        return out

    def _sizes(self, spec: Spec) -> tuple[int, int, int]:
        """Rows, runs of each, and what is left over of each."""
        if spec.dtype.name not in _FLOATS:
            raise CodecError(f"vectors: cannot hold {spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")
        rows = spec.shape[0] if len(spec.shape) > 1 else 1
        each = math.prod(spec.shape[1:]) if len(spec.shape) > 1 else spec.size
        return rows, *divmod(each, self.width)


def _encoded(runs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of each run (n,), and the book."""
    found = _exact(runs, k)
    if found is not None:
        return found
    with np.errstate(all="ignore"):
        wide = runs.astype(np.float64)
        if not np.isfinite(wide).all():
            raise CodecError(f"vectors: NaN or infinite among more than k = {k} distinct runs; repair them or raise k")
        size = float(np.abs(wide).max()) or 1.0  # squares must neither overflow nor vanish
        book = (_lloyd(wide / size, k) * size).astype(runs.dtype)
        codes = _nearest(wide / size, book.astype(np.float64) / size)
    used, codes = np.unique(codes, return_inverse=True)
    return codes.reshape(-1), book[used]


def _exact(runs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and book of at most `k` distinct runs, told apart by their bits; else None."""
    bits = patterns(runs).reshape(runs.shape)
    if len(np.unique(bits[: 4 * k + 4], axis=0)) > k:
        return None
    _, first, codes = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    return (codes.reshape(-1), runs[first]) if len(first) <= k else None


def _lloyd(runs: np.ndarray, k: int) -> np.ndarray:
    """Centres (k, width) of k-means, begun at runs drawn by a fixed seed; one that nothing is near stays."""
    centres = runs[np.sort(np.random.default_rng(len(runs)).choice(len(runs), k, replace=False))].copy()
    before = None
    for _ in range(_ROUNDS):
        codes = _nearest(runs, centres)
        if before is not None and np.array_equal(codes, before):
            break
        before = codes
        counts = np.bincount(codes, minlength=k)
        for j in range(runs.shape[1]):
            sums = np.bincount(codes, runs[:, j], minlength=k)
            centres[:, j] = np.where(counts > 0, sums / np.maximum(counts, 1), centres[:, j])
    return centres


def _nearest(runs: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre of each run."""
    half = np.square(centres).sum(axis=1) / 2
    parts = [np.argmin(half - runs[at : at + _CHUNK] @ centres.T, axis=1) for at in range(0, len(runs), _CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)

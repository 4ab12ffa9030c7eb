"""Lossless entropy coding of any dtype: each symbol takes about as many bits as it is surprising.

Decides how elements become small symbols, which coder holds them, and how a stream is laid out; the choice is
by the real size of each. Knows nothing of what the numbers mean.
Sources: see steelyard.kernels.coder (adaptive) and steelyard.kernels.rans (static); the exponent as a plane of
its own: M. Hershcovitch et al., ZipNN, 2024 (arXiv 2411.05239).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from steelyard.codecs import _planes as planes
from steelyard.codecs._parts import blank, part, patterns
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError


@dataclass(frozen=True)
class Entropy(Codec):
    """Hold a tensor in close to its empirical entropy.

    Booleans and types of up to eight bits are symbols; signed ones are folded first (0, -1, 1, -2, ...).
    Wider types are split into planes of one byte, floats rotated by one bit before, so that the exponent
    is one plane. The part ``stream`` (uint8, one axis) holds for each plane, the lowest first: its length as a
    varint (the last plane takes the rest), and the plane; nothing for a tensor without elements.

    A plane is a byte, coder + 8 * (depth - 1) + 64 * variant with depth the bits of the largest symbol, and:

    - 0 raw: the symbols in `depth` bits each, least significant first;
    - 1 constant: one symbol, nothing if it is 0;
    - 2 adaptive: a range coder that learns; the variants differ in how fast it forgets;
    - 3 contexts: the same with the neighbours in row and column as contexts; a row is what the first axis indexes;
      above one bit of depth, a byte first says which symbol is the usual one;
    - 4 static: frequencies that sum to 2^(8 + 2 * variant), then the words of an rANS coder.

    Args:
        mode: 'auto' takes the smallest; beyond 2^20 bits of symbols it judges by some rows, and takes another
            coder than 'static', the fastest by far, only where that saves 1/200. The others insist, except
            that a plane is kept raw where that is not smaller.

    >>> x = np.zeros(1000, np.bool_)
    >>> x[::50] = True
    >>> stream = Entropy().encode(x)["stream"]
    >>> stream.size < 25, bool((Entropy().decode({"stream": stream}, Spec.like(x)) == x).all())
    (True, True)
    """

    mode: Literal["auto", "adaptive", "contexts", "static"] = "auto"

    name: ClassVar[str] = "entropy"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("stream",)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "adaptive", "contexts", "static"):
            raise CodecError(f"entropy: mode is {self.mode!r}, expected auto, adaptive, contexts or static")

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"stream": uint8}``; see the class."""
        if not x.size:
            return {"stream": np.zeros(0, np.uint8)}
        width = x.size // x.shape[0] if x.ndim > 1 else x.size
        found = [planes.encode(p, width * p.size // x.size, self.mode) for p in _split(x)]
        pieces = [piece for plane in found[:-1] for piece in (planes.varint(len(plane)), plane)]
        return {"stream": np.frombuffer(b"".join([*pieces, found[-1]]), np.uint8).copy()}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError for a stream that is cut off, too long or damaged beyond sense."""
        stream = part(parts, "stream", self.name, dtypes=(np.uint8,))
        out = blank(spec)
        if not spec.size:
            if stream.size:
                raise CodecError(f"entropy: {stream.size} bytes for a tensor without elements")
            return out
        width = spec.size // spec.shape[0] if len(spec.shape) > 1 else spec.size
        count, size = _layout(spec)
        decoded, at = [], 0
        for i in range(count):
            length = stream.size - at
            if i < count - 1:
                length, at = planes.read_varint(stream, at)
            if not 1 <= length <= stream.size - at:
                raise CodecError(f"entropy: plane {i} has {length} bytes, {stream.size - at} are left in the stream")
            decoded.append(planes.decode(stream[at : at + length], size, width * size // spec.size))
            at += length
        return _join(decoded, out, spec)


def _layout(spec: Spec) -> tuple[int, int]:
    """The number of planes, and the symbols in each."""
    width = spec.dtype.numpy.itemsize
    return (width // 2, 2 * spec.size) if spec.dtype.kind == "complex" else (width, spec.size)


def _words(flat: np.ndarray, kind: str) -> np.ndarray:
    """Bit patterns as unsigned words; a complex number is two."""
    return flat.view(f"u{flat.dtype.itemsize // 2}") if kind == "complex" else patterns(flat)


def _split(x: np.ndarray) -> Iterator[np.ndarray]:
    """The planes of symbols (uint8), the lowest first."""
    kind = Spec.like(x).dtype.kind
    words = _words(np.ascontiguousarray(x).reshape(-1), kind)
    bits = 8 * words.dtype.itemsize
    one = words.dtype.type(1)
    if kind == "int":
        words = (words << one) ^ (words.view(f"i{words.dtype.itemsize}") >> (bits - 1)).view(words.dtype)
    elif kind in ("float", "complex") and bits > 8:
        words = (words << one) | (words >> words.dtype.type(bits - 1))
    columns = words.view(np.uint8).reshape(-1, words.dtype.itemsize)
    return (np.ascontiguousarray(columns[:, i]) for i in range(columns.shape[1]))


def _join(decoded: list[np.ndarray], out: np.ndarray, spec: Spec) -> np.ndarray:
    """The inverse of `_split`, into `out`."""
    words = _words(out.reshape(-1), spec.dtype.kind)
    columns = words.view(np.uint8).reshape(-1, words.dtype.itemsize)
    for i, plane in enumerate(decoded):
        columns[:, i] = plane
    bits, one = 8 * words.dtype.itemsize, words.dtype.type(1)
    if spec.dtype.kind == "bool" and words.max() > 1:
        raise CodecError("entropy: a symbol beyond 1 in a stream of booleans")
    if spec.dtype.kind == "int":
        words[:] = (words >> one) ^ (~(words & one) + one)
    elif spec.dtype.kind in ("float", "complex") and bits > 8:
        words[:] = (words >> one) | (words << words.dtype.type(bits - 1))
    return out

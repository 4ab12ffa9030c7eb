"""What the block types of GGML share: a tensor is rows of blocks, each of a few bytes for a fixed number of elements.

Decides how a tensor is cut into blocks and what such a codec refuses. Knows nothing of what is in a block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

FLOATS = ("float32", "float16", "bfloat16", "float64")
AT_ONCE = 1 << 17  # elements that are worked on together: what stays in the cache of a processor
# the levels of iq4_nl and iq4_xs
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Blocks(Codec):
    """A codec whose one part, ``blocks`` (uint8, (blocks, width)), holds `block` elements in `width` bytes each.

    Blocks lie along the last axis, whose length must be a multiple of `block`. The arithmetic is float32, as
    in GGML; other floating-point tensors are rounded to it and back.
    """

    lossless: ClassVar[bool] = False
    settled: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("blocks",)
    block: ClassVar[int]  # elements
    width: ClassVar[int]  # bytes

    def pack_blocks(self, _x: np.ndarray, /) -> np.ndarray:
        """The blocks (n, width) uint8 of elements (n, block) float32, which are finite; only where it `encodes`."""
        raise self._unwritten()

    @abstractmethod
    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """The elements (n, block) float32 of blocks (n, width) uint8."""

    @property
    def kind(self) -> str:
        """The name of the block type."""
        return self.name

    def _unwritten(self) -> CodecError:
        return unwritten(self.kind)

    def count(self, spec: Spec) -> int:
        """The number of blocks of a tensor; raises CodecError for one that has none."""
        return blocks_of(spec, self.kind, self.block)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"blocks": uint8 (blocks, width)}``; raises CodecError for NaN, infinities and broken rows."""
        if not self.encodes:
            raise self._unwritten()
        spec = Spec.like(x)
        n = self.count(spec)
        raw = np.empty((n, self.width), np.uint8)
        with np.errstate(all="ignore"):
            flat = np.ascontiguousarray(x).reshape(n, self.block)
            step = max(1, AT_ONCE // self.block)
            for at in range(0, n, step):
                some = flat[at : at + step].astype(np.float32, copy=False)
                if not np.isfinite(some).all():
                    raise CodecError(
                        f"{self.name}: holds no NaN, no infinity and nothing beyond float32; leave it plain"
                    )
                raw[at : at + step] = self.pack_blocks(some)
        return {"blocks": raw}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError for parts that do not fit it."""
        n = self.count(spec)
        raw = part(parts, "blocks", self.name, dtypes=(np.uint8,), shape=(n, self.width))
        out = blank(spec)
        flat = out.reshape(n, self.block)
        step = max(1, AT_ONCE // self.block)
        with np.errstate(all="ignore"):
            for at in range(0, n, step):
                flat[at : at + step] = self.unpack_blocks(raw[at : at + step])
        return out


def unwritten(kind: str) -> CodecError:
    """The error for blocks that are decoded only."""
    other = "q8_0, q4_0, q4_k, q6_k or another" if kind != "mxfp4" else "floatgrid(grid=e2m1, block=32, scales=e8m0)"
    return CodecError(f"{kind}: blocks of GGML that are read here and not written; encode as {other}")


def blocks_of(spec: Spec, name: str, block: int) -> int:
    """How many blocks of so many elements a tensor has; raises CodecError where its rows are not whole blocks."""
    if spec.dtype.name not in FLOATS:
        raise CodecError(f"{name}: holds {', '.join(FLOATS)}, not {spec.dtype}")
    if not spec.shape or spec.shape[-1] % block:
        found = spec.shape[-1] if spec.shape else "no axis"
        raise CodecError(f"{name}: expected a last axis of a multiple of {block}, found {found}; leave {spec} plain")
    return spec.size // block


def half(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 (n, 1)."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def to_half(scale: np.ndarray, name: str) -> np.ndarray:
    """`scale` (n, 1) float32 as the bytes (n, 2) of a float16; raises CodecError where that overflows."""
    rounded = scale.astype("<f2")
    if not np.isfinite(rounded).all():
        raise CodecError(f"{name}: a scale of {float(np.abs(scale).max()):.3g} is beyond float16; leave it plain")
    return rounded.view(np.uint8)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where there is no such float32."""
    found = np.float32(1) / scale
    return np.where(np.isfinite(found), found, np.float32(0))


def nibbles(raw: np.ndarray, run: int) -> np.ndarray:
    """The halves of bytes (n, k): first the low ones of `run` bytes, then their high ones, and so on; (n, 2k) uint8."""
    groups = raw.reshape(len(raw), -1, 1, run)
    both = np.empty((len(raw), groups.shape[1], 2, run), np.uint8)
    np.bitwise_and(groups[:, :, 0], 15, out=both[:, :, 0])
    np.right_shift(groups[:, :, 0], 4, out=both[:, :, 1])
    return both.reshape(len(raw), -1)


def to_nibbles(codes: np.ndarray, run: int) -> np.ndarray:
    """The inverse of `nibbles`: codes (n, 2k) below 16 as bytes (n, k)."""
    groups = codes.reshape(len(codes), -1, 2, run)
    return np.asarray((groups[:, :, 0] | groups[:, :, 1] << 4).reshape(len(codes), -1))


def bit_planes(raw: np.ndarray, run: int, width: int) -> np.ndarray:
    """Fields of `width` bits: of `run` bytes the lowest field of each, then the next, and so on; (n, k*8/width)."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = raw.reshape(len(raw), -1, 1, run) >> shifts & np.uint8((1 << width) - 1)
    return np.asarray(fields.reshape(len(raw), -1))


def to_bit_planes(codes: np.ndarray, run: int, width: int) -> np.ndarray:
    """The inverse of `bit_planes`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    shifted = codes.reshape(len(codes), -1, 8 // width, run) << shifts
    return np.asarray(np.bitwise_or.reduce(shifted, axis=2).reshape(len(codes), -1))

"""Levels that lie as those of a small float do, in blocks with a scale each: nf4, fp8, mxfp4, nvfp4. Lossy.

Decides scales from the largest magnitude of each block. Knows nothing of calibration data.
Sources: nf4: T. Dettmers et al., QLoRA, NeurIPS 2023 (arXiv 2305.14314), appendix E; fp8: P. Micikevicius et al., FP8
Formats for Deep Learning, 2022 (arXiv 2209.05433); blocks with powers of two: OCP Microscaling Formats (MX) 1.0, 2023;
blocks of 16 with e4m3 scales: NVIDIA, NVFP4, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np

from steelyard.codecs._parts import blank, part, whole
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec, dtype
from steelyard.errors import CodecError

Grid = Literal["nf4", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]
_FLOATS = ("float32", "float16", "bfloat16", "float64")
ROUNDS = 64  # of settling; two are usual
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TYPES = {
    "e2m1": ("float4_e2m1fn", 4),
    "e2m3": ("float6_e2m3fn", 6),
    "e3m2": ("float6_e3m2fn", 6),
    "e4m3": ("float8_e4m3fn", 8),
    "e5m2": ("float8_e5m2", 8),
}


@dataclass(frozen=True)
class FloatGrid(Codec):
    """Hold a tensor as ``codes`` (uint8, its shape), one ``scale`` for each block, and for e4m3 scales ``tensor``.

    x = level(code) * scale (* tensor), in float64, rounded once. A level is a value of the type that `grid` names, its
    code the bits of it; of nf4 the 16 quantiles of a normal distribution. The nearest level is taken, the smaller of
    two. Scales are

    - ``float32``: the largest magnitude of the block over the largest level;
    - ``e8m0``: uint8, 2^(scale - 127): the least power of two by which the largest magnitude is at most half the last
      step above the largest level, so that none loses more by becoming that than by rounding (MX advises the exponent
      of the largest level, with up to a third less; nf4, whose levels end at 1, would lose half);
    - ``e4m3``: uint8, the bits of a float8_e4m3fn, in units of ``tensor``, a power of two (float32).

    Args:
        grid: nf4, e2m1 (4 bits), e2m3, e3m2 (6 bits), e4m3 or e5m2 (8 bits).
        block: consecutive elements of the last axis that share a scale; None: all of the tensor.
        scales: how they are held.

    ``FloatGrid("e2m1", 32, "e8m0")`` is mxfp4, ``FloatGrid("e2m1", 16, "e4m3")`` is nvfp4.

    >>> parts = FloatGrid("e2m1", 4).encode(np.float32([6, -3, 0.4, 0, 12, 12, 1, 2]))
    >>> parts["scale"].tolist(), parts["codes"].tolist()
    ([1.0, 2.0], [7, 13, 1, 0, 7, 7, 1, 2])

    Raises CodecError for NaN, infinities and types other than float32, float16, bfloat16 and float64.
    """

    grid: Grid = "nf4"
    block: int | None = 64
    scales: Literal["float32", "e8m0", "e4m3"] = "float32"

    name: ClassVar[str] = "floatgrid"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "tensor")
    inner: ClassVar[Mapping[str, Codec]] = {"codes": Bits()}

    def __post_init__(self) -> None:
        if self.grid not in ("nf4", *_TYPES):
            raise CodecError(f"floatgrid: there is no grid {self.grid!r}; known are nf4, {', '.join(_TYPES)}")
        if self.scales not in ("float32", "e8m0", "e4m3"):
            raise CodecError(f"floatgrid: scales are float32, e8m0 or e4m3, not {self.scales!r}")
        if self.block is not None:
            whole(self.name, "block", self.block, 1)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"codes", "scale"}``, with e4m3 scales ``"tensor"`` too; see the class."""
        spec = Spec.like(x)
        shape = self._scales(spec)
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            if not np.isfinite(wide).all():
                raise CodecError("floatgrid: NaN or infinite values have no level; repair or clip them")
            parts, scale = self._settled(self._reduce(np.abs(wide), shape), spec)
            return {"codes": self._codes(wide, self._spread(scale, x.shape)), **parts}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The rounded tensor; raises CodecError for parts of other shapes or codes that are no level."""
        shape = self._scales(spec)
        codes = part(parts, "codes", self.name, dtypes=(np.uint8,), shape=spec.shape)
        held = np.float32 if self.scales == "float32" else np.uint8
        scale = part(parts, "scale", self.name, dtypes=(held,), shape=shape)
        unit = 1.0
        if self.scales == "e4m3":
            unit = float(part(parts, "tensor", self.name, dtypes=(np.float32,), shape=()))
        if not codes.size:
            return blank(spec)
        table = _levels(self.grid)
        if int(codes.max()) >= table.size or np.isnan(table[codes]).any():
            raise CodecError(f"floatgrid: a code is no level of {self.grid}")
        with np.errstate(all="ignore"):
            wide = table[codes] * self._spread(self._values(scale, unit), spec.shape)
            return _placed(wide, spec)

    def _codes(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The codes of the nearest levels; that of zero where the scale is zero."""
        codes = _nearest(x / np.where(scale > 0, scale, 1), self.grid)
        return np.where(scale > 0, codes, _zero(self.grid)).astype(np.uint8)

    def _settled(self, most: np.ndarray, spec: Spec) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Scales that are also those of what is decoded with them: the magnitudes only ever shrink, so it ends."""
        parts, scale = self._scaled(most)
        for _ in range(ROUNDS):
            decoded = _placed(_levels(self.grid)[self._codes(most, scale)] * scale, spec).astype(np.float64)
            again, new = self._scaled(np.abs(decoded))
            if np.array_equal(new, scale):
                break
            parts, scale = again, new
        return parts, scale

    def _scaled(self, most: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The parts that hold scales for the largest magnitudes, and the scales, float64."""
        top = float(np.nanmax(_levels(self.grid)))
        if self.scales == "e8m0":
            exponent = np.frexp(most)[1] - math.frexp(top)[1]  # by which the two have one exponent
            exponent += np.ldexp(most, -exponent) > _limit(self.grid)
            held = np.where(most > 0, np.clip(exponent + 127, 1, 254), 0).astype(np.uint8)
            return {"scale": held}, self._values(held, 1.0)
        if self.scales == "e4m3":
            largest = float(most.max(initial=0.0))
            power = min(max(math.frexp(largest / (448.0 * top))[1], -126), 127) if largest > 0 else 0
            unit = math.ldexp(1.0, power)
            held = np.minimum(most / (top * unit), 448).astype(dtype("float8_e4m3fn").numpy).view(np.uint8)
            held = held.reshape(most.shape)
            return {"scale": held, "tensor": np.array(unit, np.float32)}, self._values(held, unit)
        held = np.minimum(most / top, 2.0**127)
        held = np.where(held < 2.0**-126, 0, held).astype(np.float32)
        return {"scale": held}, held.astype(np.float64)

    def _values(self, scale: np.ndarray, unit: float) -> np.ndarray:
        """Scales as they are held, as float64."""
        if self.scales == "e8m0":
            return np.where(scale > 0, np.ldexp(1.0, scale.astype(np.int32) - 127), 0.0)
        if self.scales == "e4m3":
            return np.asarray(scale.view(dtype("float8_e4m3fn").numpy).astype(np.float64) * unit)
        return scale.astype(np.float64)

    def _scales(self, spec: Spec) -> tuple[int, ...]:
        """The shape of scale; raises CodecError for a type that it cannot hold."""
        if spec.dtype.name not in _FLOATS:
            raise CodecError(f"floatgrid: cannot hold {spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")
        if self.block is None or not spec.shape:
            return ()
        return (*spec.shape[:-1], -(-spec.shape[-1] // self.block))

    def _reduce(self, size: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The largest of each block."""
        if not size.size:
            return np.zeros(shape)
        if not shape:
            return np.asarray(size.max())
        return np.asarray(np.maximum.reduceat(size, list(range(0, size.shape[-1], self.block or 1)), axis=-1))

    def _spread(self, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One number for each block to one for each element."""
        if self.block is None or not shape:
            return scale
        if self.block >= shape[-1]:
            return scale
        return np.asarray(np.repeat(scale, self.block, axis=-1)[..., : shape[-1]])


@cache
def _levels(grid: str) -> np.ndarray:
    """The level of each code; NaN where a code is none. Read only."""
    if grid == "nf4":
        found = np.array(_NF4)
    else:
        name, bits = _TYPES[grid]
        found = np.arange(1 << bits, dtype=np.uint8).view(dtype(name).numpy).astype(np.float64)
        found[np.isinf(found)] = np.nan
    found.flags.writeable = False
    return found


@cache
def _limit(grid: str) -> float:
    """The largest magnitude that becomes the largest level: half the last step above it.

    Half of what is larger must be held by a level of which twice is larger, too, so that its scale is found again.
    """
    sizes = np.unique(np.abs(_levels(grid)[~np.isnan(_levels(grid))]))
    before, top = sizes[-2:]
    upper = sizes[sizes > top / 2].min()
    return float(min(top + (top - before) / 2, 2 * upper * (1 - 2.0**-7)))


def _zero(grid: str) -> int:
    return int(np.flatnonzero(_levels(grid) == 0)[0])


@cache
def _sorted(grid: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes in the order of their levels, one for each level, and what lies halfway between."""
    levels = _levels(grid)
    _, codes = np.unique(levels, return_index=True)  # 0 and -0 are one; NaN come last
    codes = codes[~np.isnan(levels[codes])]
    return codes, (levels[codes][1:] + levels[codes][:-1]) / 2


def _nearest(x: np.ndarray, grid: str) -> np.ndarray:
    codes, between = _sorted(grid)
    return np.asarray(codes[np.searchsorted(between, x)])


def _placed(wide: np.ndarray, spec: Spec) -> np.ndarray:
    """Rounded to the dtype, and kept within its finite values."""
    most = 2.0**128 - 2.0**120 if spec.dtype.name == "bfloat16" else float(np.finfo(spec.dtype.numpy).max)
    return np.asarray(np.clip(wide, -most, most).astype(spec.dtype.numpy))

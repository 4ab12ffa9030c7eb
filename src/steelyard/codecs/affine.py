"""Uniform levels: each element becomes a whole number of steps from a zero point. Lossy.

Decides how steps are chosen (from the largest magnitude, or the range) and shared (tensor, channel, group).
Knows nothing of calibration data. Encoding what was decoded gives the same values again, bit for bit.
Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, CVPR 2018 (arXiv 1712.05877); one bit: M. Rastegari et al., XNOR-Net, ECCV 2016 (arXiv 1603.05279).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part, whole
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

PART = 1 << 20  # elements that are wide at a time
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_FAINT = 2.0**-1000  # a float64 step below this would lose bits as a subnormal: such values become the zero point


@dataclass(frozen=True)
class Affine(Codec):
    """Round to the nearest of 2^bits - 1 symmetric levels around 0, or of 2^bits levels from minimum to maximum.

    Symmetric: x = (code - q) * scale with q = 2^(bits-1) - 1 and scale = max|x| / q; one bit: x = ±scale with
    scale = mean|x|. Not symmetric: x = zero + code * scale with zero = min(x), scale = (max - min) / (2^bits - 1).
    The arithmetic is float64, rounded once to the dtype of x.

    Parts: ``codes`` (uint8, the shape of x), ``scale`` (float32, or float64 where that would not hold it;
    one for the tensor, for each index of `axis`, or for each group along the last axis) and, if not symmetric,
    ``zero`` (the dtype of x, the shape of scale).

    Args:
        bits: 1 to 8.
        symmetric: whether 0 is a level (two to eight bits) and no zero point is kept.
        axis: one scale for each index along this axis; None: one for all.
        group: one scale for this many consecutive elements along the last axis; the last group may be shorter.

    >>> parts = Affine(bits=4).encode(np.float32([-7, 3.4, 0]))
    >>> parts["codes"], parts["scale"]
    (array([ 0, 10,  7], dtype=uint8), array(1., dtype=float32))

    Raises CodecError for NaN, infinities and types other than float32, float16, bfloat16 and float64.
    """

    bits: int = 8
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None

    name: ClassVar[str] = "affine"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")
    inner: ClassVar[Mapping[str, Codec]] = {"codes": Bits()}

    def __post_init__(self) -> None:
        whole(self.name, "bits", self.bits, 1, 8)
        if self.axis is not None and self.group is not None:
            raise CodecError("affine: axis and group exclude each other; groups lie along the last axis")
        if self.group is not None:
            whole(self.name, "group", self.group, 1)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"codes", "scale"}``, and ``"zero"`` if not symmetric; see the class."""
        spec = Spec.like(x)
        shape = _Sharing(self, spec).shape
        if not x.size:
            parts: dict[str, np.ndarray] = {"codes": np.zeros(x.shape, np.uint8), "scale": np.zeros(shape, np.float32)}
            return parts if self.symmetric else {**parts, "zero": np.zeros(shape, x.dtype)}
        with np.errstate(all="ignore"):
            return self._symmetric(x, spec) if self.symmetric else self._between(x, spec)

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The rounded tensor; raises CodecError for parts of other shapes or a code beyond the levels."""
        sharing = _Sharing(self, spec)
        codes = part(parts, "codes", self.name, dtypes=(np.uint8,), shape=spec.shape)
        scale = part(parts, "scale", self.name, dtypes=(np.float32, np.float64), shape=sharing.shape)
        zero = None
        if not self.symmetric:
            zero = part(parts, "zero", self.name, dtypes=(spec.dtype.numpy,), shape=sharing.shape)
        if not codes.size:
            return blank(spec)
        if int(codes.max()) > self._top:
            raise CodecError(f"affine: code {int(codes.max())} beyond the {self._top + 1} levels of {self.bits} bits")
        with np.errstate(all="ignore"):
            return self._values(codes, scale, zero, spec, sharing)

    @property
    def _top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - (2 if self.symmetric and self.bits > 1 else 1)

    def _levels(self, codes: np.ndarray) -> np.ndarray:
        """Codes as whole numbers of steps, float64."""
        if not self.symmetric:
            return codes.astype(np.float64)
        return np.asarray(2.0 * codes - 1 if self.bits == 1 else codes - (self._top / 2))

    def _values(
        self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, spec: Spec, sharing: _Sharing
    ) -> np.ndarray:
        if sharing.one:  # one table of levels serves every element
            table = _placed(self._levels(np.arange(self._top + 1, dtype=np.uint8)), scale, zero, spec)
            return np.asarray(table[codes])
        out = np.empty(spec.shape, spec.dtype.numpy)
        for some in _parts(spec.shape):
            start = None if zero is None else sharing.spread(zero, some)
            out[some] = _placed(self._levels(codes[some]), sharing.spread(scale, some), start, spec)
        return out

    def _symmetric(self, x: np.ndarray, spec: Spec) -> dict[str, np.ndarray]:
        sharing = _Sharing(self, spec)
        if self.bits == 1:
            size = np.abs(x.astype(np.float64))
            most = _checked(sharing.reduce(np.maximum, size))
            least = sharing.reduce(np.minimum, size)
            mean = sharing.reduce(np.add, size / 2**12) / sharing.count * 2**12  # the sum must not overflow
            scale = np.where(least == most, most, np.minimum(mean, most))
            scale = _stored(
                _placed(1.0, scale, None, spec).astype(np.float64)
            )  # where it rounds to 0, -0.0 may not come
            return {"codes": ((x >= 0) | (sharing.spread(scale) == 0)).astype(np.uint8), "scale": scale}
        most = _checked(sharing.largest(x))
        top = self._top // 2
        scale = _settled(most / top, lambda s: np.abs(_placed(float(top), s, None, spec)).astype(np.float64) / top)
        codes = np.empty(x.shape, np.uint8)
        for some in _parts(x.shape):  # so that the memory for wide numbers does not grow with the tensor
            step = sharing.spread(scale, some)
            steps = np.rint(x[some].astype(np.float64) / np.where(step > 0, step, 1))
            codes[some] = np.clip(steps, -top, top) + top
        return {"codes": codes, "scale": scale}

    def _between(self, x: np.ndarray, spec: Spec) -> dict[str, np.ndarray]:
        sharing = _Sharing(self, spec)
        wide = x.astype(np.float64)
        low, high = _checked(sharing.reduce(np.minimum, wide)), _checked(sharing.reduce(np.maximum, wide))
        zero, top = low.astype(x.dtype), float(self._top)

        def steps_to(end: np.ndarray) -> np.ndarray:
            return _checked((end / 2 - low / 2) / top * 2)  # halves: the distance of two large numbers may overflow

        scale = _settled(steps_to(high), lambda s: steps_to(_placed(top, s, zero, spec).astype(np.float64)))
        start, step = sharing.spread(zero).astype(np.float64), sharing.spread(scale)
        # what is decoded is the number of the type nearest to a level, so no farther from it than x was: it goes
        # back to the same code
        codes = np.clip(np.rint((wide / 2 - start / 2) / np.where(step > 0, step / 2, 1)), 0, top)
        return {"codes": codes.astype(np.uint8), "scale": scale, "zero": zero}


@dataclass(frozen=True)
class _Sharing:
    """Which elements share a scale."""

    codec: Affine
    spec: Spec

    def __post_init__(self) -> None:
        axis, rank = self.codec.axis, len(self.spec.shape)
        if self.spec.dtype.name not in _FLOATS:
            raise CodecError(f"affine: cannot hold {self.spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")
        if axis is not None and not -rank <= axis < rank:
            raise CodecError(
                f"affine: axis {axis} of a tensor with {rank} axes; give one from {-rank} to {rank - 1}, "
                "or choose others (where, or --where)"
            )

    @property
    def one(self) -> bool:
        """Whether all elements do."""
        return self.codec.axis is None and (self.codec.group is None or not self.spec.shape)

    @property
    def group(self) -> int:
        """How long a group is in this tensor; a file may say of one that it is far longer than the axis."""
        return min(self.codec.group or 1, max(1, self.spec.shape[-1]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of scale."""
        if self.one:
            return ()
        if self.codec.axis is not None:
            return (self.spec.shape[self.codec.axis],)
        return (*self.spec.shape[:-1], -(-self.spec.shape[-1] // self.group))

    @property
    def count(self) -> np.ndarray:
        """How many elements share each scale; broadcasts against it."""
        if self.codec.group is None or self.one:
            return np.array(self.spec.size / max(1, int(np.prod(self.shape))))
        starts = np.arange(self.shape[-1]) * self.group
        return np.minimum(self.group, self.spec.shape[-1] - starts)

    def reduce(self, by: np.ufunc, x: np.ndarray) -> np.ndarray:
        """`x` of the tensor's shape to one number for each scale."""
        if self.one:
            return np.asarray(by.reduce(x, axis=None))
        if self.codec.axis is not None:
            rows = np.moveaxis(x, self.codec.axis, 0).reshape(x.shape[self.codec.axis], -1)
            return np.asarray(by.reduce(rows, axis=1))
        return np.asarray(by.reduceat(x, np.arange(self.shape[-1]) * self.group, axis=-1))

    def largest(self, x: np.ndarray) -> np.ndarray:
        """The largest magnitude of each scale, float64."""
        wide = np.float64 if x.dtype.itemsize > 2 else np.float32  # numpy compares short floats slowly
        found = []
        for some in _parts(x.shape):
            part = x[some].astype(wide)
            found.append(np.maximum(self.reduce(np.maximum, part), -self.reduce(np.minimum, part)))
        apart = not self.one and x.ndim > 1 and (self.codec.axis is None or self.codec.axis % x.ndim == 0)
        joined = np.concatenate(found) if apart else np.maximum.reduce(found)
        return np.asarray(joined, np.float64)

    def spread(self, values: np.ndarray, some: slice | EllipsisType = ...) -> np.ndarray:
        """One number for each scale to an array that broadcasts against the tensor, or some of its first axis."""
        if self.one:
            return values
        if self.codec.axis is not None:
            place = [1] * len(self.spec.shape)
            place[self.codec.axis] = -1
            values = values.reshape(place)
            return values[some] if len(values) > 1 else values
        if values.ndim > 1:
            values = values[some]
        spread: np.ndarray = np.repeat(values, self.group, axis=-1)
        return np.asarray(spread[..., : self.spec.shape[-1]])


def _parts(shape: tuple[int, ...]) -> list[slice] | list[EllipsisType]:
    """What to look at together: some indices of the first axis; a tensor of fewer than two axes as a whole."""
    if len(shape) < 2:
        return [...]
    rows = max(1, PART // max(1, math.prod(shape[1:])))
    return [slice(at, at + rows) for at in range(0, shape[0], rows)]


def _placed(levels: np.ndarray | float, scale: np.ndarray, zero: np.ndarray | None, spec: Spec) -> np.ndarray:
    """zero + levels * scale in float64, rounded to the dtype, and kept within its finite values."""
    wide = np.asarray(levels * scale.astype(np.float64))
    if zero is not None:
        wide = zero.astype(np.float64) + wide
    most = float(np.finfo(spec.dtype.numpy).max if spec.dtype.name != "bfloat16" else 2.0**128 - 2.0**120)
    return np.asarray(np.clip(wide, -most, most).astype(spec.dtype.numpy))


def _checked(reduced: np.ndarray) -> np.ndarray:
    if not np.isfinite(reduced).all():
        raise CodecError("affine: NaN, infinite or too far apart values have no uniform levels; repair or clip them")
    return reduced


def _stored(scale: np.ndarray) -> np.ndarray:
    """`scale` as float32, or as float64 where float32 would underflow or overflow; a faint one becomes 0."""
    scale = np.where(scale < _FAINT, 0.0, scale)
    narrow = np.finfo(np.float32)
    fits = np.all((scale == 0) | ((scale >= narrow.tiny) & (scale <= narrow.max)))
    return np.asarray(scale.astype(np.float32) if fits else scale)


def _settled(scale: np.ndarray, again: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The scale that `again`, the scale computed from the decoded extremes, leaves unchanged.

    Storing and decoding are monotone, so the sequence is monotone, bounded, and ends; mostly at once.
    """
    stored = _stored(scale)
    while True:
        new = _stored(again(stored))
        if np.array_equal(new, stored):
            return stored
        stored = new

"""Small whole multiples of one step, most of them zero: the weights of a net that was trained to be coded. Lossless.

Decides how the step is found and told, and which way of coding is smallest. Knows nothing of how a net comes to have
such weights. Sources: see steelyard.kernels.multiples; what is coded follows DeepCABAC (S. Wiedemann et al., 2019,
arXiv 1907.11900): zero or not, sign, magnitude, each from what is near it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

MOST = 255  # the largest multiple
THOROUGH = 1 << 20  # elements up to which every period is tried
_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Multiples(Codec):
    """Hold x = step * k, k whole and at most 255 in magnitude: the step is the greatest one that there is.

    Made for matrices and filters in which most k are 0; a row (first axis) or a column (all others) of zeros takes a
    fraction of a bit, and what a number costs follows the share of zeros in its row and its column, and its
    neighbours. The part ``stream`` (uint8, one axis) is empty for a tensor of zeros. Else its first byte is
    bytes of the step - 1 + 8 * (whether columns are flagged) + 16 * (which of the divisors of a row's length, from the
    least, is the distance at which numbers are neighbours too, as the lines of an image in a row are; 0: none); then
    the step, a big-endian float32 (at most 4 bytes) or float64 without the zero bytes at its end; then the numbers.

    >>> x = np.float32([[0, 0.5], [-1.5, 0]])
    >>> parts = Multiples().encode(x)
    >>> bool((Multiples().decode(parts, Spec.like(x)) == x).all())
    True

    Raises CodecError for NaN, infinities, negative zeros, types that are not float32, float16, bfloat16 or float64,
    and where no step makes all multiples small: round to a step first.
    """

    name: ClassVar[str] = "multiples"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("stream",)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"stream": uint8}``; see the class."""
        step, numbers = step_of(x)
        if not step:
            return {"stream": np.zeros(0, np.uint8)}
        told = _told(step)
        tried = range(len(_periods(x.shape)) if x.size <= THOROUGH else 1)
        best = min((_coded(numbers, flags, at) for flags in (0, 1) for at in tried), key=len)
        head = bytes([best[0] | len(told) - 1])
        return {"stream": np.frombuffer(head + told + best[1:], np.uint8).copy()}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError for a stream that is cut off, too long or damaged beyond sense."""
        stream = part(parts, "stream", self.name, dtypes=(np.uint8,))
        if not stream.size:
            return blank(spec)
        if spec.dtype.name not in _FLOATS or not spec.size:
            raise CodecError(f"multiples: {stream.size} bytes for {spec}, which has none")
        count, periods = int(stream[0] & 7) + 1, _periods(spec.shape)
        told, body = stream[1 : 1 + count].tobytes(), np.ascontiguousarray(stream[1 + count :])
        if len(told) < count or stream[0] >> 4 >= len(periods):
            raise CodecError("multiples: the stream ends within the step, or its first byte fits no such shape")
        width = 4 if count <= 4 else 8
        step = float(np.frombuffer(told.ljust(width, b"\0"), f">f{width}")[0])
        if not 0 < step < np.inf:
            raise CodecError(f"multiples: the step is {step}")
        numbers = np.zeros(spec.shape, np.int32)
        if _run(numbers, bool(stream[0] & 8), periods[stream[0] >> 4], body, decoding=True) < 0:
            raise CodecError(f"multiples: {body.size} bytes are too few or too many for {spec.size} numbers")
        with np.errstate(over="ignore"):
            return np.asarray((numbers * step).astype(spec.dtype.numpy))


def step_of(x: np.ndarray) -> tuple[float, np.ndarray]:
    """The greatest step of which all elements are whole multiples, and the multiples (int32); 0 for zeros alone.

    Raises CodecError if there is none of which they are small multiples.

    >>> step_of(np.float32([0.75, 0, -0.25]))
    (0.25, array([ 3,  0, -1], dtype=int32))
    """
    name = Spec.like(x).dtype.name
    if name not in _FLOATS:
        raise CodecError(f"multiples: {name} is not held; cast to float32 first")
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    if not np.isfinite(wide).all() or (np.signbit(wide) & (wide == 0)).any():
        raise CodecError("multiples: NaN, infinite values and negative zeros are no multiples of a step; repair them")
    values = wide[wide != 0]
    if not values.size:
        return 0.0, np.zeros(x.shape, np.int32)
    unit = float(np.abs(values).min())
    fraction, exponent = np.frexp(values)
    whole = np.abs(fraction * 2.0**53).astype(np.int64)
    low = whole & -whole  # the lowest bit of each
    least = int((exponent + np.frexp(low.astype(np.float64))[1]).min()) - 54  # 2^least divides everything
    if int(exponent.max()) - least > 62:
        raise CodecError(f"multiples: values from {unit:g} to {np.abs(values).max():g} share no step; round them first")
    common = int(np.gcd.reduce((np.abs(values) / 2.0**least).astype(np.int64)))
    step = common * 2.0**least
    if np.abs(values).max() / step > MOST:
        most = np.abs(values).max() / step
        raise CodecError(
            f"multiples: values are up to {most:.0f} times their step, at most {MOST} are held; round them"
        )
    return step, np.asarray(np.rint(wide / step)).astype(np.int32).reshape(x.shape)


def costs(numbers: np.ndarray) -> np.ndarray:
    """What each whole number costs in the stream, and what the one nearer to 0 would: bits, (2, *numbers.shape).

    The coder learns as it goes: this is what it pays at that place after all before it, with the way of coding that
    is smallest. A row or column that vanishes saves a little more.
    """
    numbers = np.ascontiguousarray(numbers, np.int32)
    at = range(len(_periods(numbers.shape)) if numbers.size <= THOROUGH else 1)
    best = min((_coded(numbers, flags, i) for flags in (0, 1) for i in at), key=len)
    found = np.zeros((numbers.size, 2))
    room = np.zeros(len(best) + 8, np.uint8)
    _run(numbers, bool(best[0] & 8), _periods(numbers.shape)[best[0] >> 4], room, decoding=False, costs=found)
    return np.ascontiguousarray(found.T).reshape(2, *numbers.shape)


def _periods(shape: tuple[int, ...]) -> list[int]:
    """Distances at which numbers in a row may be neighbours: none, and up to 15 divisors of its length."""
    width = _width(shape)
    return [0, *[d for d in range(2, min(width, 512)) if width % d == 0][:15]]


def _width(shape: tuple[int, ...]) -> int:
    """The length of a row; a tensor of one axis is one row."""
    size = int(np.prod(shape, dtype=np.int64))
    return size // shape[0] if len(shape) > 1 and shape[0] else max(size, 1)


def _coded(numbers: np.ndarray, flags: int, at: int) -> bytes:
    """A head without the length of the step, and the coded numbers."""
    room = max(64, numbers.size // 8)
    while True:
        buffer = np.zeros(room, np.uint8)
        used = _run(numbers, bool(flags), _periods(numbers.shape)[at], buffer, decoding=False)
        if used >= 0:
            return bytes([8 * flags | 16 * at]) + buffer[:used].tobytes()
        room *= 4


def _run(
    numbers: np.ndarray,
    flags: bool,
    period: int,
    buffer: np.ndarray,
    *,
    decoding: bool,
    costs: np.ndarray | None = None,
) -> int:
    """Code `numbers` into `buffer` or decode them from it; the bytes used, or -1."""
    from steelyard.kernels.coder import tables
    from steelyard.kernels.multiples import code_multiples

    none = np.zeros((0, 2)) if costs is None else costs
    flat, width = numbers.reshape(-1), _width(numbers.shape)
    return int(code_multiples(flat, width, period, flags, buffer, *tables(), decoding, none))


def _told(step: float) -> bytes:
    """The step as in a stream."""
    with np.errstate(all="ignore"):
        narrow = np.float32(step)
    wide = np.array(step, ">f8") if float(narrow) != step or narrow < np.finfo(np.float32).tiny else None
    if wide is None:
        return np.array(narrow, ">f4").tobytes().rstrip(b"\0")
    return wide.tobytes().rstrip(b"\0").ljust(5, b"\0")

"""Whole numbers and booleans in as few bits as their range needs. Lossless; knows nothing of frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, part
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec, dtype
from steelyard.errors import CodecError

_OFFSET = 0x80  # flag in the first byte: an offset follows


@dataclass(frozen=True)
class Bits(Codec):
    """Hold integers as x - min(x) in w = bit_length(max(x) - min(x)) bits each.

    The part ``stream`` (uint8, one axis) is: one byte, w (0 to 64) plus 128 if min(x) is not zero; then
    min(x), if it is not zero, as a zigzag varint; then ceil(n * w / 8) bytes of numbers, least significant
    bit first.

    >>> x = np.int16([1000, 1003, 1001])
    >>> stream = Bits().encode(x)["stream"]
    >>> stream.size  # one for the width, two for the offset, 3 x 2 bits
    4
    >>> Bits().decode({"stream": stream}, Spec.like(x))
    array([1000, 1003, 1001], dtype=int16)

    Raises CodecError for tensors that are not integers or booleans.
    """

    name: ClassVar[str] = "bits"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("stream",)

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"stream": uint8}``; see the class."""
        found = dtype(x.dtype)
        if found.kind not in ("int", "uint", "bool"):
            raise CodecError(f"bits: holds integers and booleans, not {found}; use entropy for {found}")
        plain = _whole(np.ascontiguousarray(x).reshape(-1))
        low, high = (int(plain.min()), int(plain.max())) if plain.size else (0, 0)
        width = (high - low).bit_length()
        head = bytes([width | _OFFSET]) + _varint(low) if low else bytes([width])
        unsigned = plain.view(f"u{plain.dtype.itemsize}")
        shifted = unsigned if not low else unsigned - unsigned.dtype.type(low % (1 << 8 * plain.dtype.itemsize))
        return {"stream": np.concatenate([np.frombuffer(head, np.uint8), _pack(shifted, width)])}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The integers of `spec`; raises CodecError for a stream of another length or range."""
        if spec.dtype.kind not in ("int", "uint", "bool"):
            raise CodecError(f"bits: cannot give {spec.dtype}: it holds integers and booleans")
        stream = part(parts, "stream", self.name, dtypes=(np.uint8,))
        width, low, at = _head(stream)
        if stream.size - at != (spec.size * width + 7) // 8:
            raise CodecError(f"bits: {stream.size - at} bytes do not hold {spec.size} numbers of {width} bits")
        least, most = _range(spec)
        out = blank(Spec(spec.shape, dtype(_whole_type(spec)))).reshape(-1)
        if width > 8 * out.dtype.itemsize:
            raise CodecError(f"bits: {width} bits do not fit {spec.dtype}")
        unsigned = out.view(f"u{out.dtype.itemsize}")
        _unpack(stream[at:], width, unsigned)
        top = int(unsigned.max()) if unsigned.size else 0
        if spec.size and (low < least or low + top > most):
            raise CodecError(f"bits: values from {low} to {low + top} do not fit {spec.dtype}")
        if low:
            unsigned += unsigned.dtype.type(low % (1 << 8 * out.dtype.itemsize))
        wanted = spec.dtype.numpy
        plain = out if out.dtype == wanted else out.view(np.bool_) if wanted == np.bool_ else out.astype(wanted)
        return plain.reshape(spec.shape)


def _whole_type(spec: Spec) -> np.dtype:
    """The numpy integer that holds a dtype: int4 and int2 in int8, booleans in uint8."""
    if spec.dtype.bits >= 8 and spec.dtype.kind != "bool":
        return spec.dtype.numpy
    return np.dtype(np.int8 if spec.dtype.kind == "int" else np.uint8)


def _whole(flat: np.ndarray) -> np.ndarray:
    wanted = _whole_type(Spec.like(flat))
    return flat if flat.dtype == wanted else flat.astype(wanted)


def _range(spec: Spec) -> tuple[int, int]:
    bits = 1 if spec.dtype.kind == "bool" else spec.dtype.bits
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if spec.dtype.kind == "int" else (0, (1 << bits) - 1)


def _varint(value: int) -> bytes:
    """Zigzag, then 7 bits a byte, the least first; the last byte has no top bit."""
    rest = 2 * value if value >= 0 else -2 * value - 1
    out = bytearray()
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest])


def _head(stream: np.ndarray) -> tuple[int, int, int]:
    """Width, offset and where the numbers begin."""
    if not stream.size or int(stream[0]) & 127 > 64:
        raise CodecError("bits: the stream does not begin with a width of 0 to 64 bits")
    if not int(stream[0]) & _OFFSET:
        return int(stream[0]), 0, 1
    rest, at = 0, 1
    while True:
        if at >= min(stream.size, 11):
            raise CodecError("bits: the stream ends within its offset")
        rest |= (int(stream[at]) & 127) << 7 * (at - 1)
        at += 1
        if int(stream[at - 1]) < 128:
            return int(stream[0]) & 127, -(rest + 1 >> 1) if rest & 1 else rest >> 1, at


def _pack(values: np.ndarray, width: int) -> np.ndarray:
    if width == 0:
        return np.zeros(0, np.uint8)
    if width == 1:
        return np.packbits(values.astype(np.bool_), bitorder="little")
    if width == 8 * values.dtype.itemsize:
        return values.view(np.uint8)
    from steelyard.kernels.bits import pack_bits

    packed: np.ndarray = pack_bits(values, width)
    return packed


def _unpack(stream: np.ndarray, width: int, out: np.ndarray) -> None:
    if width == 1:
        out[:] = np.unpackbits(stream, count=out.size, bitorder="little")
    elif width == 8 * out.dtype.itemsize:
        out[:] = stream.view(out.dtype) if stream.flags.aligned else stream.copy().view(out.dtype)
    elif width:
        from steelyard.kernels.bits import unpack_bits

        unpack_bits(stream, width, out)

"""The block types of GGML with one scale for 32 elements, from q8_0 to mxfp4; and those that are only carried.

Decides how each block is rounded and laid out, bit for bit as GGML does. Knows no file.
Source: ggml-quants.c and ggml-common.h of https://github.com/ggml-org/ggml, and gguf-py beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._blocks import NONLINEAR, Blocks, half, inverse, nibbles, to_half, to_nibbles
from steelyard.errors import CodecError, quoted

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # the levels of mxfp4: twice the values
UNREAD = {  # types that are carried and not decoded: elements and bytes of a block
    "q8_1": (32, 40),
    "q8_k": (256, 292),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq2_s": (256, 82),
    "iq3_xxs": (256, 98),
    "iq3_s": (256, 110),
    "iq1_s": (256, 50),
    "iq1_m": (256, 56),
    "nvfp4": (64, 36),
    "q1_0": (128, 18),
}


@dataclass(frozen=True)
class Q8_0(Blocks):  # noqa: N801 - the name that everybody knows
    """x = d q with d = max|x| / 127 as float16 and q of 8 bits: 8.5 bits an element.

    >>> x = np.linspace(-1, 1, 32, dtype=np.float32)
    >>> blocks = Q8_0().encode(x)["blocks"]
    >>> blocks.shape
    (1, 34)
    """

    name: ClassVar[str] = "q8_0"
    block: ClassVar[int] = 32
    width: ClassVar[int] = 34

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, then the 32 codes; halves are rounded away from zero."""
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)  # (n, 1)
        scaled = x * inverse(d)
        size = np.abs(scaled)
        floor = np.floor(size)
        codes = np.copysign(floor + np.floor(2 * (size - floor)), scaled)
        return np.concatenate([to_half(d, self.name), codes.astype(np.int8).view(np.uint8)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """q d."""
        return np.asarray(raw[:, 2:].view(np.int8) * half(raw, 0))


@dataclass(frozen=True)
class Q4_0(Blocks):  # noqa: N801
    """x = d (q - 8) with d = x_max / -8, x_max the element of the largest magnitude, and q of 4 bits: 4.5 bits."""

    name: ClassVar[str] = "q4_0"
    block: ClassVar[int] = 32
    width: ClassVar[int] = 18

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, then 16 bytes: the low halves are the first 16 codes."""
        d, codes = _signed(x, 8)
        return np.concatenate([to_half(d, self.name), to_nibbles(codes, 16)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (q - 8)."""
        return np.asarray(half(raw, 0) * (nibbles(raw[:, 2:], 16).view(np.int8) - np.int8(8)))


@dataclass(frozen=True)
class Q4_1(Blocks):  # noqa: N801
    """x = d q + m with m = min(x), d = (max - min) / 15, and q of 4 bits: 5 bits an element."""

    name: ClassVar[str] = "q4_1"
    block: ClassVar[int] = 32
    width: ClassVar[int] = 20

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, m, then 16 bytes as in q4_0."""
        d, m, codes = _between(x, 15)
        return np.concatenate([to_half(d, self.name), to_half(m, self.name), to_nibbles(codes, 16)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d q + m."""
        return np.asarray(half(raw, 0) * nibbles(raw[:, 4:], 16) + half(raw, 2))


@dataclass(frozen=True)
class Q5_0(Blocks):  # noqa: N801
    """x = d (q - 16) with d = x_max / -16 and q of 5 bits: 5.5 bits an element."""

    name: ClassVar[str] = "q5_0"
    block: ClassVar[int] = 32
    width: ClassVar[int] = 22

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, the fifth bits of all codes, then the other four as in q4_0."""
        d, codes = _signed(x, 16)
        return np.concatenate([to_half(d, self.name), _high(codes), to_nibbles(codes & 15, 16)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (q - 16)."""
        return np.asarray(half(raw, 0) * (_five(raw[:, 2:6], raw[:, 6:]).view(np.int8) - np.int8(16)))


@dataclass(frozen=True)
class Q5_1(Blocks):  # noqa: N801
    """x = d q + m with m = min(x), d = (max - min) / 31, and q of 5 bits: 6 bits an element."""

    name: ClassVar[str] = "q5_1"
    block: ClassVar[int] = 32
    width: ClassVar[int] = 24

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, m, the fifth bits, then the other four."""
        d, m, codes = _between(x, 31)
        scales = [to_half(d, self.name), to_half(m, self.name)]
        return np.concatenate([*scales, _high(codes), to_nibbles(codes & 15, 16)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d q + m."""
        return np.asarray(half(raw, 0) * _five(raw[:, 4:8], raw[:, 8:]) + half(raw, 2))


@dataclass(frozen=True)
class IQ4NL(Blocks):
    """x = d v(q) with q of 4 bits and v a table of 16 uneven levels: 4.5 bits an element. Only decoded."""

    name: ClassVar[str] = "iq4_nl"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 32
    width: ClassVar[int] = 18

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d v(q)."""
        levels = np.array(NONLINEAR, np.float32)
        return np.asarray(half(raw, 0) * levels[nibbles(raw[:, 2:], 16)])


@dataclass(frozen=True)
class MXFP4(Blocks):
    """x = 2^(e - 128) v(q) with e of 8 bits, q of 4 bits and v the doubled values of E2M1: 4.25 bits. Only decoded."""

    name: ClassVar[str] = "mxfp4"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 32
    width: ClassVar[int] = 17

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """2^(e - 128) v(q); the two smallest scales are subnormal."""
        e = raw[:, :1].astype(np.uint32)
        scale = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), e - 1 << np.uint32(23)).view(np.float32)
        return np.asarray(scale * np.array(E2M1, np.float32)[nibbles(raw[:, 1:], 16)])


@dataclass(frozen=True)
class Ggml(Blocks):
    """Blocks of a type of GGML that is carried from file to file as it is, and neither decoded nor encoded.

    >>> Ggml("iq2_xxs").width
    66

    Raises CodecError for a type that is none of those.
    """

    type: str = "iq2_xxs"

    name: ClassVar[str] = "ggml"
    encodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.type not in UNREAD:
            raise CodecError(
                f"ggml: there is no type {quoted(str(self.type))} that is only carried: {', '.join(UNREAD)}"
            )

    @property
    def kind(self) -> str:
        """The name of the type in GGML, in lower case."""
        return self.type

    @property
    def block(self) -> int:  # type: ignore[override]
        """The elements of a block."""
        return UNREAD[self.type][0]

    @property
    def width(self) -> int:  # type: ignore[override]
        """The bytes of a block."""
        return UNREAD[self.type][1]

    def unpack_blocks(self, _raw: np.ndarray, /) -> np.ndarray:
        """Raises CodecError."""
        raise CodecError(
            f"{self.type}: is carried and not decoded here; decode it where it was made, or pick another file"
        )


def _signed(x: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """d (n, 1) = the element of the largest magnitude over -zero, and the codes from 0 to 2 zero - 1."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)  # (n, 1)
    d = largest / np.float32(-zero)
    codes = np.trunc(x * inverse(d) + np.float32(zero + 0.5)).astype(np.uint8)
    return d, codes.clip(0, 2 * zero - 1)


def _between(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d (n, 1) = range / top, the minimum (n, 1), and the codes from 0 to top."""
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((x - low) * inverse(d) + np.float32(0.5)).astype(np.uint8)
    return d, low, codes.clip(0, top)


def _high(codes: np.ndarray) -> np.ndarray:
    """The fifth bits of codes (n, 32) as bytes (n, 4)."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _five(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Codes (n, 32) from their fifth bits (n, 4) and the other four (n, 16)."""
    return np.asarray(nibbles(low, 16) | np.unpackbits(high, axis=1, bitorder="little") << 4)

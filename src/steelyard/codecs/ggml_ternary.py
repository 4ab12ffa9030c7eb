"""The ternary types of GGML: 256 elements of -1, 0 and 1 share a float16 scale. Only decoded.

Knows no file. Source: ggml-quants.c of https://github.com/ggml-org/ggml, and gguf-py beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._blocks import Blocks, bit_planes, half


@dataclass(frozen=True)
class TQ1(Blocks):
    """x = d (q - 1) with q of 0, 1 and 2, five of them in a byte as a fraction in base 3: 1.6875 bits. Only decoded."""

    name: ClassVar[str] = "tq1_0"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 256
    width: ClassVar[int] = 54

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (q - 1): 32 bytes of five, 16 bytes of five, 4 bytes of four."""
        parts = [_digits(raw[:, :32], 5), _digits(raw[:, 32:48], 5), _digits(raw[:, 48:52], 4)]
        return np.asarray(half(raw, 52) * (np.concatenate(parts, axis=1) - np.int8(1)))


@dataclass(frozen=True)
class TQ2(Blocks):
    """x = d (q - 1) with q of 2 bits: 2.0625 bits an element. Only decoded."""

    name: ClassVar[str] = "tq2_0"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 256
    width: ClassVar[int] = 66

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (q - 1)."""
        return np.asarray(half(raw, 64) * (bit_planes(raw[:, :64], 32, 2).view(np.int8) - np.int8(1)))


def _digits(raw: np.ndarray, count: int) -> np.ndarray:
    """The first digits in base 3 of bytes (n, k) that are fractions of 256: of all the first, then the second, ..."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count].reshape(1, count, 1)
    shifted = raw[:, None, :] * powers  # (n, count, k): what is beyond a byte is known already
    digits = shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)
    return np.asarray(digits.astype(np.int8).reshape(len(raw), -1))

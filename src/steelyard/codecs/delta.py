"""Zeros as the distances between the other values. Lossless; at most one bit an element, less below 38 % density.

Source: the relative index of S. Han, H. Mao, W. J. Dally, Deep Compression, ICLR 2016 (arXiv 1510.00149),
figure 2, with an escape in place of its padding zeros, and the width of a distance chosen for the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, nonzero, part
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

_WIDEST = 16


@dataclass(frozen=True)
class Delta(Codec):
    """Hold a sparse tensor as ``gaps`` (uint8 or uint16) and ``values`` (the dtype of x), both with one axis.

    A gap g < E says: skip g zeros, then comes the next value. A gap of E = 2^bits - 1 says: skip E zeros and
    read on. The first gap is E itself, so a reader need not know `bits`; a tensor without values has no gaps.

    Args:
        bits: the width of a gap, 1 to 16; None chooses the one with the fewest bits in all. An entropy coder
            behind it is served best by 8.

    >>> Delta(bits=2).encode(np.float32([0, 7, 0, 0, -1, 0]))["gaps"]
    array([3, 1, 2], dtype=uint8)
    """

    bits: int | None = None

    name: ClassVar[str] = "delta"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("gaps", "values")
    inner: ClassVar[Mapping[str, Codec]] = {"gaps": Bits()}

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 <= self.bits <= _WIDEST:
            raise CodecError(f"delta: bits is {self.bits}, expected 1 to {_WIDEST}")

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"gaps": distances with escapes, "values": the elements that are not zero}``."""
        mask = nonzero(x)
        values = np.ascontiguousarray(x).reshape(-1)[mask]
        skipped = np.diff(np.flatnonzero(mask), prepend=-1) - 1
        if not skipped.size:
            return {"gaps": np.zeros(0, np.uint8), "values": values}
        bits = self.bits or min(range(1, _WIDEST + 1), key=lambda b: _length(skipped, b) * b)
        escape = (1 << bits) - 1
        gaps = np.full(_length(skipped, bits), escape, np.uint8 if bits <= 8 else np.uint16)
        gaps[np.cumsum(skipped // escape + 1)] = skipped % escape
        return {"gaps": gaps, "values": values}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError where the gaps lead outside or do not match the values."""
        gaps = part(parts, "gaps", self.name, dtypes=(np.uint8, np.uint16))
        values = part(parts, "values", self.name, dtypes=(spec.dtype.numpy,))
        escape, steps = (int(gaps[0]), gaps[1:]) if gaps.size else (1, gaps)
        ends = steps != escape
        places = (np.cumsum(steps, dtype=np.int64) + np.cumsum(ends))[ends] - 1
        if places.size != values.size:
            raise CodecError(f"delta: {places.size} gaps for {values.size} values")
        if places.size and places[-1] >= spec.size:
            raise CodecError(f"delta: the gaps lead to element {places[-1]} of {spec.size}")
        out = blank(spec)
        out.reshape(-1)[places] = values
        return out


def _length(skipped: np.ndarray, bits: int) -> int:
    """How many gaps of this width it takes, the one that states the escape included."""
    return 1 + skipped.size + int((skipped // ((1 << bits) - 1)).sum())

"""What the bit patterns of a dtype mean: their values as exact integers, their order, and which are special.

A dtype of up to 16 bits is a table of at most 65,536 values. A wider one is known here by its leading 16 bits only.
Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from steelyard.core.spec import DType

SIGNIFICAND = 16  # bits that hold any significand of a dtype of up to 16 bits


@dataclass(frozen=True)
class Alphabet:
    """The values of a dtype of up to 16 bits, by pattern."""

    values: np.ndarray  # (patterns,) float64
    order: np.ndarray  # the patterns of finite values, least value first
    ordered: np.ndarray  # their values: float64, exact
    significands: np.ndarray  # theirs: value = significand * 2^exponent
    exponents: np.ndarray  # counted from `base`
    base: int
    nan: np.ndarray  # the patterns that are not numbers
    infinite: tuple[np.ndarray, np.ndarray]  # those of +Inf and of -Inf: none, or one
    subnormal: np.ndarray  # the patterns whose values are nearer to zero than the least normal number
    negative_zero: np.ndarray


@cache
def alphabet(dtype: DType) -> Alphabet:
    """The table of a dtype of up to 16 bits."""
    values = _values(dtype)
    finite = np.flatnonzero(np.isfinite(values))
    order = finite[np.lexsort((~np.signbit(values[finite]), values[finite]))]
    ordered = values[order]
    significands, exponents = np.frexp(ordered)
    exponents = np.where(ordered == 0, exponents.min(initial=0), exponents) - SIGNIFICAND
    small = np.zeros(values.size, bool)
    if dtype.kind == "float":
        with np.errstate(invalid="ignore"):
            small = (values != 0) & (np.abs(values) < _least_normal(dtype))
    return Alphabet(
        values,
        order,
        ordered,
        np.ldexp(significands, SIGNIFICAND).astype(np.int64),
        exponents - exponents.min(),
        int(exponents.min()),
        np.flatnonzero(np.isnan(values)),
        (np.flatnonzero(values == np.inf), np.flatnonzero(values == -np.inf)),
        np.flatnonzero(small),
        np.flatnonzero((values == 0) & np.signbit(values)),
    )


def _values(dtype: DType) -> np.ndarray:
    if dtype.name == "bool":
        return np.float64([0, 1])
    width = dtype.numpy.itemsize
    patterns = np.arange(1 << dtype.bits, dtype=f"u{width}")
    if dtype.kind == "int" and dtype.bits < 8:  # in memory the sign fills the byte
        patterns = (patterns.view(np.int8) << (8 - dtype.bits) >> (8 - dtype.bits)).view(np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return patterns.view(dtype.numpy).astype(np.float64)


def _least_normal(dtype: DType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).smallest_normal)


@dataclass(frozen=True)
class Wide:
    """How a dtype of 32 or 64 bits is put together."""

    bits: int
    fraction: int | None  # bits of the significand behind the point; None: a whole number
    signed: bool
    base: int  # every finite value is a multiple of 2^base

    @property
    def unsigned(self) -> np.dtype[Any]:
        return np.dtype(f"u{self.bits // 8}")

    def leading(self, patterns: np.ndarray) -> np.ndarray:
        """The 16 leading bits."""
        return (patterns >> (self.bits - 16)).astype(np.int64)

    def in_order(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leading patterns of finite values, least value first, and their counts."""
        if self.fraction is None:
            order = np.roll(np.arange(65536), -32768) if self.signed else np.arange(65536)
        else:
            last = ((1 << (self.bits - 1 - self.fraction)) - 1) << (self.fraction - (self.bits - 16))  # Inf and NaN
            order = np.concatenate([32768 + np.arange(last)[::-1], np.arange(last)])
        return order, counts[order]

    def descending(self, prefix: int) -> bool:
        """Whether patterns with this leading half stand for ever smaller values."""
        return self.fraction is not None and prefix >= 32768


WIDE = {
    "float32": Wide(32, 23, True, -149),
    "float64": Wide(64, 52, True, -1074),
    "int32": Wide(32, None, True, 0),
    "int64": Wide(64, None, True, 0),
    "uint32": Wide(32, None, False, 0),
    "uint64": Wide(64, None, False, 0),
}


def part(dtype: DType) -> str:
    """The dtype of the numbers that a tensor is made of: those of a complex tensor are its real and imaginary parts."""
    return {"complex64": "float32", "complex128": "float64"}.get(dtype.name, dtype.name)

"""The numbers of one pair of tensors, added up block by block: how many elements differ, how, and by how much.

Decides how values of any dtype are compared: as float32 or float64, whichever holds both sides exactly (whole numbers
of 64 bits are compared by their bits, and only their magnitudes are rounded). Complex numbers count as two. Numbers
that are not finite are counted by what happened to them and left out of every sum. Knows nothing of names or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from steelyard.core.spec import DType
from steelyard.core.weights import Weight
from steelyard.errors import SteelyardError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 18  # elements of each side in memory at a time
LANES = 16
_CAREFUL = 1 << 14  # elements that numpy adds up at a time


@dataclass
class Tally:
    """What was counted over pairs (a, b); `sums` is (5, 16): see kernels.compare."""

    elements: int = 0
    differ: int = 0  # bits differ
    changed: int = 0  # values differ; NaN differs from numbers, not from NaN
    flips: int = 0  # signs differ, neither is zero
    negated: int = 0  # b = -a, not zero
    zeroed: int = 0  # b is zero, a is not
    filled: int = 0  # a is zero, b is not
    nan: int = 0  # NaN in both
    nan_appeared: int = 0
    nan_vanished: int = 0
    nan_payload: int = 0  # NaN in both, other bits
    inf: int = 0  # an infinity on either side, and no NaN
    inf_appeared: int = 0
    inf_vanished: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((5, LANES)))

    @property
    def zero_signs(self) -> int:
        """Pairs of 0.0 and -0.0."""
        return self.differ - self.changed - self.nan_payload

    def total(self, row: int) -> float:
        """One of the sums over all lanes."""
        return math.fsum(self.sums[row])

    @property
    def largest(self) -> float:
        """max |b - a| over pairs of finite numbers."""
        return float(self.sums[4].max())

    @property
    def mean(self) -> float | None:
        """Mean |b - a| over pairs of finite numbers; None where there are none."""
        finite = self.elements - self._outside_numbers
        return self.total(0) / finite if finite else None

    @property
    def all_finite(self) -> bool:
        """Whether neither side has a NaN or an infinity."""
        return not self._outside_numbers

    @property
    def _outside_numbers(self) -> int:
        return self.nan + self.nan_appeared + self.nan_vanished + self.inf

    @property
    def relative(self) -> float | None:
        """||b - a|| / ||a||; infinite where only a is zero."""
        change, base = self.total(1), self.total(2)
        if not change:
            return 0.0
        return math.sqrt(change / base) if base else math.inf

    @property
    def cosine(self) -> float | None:
        """ab / (||a|| ||b||); None where one is zero."""
        length = math.sqrt(self.total(2)) * math.sqrt(self.total(3))
        return max(-1.0, min(1.0, self.product / length)) if length and math.isfinite(length) else None

    @property
    def product(self) -> float:
        """ab, from ||b - a||^2 = ||a||^2 + ||b||^2 - 2 ab."""
        return (self.total(2) + self.total(3) - self.total(1)) / 2

    def add(self, a: np.ndarray, b: np.ndarray, fast: bool) -> None:
        """Count a pair of flat arrays of one length; `fast` is by the compiled kernel."""
        self.elements += a.size * (2 if a.dtype.kind == "c" else 1)
        with np.errstate(over="ignore", invalid="ignore"):  # numpy warns of signalling NaN
            self._add(a, b, fast and not (a.dtype.kind in "iu" and a.dtype.itemsize == 8))

    def _add(self, a: np.ndarray, b: np.ndarray, fast: bool) -> None:
        if fast and a.dtype == b.dtype and a.dtype.name == "bfloat16" and self._quick(raw(a), raw(b)):
            return
        x, y, bits_x, bits_y = widened(a, b)
        if fast and self._quick(x, y):
            return
        sums, counts = np.zeros((5, LANES)), np.zeros(6, np.int64)
        for at in range(0, x.size, _CAREFUL):
            part = slice(at, at + _CAREFUL)
            self._careful(x[part], y[part], bits_x[part], bits_y[part], sums, counts)
        self._plus(sums, counts)
        if a.dtype.kind in "iu" and a.dtype == b.dtype:  # 64 bits do not fit into a float
            self.changed = self.differ

    def _quick(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether all numbers are finite; else nothing is added."""
        from steelyard.kernels.compare import compare

        sums, counts = np.zeros((5, LANES)), np.zeros(6, np.int64)
        compare(a, b, sums, counts)
        if not np.isfinite(sums[1:4]).all():
            return False
        self._plus(sums, counts)
        return True

    def _plus(self, sums: np.ndarray, counts: Any) -> None:
        self.sums[:4] += sums[:4]
        np.maximum(self.sums[4], sums[4], out=self.sums[4])
        differ, changed, flips, negated, zeroed, filled = map(int, counts)
        self.differ += differ
        self.changed += changed
        self.flips += flips
        self.negated += negated
        self.zeroed += zeroed
        self.filled += filled

    def _careful(
        self,
        a: np.ndarray,
        b: np.ndarray,
        bits_a: np.ndarray,
        bits_b: np.ndarray,
        sums: np.ndarray,  # (5, 16)
        counts: np.ndarray,  # (6,)
    ) -> None:
        """What the kernel does, in numpy and in the same order; counts what is not finite."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        differ = bits_a != bits_b
        finite = np.isfinite(x) & np.isfinite(y)
        changed = x != y
        flips = ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))
        negated = (x == -y) & (x != 0)
        zeroed, filled = (x != 0) & (y == 0), (x == 0) & (y != 0)
        if not finite.all():
            changed &= ~(np.isnan(x) & np.isnan(y))
            self._outside(x, y, differ)
            x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        d = y - x
        size = np.abs(d)
        for row, values in enumerate((size, d * d, x * x, y * y)):
            _add_lanes(sums[row], values)
        sums[4] = np.maximum(sums[4], _padded(size).max(axis=0, initial=0.0))
        counts += [np.count_nonzero(v) for v in (differ, changed, flips, negated, zeroed, filled)]

    def _outside(self, x: np.ndarray, y: np.ndarray, differ: np.ndarray) -> None:
        nan_x, nan_y, inf_x, inf_y = np.isnan(x), np.isnan(y), np.isinf(x), np.isinf(y)
        both = nan_x & nan_y
        self.nan += int(np.count_nonzero(both))
        self.nan_payload += int(np.count_nonzero(both & differ))
        self.nan_appeared += int(np.count_nonzero(nan_y & ~nan_x))
        self.nan_vanished += int(np.count_nonzero(nan_x & ~nan_y))
        self.inf_appeared += int(np.count_nonzero(inf_y & ~inf_x))
        self.inf_vanished += int(np.count_nonzero(inf_x & ~inf_y))
        self.inf += int(np.count_nonzero((inf_x | inf_y) & ~nan_x & ~nan_y))


def _add_lanes(lanes: np.ndarray, values: np.ndarray) -> None:
    """Add every 16th number to its lane, one after the other."""
    np.add.reduce(np.concatenate((lanes[None], _padded(values))), axis=0, out=lanes)


def _padded(values: np.ndarray) -> np.ndarray:
    """Flat values as (n, 16), the end filled with zeros."""
    missing = -values.size % LANES
    return (np.concatenate((values, np.zeros(missing))) if missing else values).reshape(-1, LANES)


def raw(values: np.ndarray) -> np.ndarray:
    """The bits of flat values as unsigned numbers of the same width; a complex number is two."""
    if values.dtype.kind == "c":
        values = values.view(values.real.dtype)
    return values.view(f"u{values.dtype.itemsize}")


def wide(values: np.ndarray) -> np.ndarray:
    """Flat values as float32 where that is exact, else as float64."""
    name, kind = values.dtype.name, values.dtype.kind
    if name == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "c":
        return values.view(values.real.dtype)
    if name in ("float32", "float64"):
        return values
    exact = values.dtype.itemsize <= 2
    return values.astype(np.float32 if exact else np.float64)


def widened(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both sides as floats of one width, and their bits as unsigned numbers of that width.

    The bits are those of the stored values where both have one dtype.
    """
    x, y = wide(a), wide(b)
    if x.dtype != y.dtype:
        x, y = x.astype(np.float64), y.astype(np.float64)
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    if a.dtype == b.dtype:
        return x, y, raw(a).astype(unsigned, copy=False), raw(b).astype(unsigned, copy=False)
    return x, y, x.view(unsigned), y.view(unsigned)


def aligned(a: Weight, b: Weight, elements: int = BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks of two tensors of one size, side by side; each pair is valid until the next is asked for."""
    return zip(a.blocks(elements), b.blocks(elements), strict=True)


def same_bits(a: Weight, b: Weight) -> bool:
    """Whether two tensors of one dtype and size hold the same bits; stops at the first difference."""
    return all(np.array_equal(_words(x), _words(y)) for x, y in aligned(a, b))


def surely_same(a: Weight, b: Weight) -> bool:
    """`same_bits`, and False where one cannot be read."""
    try:
        return same_bits(a, b)
    except SteelyardError:
        return False


def _words(values: np.ndarray) -> np.ndarray:
    """The bytes of flat values, eight at a time where that comes out even."""
    octets = np.ascontiguousarray(values).view(np.uint8)
    return octets.view(np.uint64) if octets.size % 8 == 0 else octets


def tally(a: Weight, b: Weight, fast: bool) -> Tally:
    """Count the pairs of two tensors of one number of elements."""
    result = Tally()
    for x, y in aligned(a, b):
        result.add(x, y, fast)
    return result


@dataclass
class Casts:
    """Elements that are not the other side, cast: a to the dtype of b, the same towards zero, and b to that of a."""

    to_b: int = 0
    truncated: int = 0
    to_a: int = 0


def casts(a: Weight, b: Weight) -> Casts:
    """How far one of two floating-point tensors of different dtypes is the other one, cast; NaN is cast to NaN."""
    result = Casts()
    for x, y in aligned(a, b):
        with np.errstate(over="ignore", invalid="ignore"):
            result.to_b += _unlike(wide(x).astype(y.dtype), y)
            result.to_a += _unlike(wide(y).astype(x.dtype), x)
            if x.dtype == np.float32 and y.dtype.name == "bfloat16":
                result.truncated += int(np.count_nonzero((x.view(np.uint32) >> 16).astype(np.uint16) != raw(y)))
            else:
                result.truncated += y.size
    return result


def _unlike(cast: np.ndarray, other: np.ndarray) -> int:
    nan = np.isnan(wide(cast)) & np.isnan(wide(other))
    return int(np.count_nonzero((raw(cast) != raw(other)) & ~nan))


def epsilon(dtype: DType) -> float:
    """The distance from 1 to the next number of a floating-point dtype; 0 for whole numbers."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).eps) if dtype.kind == "float" else 0.0

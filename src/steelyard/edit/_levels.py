"""Uniform levels for the rows of a matrix: which scale loses least, and how rounded rows become a packed tensor.

Decides scales from values and from how much each value matters. Knows nothing of layers or of data. How codes become
values again is the affine codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steelyard.codecs.affine import Affine
from steelyard.core.packed import Packed, Plan, pack
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight
from steelyard.edit.evidence import Rows
from steelyard.errors import CodecError, RecipeError, quoted

SIGNIFICANT = 8  # bits of a scale: more would cost bytes and gain nothing
CANDIDATES = 24  # scales that are tried for each group
REFINED = 4  # times that the best one is fitted to its own codes
CHUNK = 1 << 19  # numbers that are searched at a time


@dataclass(frozen=True)
class Levels:
    """2^bits - 1 symmetric levels around zero, or 2^bits between two ends, shared by `group` inputs of a row."""

    bits: int
    symmetric: bool
    group: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.symmetric else 1
        if not least <= self.bits <= 8:
            kind = "symmetric levels" if self.symmetric else "levels"
            raise RecipeError(f"the bits of {kind} are {least} to 8, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise RecipeError(f"a group has at least 1 element, not {self.group}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - (2 if self.symmetric else 1)

    def grouped(self, rows: Rows) -> int:
        """How many inputs share a scale: all of a row unless the inputs are the last axis of a matrix."""
        inputs = rows.inputs
        plain = len(rows.shape) == 2 and not rows.first
        return max(1, min(self.group, inputs) if self.group is not None and plain else inputs)

    def codec(self, rows: Rows) -> Affine:
        """The codec whose parts `packed` makes."""
        if self.group is not None and len(rows.shape) == 2 and not rows.first:
            return Affine(self.bits, self.symmetric, group=self.group)
        return Affine(
            self.bits, self.symmetric, axis=(len(rows.shape) - 1 if rows.first else 0) if rows.shape else None
        )

    def round(self, w: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """The nearest codes, as whole numbers in the type of `w`; scale and zero broadcast against it."""
        steps = np.rint((w - zero) / np.where(scale > 0, scale, 1))
        middle = self.top // 2 if self.symmetric else 0
        return np.clip(steps + middle, 0, self.top)

    def values(self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """What codes stand for."""
        return zero + (codes - (self.top // 2 if self.symmetric else 0)) * scale

    def search(self, x: np.ndarray, mass: np.ndarray | None, power: float) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of each group of `x`, (groups, members), for the least sum of mass |x - levels|^power.

        `mass` broadcasts against x. Scales have 8 significant bits, zero points a few more.
        """
        each = max(1, CHUNK // max(1, x.shape[1]))
        found = []
        for at in range(0, len(x), each):
            own = None if mass is None else mass[at : at + each] if len(mass) == len(x) else mass
            found.append(self._search(x[at : at + each].astype(np.float32), own, power))
        scales, zeros = zip(*found, strict=True) if found else ([np.zeros(0)], [np.zeros(0)])
        return np.concatenate(scales).astype(np.float64), np.concatenate(zeros).astype(np.float64)

    def _search(self, x: np.ndarray, mass: np.ndarray | None, power: float) -> tuple[np.ndarray, np.ndarray]:
        mass = np.ones((1, 1), np.float32) if mass is None else np.maximum(mass, 1e-30).astype(np.float32)
        low, high = (np.min(x, axis=1, initial=np.inf), np.max(x, axis=1, initial=-np.inf))
        if not x.shape[1]:
            low = high = np.zeros(len(x), np.float32)
        most = np.maximum(np.abs(low), np.abs(high))
        best = np.full(len(x), np.inf)
        kept = np.zeros((2, len(x)), np.float32)
        least = 0.25 if self.bits <= 2 else 0.35 if self.bits == 3 else 0.45 if self.bits == 4 else 0.6
        for share in np.linspace(1.0, least, CANDIDATES, dtype=np.float32):
            if self.symmetric:
                scale, zero = most * share / max(self.top // 2, 1), np.zeros_like(most)
            else:
                middle = (low + high) / 2
                zero = middle - (middle - low) * share
                scale = (high - low) * share / self.top
            self._keep(x, mass, power, self.stored(scale, zero), best, kept)
        for _ in range(REFINED if power == 2 else 0):
            self._keep(x, mass, power, self.stored(*self._fitted(x, mass, *kept)), best, kept)
        return kept[0], kept[1]

    def _keep(
        self, x: np.ndarray, mass: np.ndarray, power: float, tried: tuple[np.ndarray, np.ndarray], best: np.ndarray,
        kept: np.ndarray,
    ) -> None:  # fmt: skip
        """Keep the scales that are tried where they lose less."""
        scale, zero = tried[0][:, None], tried[1][:, None]
        away = x - self.values(self.round(x, scale, zero), scale, zero)
        loss = (mass * (away * away if power == 2 else np.abs(away) ** np.float32(power))).sum(axis=1)
        better = loss < best
        best[better] = loss[better]
        kept[0, better], kept[1, better] = tried[0][better], tried[1][better]

    def _fitted(self, x: np.ndarray, mass: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> list[np.ndarray]:
        """The scale (and zero point) with the least squared error for the codes of the present ones."""
        codes = self.round(x, scale[:, None], zero[:, None])
        mass = np.broadcast_to(mass, x.shape)
        if self.symmetric:
            c = codes - self.top // 2
            below = (mass * c * c).sum(axis=1)
            new = (mass * c * x).sum(axis=1) / np.where(below > 0, below, 1)
            return [np.where((below > 0) & (new > 0), new, scale), zero]
        total = mass.sum(axis=1)
        mean_c, mean_x = (mass * codes).sum(axis=1) / total, (mass * x).sum(axis=1) / total
        c = codes - mean_c[:, None]
        below = (mass * c * c).sum(axis=1)
        new = (mass * c * (x - mean_x[:, None])).sum(axis=1) / np.where(below > 0, below, 1)
        new = np.where((below > 0) & (new > 0), new, scale)
        return [new, mean_x - mean_c * new]

    def stored(self, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point with as many bits as are stored."""
        return short(scale, SIGNIFICANT), zero if self.symmetric else short(zero, SIGNIFICANT + self.bits // 2)

    def packed(
        self, rows: Rows, spec: Spec, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, plans: Mapping[str, Plan]
    ) -> Packed:
        """A tensor of `spec` from codes (outputs, inputs) and, for each group of each row, scale and zero point."""
        codec = self.codec(rows)
        shape = scale.shape if codec.group is not None else (len(scale),)
        if codec.axis is None and codec.group is None:
            shape = ()
        parts = {"codes": rows.tensor(codes.astype(np.uint8)), "scale": scale.astype(np.float32).reshape(shape)}
        if not self.symmetric:
            parts["zero"] = zero.astype(spec.dtype.numpy).reshape(shape)
        every = {**codec.inner, **plans}
        return Packed(spec, codec, {name: pack(value, every.get(name)) for name, value in parts.items()})


def short(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` rounded to so many significant bits.

    >>> short(np.float32([1.01, 200.3]), 4).tolist()
    [1.0, 208.0]
    """
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent), x.dtype)


def finite(weight: Weight, x: np.ndarray) -> np.ndarray:
    """`x`, the values of `weight`; raises CodecError if one is NaN or infinite."""
    if not np.isfinite(x.astype(np.float32 if x.dtype.itemsize < 4 else x.dtype)).all():
        raise CodecError(f"{weight.origin}: {quoted(weight.name)} has NaN or infinite values; repair or clip them")
    return x

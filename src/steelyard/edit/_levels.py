"""Uniform levels for the rows of a matrix: which scale loses least, and how rounded rows become a packed tensor.

Decides scales from values and from how much each value matters. Knows nothing of layers or of data. How codes become
values again is the affine codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steelyard.codecs._parts import is_whole
from steelyard.codecs.affine import Affine
from steelyard.core.packed import Packed, Plan, pack
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight
from steelyard.edit.evidence import Rows
from steelyard.errors import CodecError, RecipeError, SteelyardError, quoted

SIGNIFICANT = 8  # bits of a scale: more would cost bytes and gain nothing
CANDIDATES = 24  # scales that are tried for each group
REFINED = 4  # times that the best one is fitted to its own codes
_LEAST = {1: 0.25, 2: 0.25, 3: 0.35, 4: 0.45}  # bits -> the narrowest span that is tried, as a share of the widest


@dataclass(frozen=True)
class Levels:
    """2^bits - 1 symmetric levels around zero, or 2^bits between two ends, shared by `group` inputs of a row."""

    bits: int
    symmetric: bool
    group: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.symmetric else 1
        if not is_whole(self.bits, least, 8):
            kind = "symmetric levels" if self.symmetric else "levels"
            raise RecipeError(f"the bits of {kind} are {least} to 8, not {self.bits!r}")
        if self.group is not None and not is_whole(self.group, 1):
            raise RecipeError(f"a group has at least 1 element, not {self.group!r}")

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
        from steelyard.kernels.scales import search_scales

        own = np.ones((1, 1), np.float32) if mass is None else np.maximum(mass, 1e-30).astype(np.float32)
        scales, zeros = np.zeros(len(x)), np.zeros(len(x))
        shares = np.linspace(1.0, _LEAST.get(self.bits, 0.6), CANDIDATES)
        if x.shape[1]:
            wide = np.ascontiguousarray(x, np.float32)
            bits = SIGNIFICANT, SIGNIFICANT + self.bits // 2
            search_scales(wide, own, shares, self.top, self.symmetric, float(power), *bits, REFINED, scales, zeros)
        return scales, zeros

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


# of a matrix (outputs, inputs), the second moments of its inputs (None: all alike) and how many inputs share a scale:
# codes (outputs, inputs), scales and zero points (outputs, groups)
def plans_of(codes: Plan, scale: Plan, symmetric: bool) -> dict[str, Plan]:
    """How the parts of the affine codec are held, where anything is said: zero points as scales are."""
    given = {"codes": codes, "scale": scale, "zero": None if symmetric else scale}
    return {name: plan for name, plan in given.items() if plan is not None}


def short(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` rounded to so many significant bits.

    >>> short(np.float32([1.01, 200.3]), 4).tolist()
    [1.0, 208.0]
    """
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent), x.dtype)


def finite(weight: Weight, x: np.ndarray, error: type[SteelyardError] = CodecError) -> np.ndarray:
    """`x`, the values of `weight`; raises `error` if one is NaN or infinite."""
    sound = np.isfinite(x.astype(np.float32) if x.dtype.itemsize < 4 else x)
    if not sound.all():
        at = np.unravel_index(int(sound.argmin()), x.shape)
        text = f"has NaN or infinite values, the first at {list(map(int, at))} ({x[at]}); repair or clip them"
        raise error(f"{weight.origin}: {quoted(weight.name)} {text}")
    return x

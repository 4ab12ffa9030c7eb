"""Zeros as one bit each, and the other values in order. Lossless; pays where at least 1/32 of float32 are zero."""

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


@dataclass(frozen=True)
class Bitmask(Codec):
    """Hold a sparse tensor as ``mask`` (bool, the shape of x) and ``values`` (one axis, the dtype of x).

    An element is zero here when all of its bits are: -0.0 and NaN are values and survive.

    >>> Bitmask().encode(np.float32([0, 7, 0, -1]))["values"]
    array([ 7., -1.], dtype=float32)
    """

    name: ClassVar[str] = "bitmask"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("mask", "values")
    inner: ClassVar[Mapping[str, Codec]] = {"mask": Bits()}

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"mask": bool, "values": x[mask]}``."""
        mask = nonzero(x)
        return {"mask": mask.reshape(x.shape), "values": np.ascontiguousarray(x).reshape(-1)[mask]}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError where the mask does not have as many ones as there are values."""
        mask = part(parts, "mask", self.name, dtypes=(np.bool_,), shape=spec.shape).reshape(-1)
        values = part(parts, "values", self.name, dtypes=(spec.dtype.numpy,))
        ones = int(np.count_nonzero(mask))
        if ones != values.size:
            raise CodecError(f"bitmask: the mask has {ones} ones for {values.size} values")
        out = blank(spec)
        out.reshape(-1)[mask] = values
        return out

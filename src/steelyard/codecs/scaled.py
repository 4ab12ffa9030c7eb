"""A factor for each index of an axis, beside the other values, which may be held in any way.

Decides on factors only where nobody has: then they are powers of two. Source: the scales of input channels of
J. Lin et al., AWQ: Activation-aware Weight Quantization, MLSys 2024 (arXiv 2306.00978), kept with the weight.
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

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Scaled(Codec):
    """Hold a tensor as ``values`` (its shape and dtype) and ``factor`` (float32, one for each index of `axis`).

    x = values * factor, computed in float64 and rounded once. Encoding takes for each factor the power of two above
    the largest magnitude, so that the values are below 1; what then underflows is lost. Others, such as the
    channel scales of AWQ, come from the step that finds them.

    >>> Scaled().encode(np.float32([[8, 0.5], [4, 0.25]]))["factor"].tolist()
    [16.0, 1.0]

    Raises CodecError for types other than float32, float16, bfloat16 and float64.
    """

    axis: int = -1

    name: ClassVar[str] = "scaled"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("values", "factor")

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"values", "factor"}``; see the class."""
        spec = Spec.like(x)
        place, _ = self._place(spec)
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            others = tuple(a for a in range(x.ndim) if a != self.axis % x.ndim)
            most = np.where(np.isfinite(wide), np.abs(wide), 0).max(axis=others, initial=0)
            exponent = np.clip(np.frexp(most)[1], -126, 127)
            factor = np.ldexp(np.float32(1), exponent).astype(np.float32)
            return {"values": (wide / factor.reshape(place)).astype(x.dtype), "factor": factor}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """values * factor; raises CodecError for parts of other shapes."""
        place, count = self._place(spec)
        values = part(parts, "values", self.name, dtypes=(spec.dtype.numpy,), shape=spec.shape)
        factor = part(parts, "factor", self.name, dtypes=(np.float32,), shape=(count,))
        if not values.size:
            return blank(spec)
        with np.errstate(all="ignore"):
            return np.asarray(
                (values.astype(np.float64) * factor.astype(np.float64).reshape(place)).astype(values.dtype)
            )

    def _place(self, spec: Spec) -> tuple[list[int], int]:
        """The shape that spreads factors over the tensor, and their number."""
        rank = len(spec.shape)
        if spec.dtype.name not in _FLOATS:
            raise CodecError(f"scaled: cannot hold {spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")
        if not -rank <= self.axis < rank:
            raise CodecError(
                f"scaled: axis {self.axis} of a tensor with {rank} axes; give one from {-rank} to {rank - 1}, "
                "or choose others (where, or --where)"
            )
        place = [1] * rank
        place[self.axis] = -1
        return place, spec.shape[self.axis]

"""Round to uniform levels of few bits. Decides which tensors; the levels themselves are the affine codec."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from steelyard.codecs.affine import Affine
from steelyard.core.packed import Scheme
from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.edit.pack import hold
from steelyard.edit.prune import in_scope


@dataclass(frozen=True)
class Quantize(Step):
    """Round every weight to the nearest of 2^bits uniform levels, and hold it as the number of its level.

    One scale for a whole tensor, for each index along `axis` (0: each output channel), or for each `group`
    of consecutive elements of the last axis; `symmetric` levels need no zero point. See `codecs.affine`.
    Only floating-point tensors of at least `min_ndim` axes take part; the others pass untouched.

    Raises CodecError for settings that contradict each other and, naming the tensor, for NaN or infinite
    weights and shapes that do not fit.

    >>> import numpy as np
    >>> w = Weights.of({"a": np.float32([[-1, 0.4, 1]])})
    >>> Quantize(bits=2, symmetric=True)(w)["a"].array().tolist()
    [[-1.0, 0.0, 1.0]]
    """

    name: ClassVar[str] = "quantize"
    bits: int = 8
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None
    min_ndim: int = 2

    def __post_init__(self) -> None:
        self.codec()

    def codec(self) -> Affine:
        """The codec that rounds."""
        return Affine(bits=self.bits, symmetric=self.symmetric, axis=self.axis, group=self.group)

    def __call__(self, weights: Weights) -> Weights:
        codec = self.codec()
        return weights.with_items(
            item.then(partial(hold, item, codec), scheme=Scheme(codec)) if in_scope(item, self.min_ndim) else item
            for item in weights.values()
        )

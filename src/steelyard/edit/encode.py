"""Weight matrices as a codec holds them. Decides which tensors; what is lost is the codec's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Codec, Packed, Plan, Scheme
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import finite
from steelyard.edit.pack import hold
from steelyard.edit.prune import scoped


@dataclass(frozen=True)
class Encode(Step):
    """Hold every weight matrix and kernel by a lossy codec, such as `FloatGrid` or `Vectors`.

    Only floating-point tensors of at least `min_ndim` axes take part, where `Pack` means all; the others pass
    untouched.

    Raises WeightsError if no tensor takes part, CodecError, naming the tensor, for NaN or infinite weights and where a
    codec of the plan cannot hold it.

    >>> from steelyard.codecs.floatgrid import FloatGrid
    >>> w = Encode(FloatGrid("e2m1", 4))(Weights.of({"a": np.float32([[6, 0.4, -3, 1]]), "b": np.float32([0.1])}))
    >>> {name: x.tolist() for name, x in w.arrays().items()}
    {'a': [[6.0, 0.5, -3.0, 1.0]], 'b': [0.10000000149011612]}
    """

    name: ClassVar[str] = "encode"
    plan: Plan
    min_ndim: int = 2

    def __call__(self, weights: Weights) -> Weights:
        plan = Scheme(self.plan) if isinstance(self.plan, Codec) else self.plan
        chosen = {item.name for item in scoped(weights, self.min_ndim, "encoded")}
        return weights.with_items(
            item.then(partial(_held, item, plan), scheme=plan) if name in chosen else item
            for name, item in weights.items()
        )


def _held(weight: Weight, plan: Plan, x: np.ndarray) -> np.ndarray | Packed:
    return hold(weight, plan, finite(weight, x))

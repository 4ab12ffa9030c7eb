"""How tensors are held, and nothing about what they hold, unless a codec of the plan is lossy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Codec, Packed, Plan, Scheme, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.errors import CodecError, quoted


@dataclass(frozen=True)
class Pack(Step):
    """Hold every tensor as `plan` says: a codec, a nesting, the smallest of several, or None for plain arrays.

    With lossless codecs the values survive bit for bit. A tensor that is held in another way already is
    decoded first. Choose tensors with ``on(where(...), Pack(plan))``. Where the plan leaves a choice, it
    is made for each tensor when it is read; until then the weight's `scheme` is the plan itself.

    Raises CodecError, naming the tensor, where a codec of the plan cannot hold it.

    >>> from steelyard.core.packed import Smallest
    >>> w = Pack(Smallest((None,)))(Weights.of({"a": np.arange(3)}))
    >>> w["a"].array().tolist()
    [0, 1, 2]
    """

    name: ClassVar[str] = "pack"
    plan: Plan

    def __call__(self, weights: Weights) -> Weights:
        plan = self.plan
        scheme = Scheme(plan) if isinstance(plan, Codec) else plan
        return weights.with_items(item.then(partial(hold, item, plan), scheme=scheme) for item in weights.values())


def hold(weight: Weight, plan: Plan, x: np.ndarray) -> np.ndarray | Packed:
    """`x`, the values of `weight`, as `plan` says; a CodecError names the weight."""
    try:
        return pack(x, plan)
    except CodecError as error:
        raise CodecError(f"{weight.origin}: {quoted(weight.name)}: {error}") from error

"""The one step that is not lazy: it ends the repetition of everything before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.transform import Step
from steelyard.core.weights import Weights


@dataclass(frozen=True)
class Settle(Step):
    """Read everything now, once, and keep it in memory: later reads run no step before this one again.

    Every tensor stays held as it is (a packed one stays packed). All of them are in memory afterwards.

    >>> import numpy as np
    >>> Settle()(Weights.of({"a": np.zeros(3)}))
    Weights(1 tensor, 3 elements)
    """

    name: ClassVar[str] = "settle"

    def __call__(self, weights: Weights) -> Weights:
        return weights.settle()

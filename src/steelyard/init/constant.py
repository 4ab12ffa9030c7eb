"""No chance at all: every element the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.core.spec import Spec
from steelyard.init.base import Init


@dataclass(frozen=True)
class Constant(Init):
    """Every element is `value`, so its variance is 0. Units that start equal learn the same thing.

    >>> Constant(0.5)(Spec.of((2,), "float16"), np.random.default_rng()).tolist()
    [0.5, 0.5]
    """

    name: ClassVar[str] = "constant"
    value: float

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:  # noqa: ARG002
        return np.full(spec.shape, self.value).astype(spec.dtype.numpy)

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return 0.0


@dataclass(frozen=True)
class Zeros(Init):
    """Every element is 0: the usual start of biases.

    >>> Zeros()(Spec.of((2,), "float32"), np.random.default_rng()).tolist()
    [0.0, 0.0]
    """

    name: ClassVar[str] = "zeros"

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:  # noqa: ARG002
        return np.zeros(spec.shape, spec.dtype.numpy)

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return 0.0

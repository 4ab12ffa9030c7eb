"""The uniform distribution with bounds that do not depend on the shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import RecipeError
from steelyard.init.base import Init

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Uniform(Init):
    """Independent elements, uniform on [low, high): variance (high - low)^2 / 12.

    Raises RecipeError unless low <= high.

    >>> Uniform(-0.3, 0.3).variance(Spec.of((4, 4), "float32"))
    0.03
    """

    name: ClassVar[str] = "uniform"
    low: float = -0.05
    high: float = 0.05

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise RecipeError(f"the lower bound {self.low} is above the upper one, {self.high}")

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(self.low, self.high, spec.shape).astype(spec.dtype.numpy)

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return (self.high - self.low) ** 2 / 12

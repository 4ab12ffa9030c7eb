"""The normal distribution with a standard deviation that does not depend on the shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import RecipeError
from steelyard.init.base import Init

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Normal(Init):
    """Independent elements of N(mean, std^2); the default std = 0.02 is that of GPT-2 and BERT.

    Raises RecipeError for a negative `std`.

    >>> Normal(std=2.0).variance(Spec.of((4, 4), "float32"))
    4.0
    """

    name: ClassVar[str] = "normal"
    std: float = 0.02
    mean: float = 0.0

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise RecipeError(f"a standard deviation is not negative: {self.std}")

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return (generator.standard_normal(spec.shape) * self.std + self.mean).astype(spec.dtype.numpy)

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return self.std**2

"""The normal distribution without the rare large values of its tails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import RecipeError
from steelyard.init.base import Init, draw

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TruncatedNormal(Init):
    """Independent elements of a normal distribution cut at two of its standard deviations, mean 0.

    `std` is the standard deviation after the cut (the parent's is std / 0.8796); values lie within
    ±2.274 std. torch's trunc_normal_ takes the parent's, and bounds that are absolute.

    Raises RecipeError for a negative `std`.

    >>> TruncatedNormal(std=0.5).variance(Spec.of((4, 4), "float32"))
    0.25
    """

    name: ClassVar[str] = "truncated_normal"
    std: float = 0.02

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise RecipeError(f"a standard deviation is not negative: {self.std}")

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return draw(spec, generator, "truncated_normal", self.variance(spec))

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return self.std**2

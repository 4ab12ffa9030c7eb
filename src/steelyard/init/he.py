"""The variance that keeps a signal at scale through rectified units, of which half are silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.init.base import Distribution, Init, Mode, draw, fan

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class He(Init):
    """Var[w] = 2 / ((1 + slope^2) fan): for ReLU units, and leaky ones of the given negative `slope`.

    Args: `mode` 'fan_in' keeps the scale of activations, 'fan_out' that of gradients, 'fan_avg' takes the mean of
    both fans; `distribution` is normal (as in the paper), uniform or truncated_normal. torch's Linear starts with
    He(slope=sqrt(5), distribution='uniform').

    >>> He().variance(Spec.of((64, 8, 5, 5), "float32"))
    0.01

    Source: He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", ICCV 2015, equations 10, 14 and 15.
    """

    name: ClassVar[str] = "he"
    slope: float = 0.0
    mode: Mode = "fan_in"
    distribution: Distribution = "normal"

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return draw(spec, generator, self.distribution, self.variance(spec))

    def variance(self, spec: Spec) -> float:
        return 2 / ((1 + self.slope**2) * fan(spec, self.mode))

"""A variance between what keeps activations and what keeps gradients at scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.init.base import Distribution, Gain, Init, draw, fans, number

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Xavier(Init):
    """Var[w] = gain^2 2 / (fan_in + fan_out): for linear, tanh and sigmoid units.

    Args: `gain` makes up for the slope of the activation (5/3 is usual for tanh); 'auto', in `steelyard.init_`,
    for the scale of the one that follows the layer. `distribution` is uniform (as in the paper), normal or
    truncated_normal.

    >>> Xavier().variance(Spec.of((30, 70), "float32"))
    0.02

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010, equation 16.
    """

    name: ClassVar[str] = "xavier"
    gain: Gain = 1.0
    distribution: Distribution = "uniform"

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return draw(spec, generator, self.distribution, self.variance(spec))

    def variance(self, spec: Spec) -> float:
        return number(self.gain) ** 2 * 2 / max(sum(fans(spec)), 1)

"""The variance that keeps a sum of independent inputs at their scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.init.base import Distribution, Gain, Init, Mode, draw, fan, number

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LeCun(Init):
    """Var[w] = gain^2 / fan: for linear, scaled tanh and SELU units, and with the right gain for any.

    Args: `gain` makes up for the activation (see `steelyard.gain`); 'auto', in `steelyard.init_`, for the one that
    follows the layer. `mode` is fan_in (as in the paper), fan_out or fan_avg, the mean of both; `distribution` is
    normal, uniform or truncated_normal. Keras' VarianceScaling(scale, mode, distribution) is
    LeCun(sqrt(scale), mode, distribution).

    >>> LeCun().variance(Spec.of((10, 50), "float32"))
    0.02

    Source: LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, equation 16.
    """

    name: ClassVar[str] = "lecun"
    gain: Gain = 1.0
    mode: Mode = "fan_in"
    distribution: Distribution = "normal"

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        return draw(spec, generator, self.distribution, self.variance(spec))

    def variance(self, spec: Spec) -> float:
        return number(self.gain) ** 2 / fan(spec, self.mode)

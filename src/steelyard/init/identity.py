"""What goes in comes out: the layer does nothing at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.init.base import Gain, Init, at_centre, number, outputs_and_inputs

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Identity(Init):
    """`gain` where input and output have the same number, at the centre of the kernel, and 0 elsewhere; no chance.

    A convolution with an odd kernel and padding of half of it then returns its input. Outputs beyond the number of
    inputs are 0. The gain 'auto', in `steelyard.init_`, is that of the activation which follows the layer.

    Raises WeightsError for fewer than two axes.

    >>> import numpy as np
    >>> Identity()(Spec.of((2, 3), "float32"), np.random.default_rng()).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    Source: Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units",
    arXiv:1504.00941, 2015; for convolutions: Zagoruyko and Komodakis, "DiracNets", arXiv:1706.00388, 2017.
    """

    name: ClassVar[str] = "identity"
    gain: Gain = 1.0

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:  # noqa: ARG002
        import numpy as np

        rows, columns = outputs_and_inputs(spec)
        return at_centre(spec, number(self.gain) * np.eye(rows, columns))

    def variance(self, spec: Spec) -> float:  # noqa: ARG002
        return 0.0

"""Orthonormal at the centre of the kernel: a convolution keeps the length of every pixel, whatever its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.spec import Spec
from steelyard.init.base import Gain, Init, at_centre, number, orthonormal, outputs_and_inputs

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DeltaOrthogonal(Init):
    """A kernel that is 0 but at its centre, where it has orthonormal columns (rows, if there are fewer), times `gain`.

    With at least as many outputs as inputs a convolution (out, in, *kernel) keeps the norm of its input exactly, so
    that plain convolutional nets of 10,000 layers train. Of a matrix it is `Orthogonal`. The mean of the squares of
    all elements is exactly gain^2 / (max(out, in) kernel). The gain 'auto', in `steelyard.init_`, is that of the
    activation which follows the layer.

    Raises WeightsError for fewer than two axes.

    >>> import numpy as np
    >>> w = DeltaOrthogonal()(Spec.of((4, 2, 3), "float64"), np.random.default_rng(0))
    >>> bool(np.allclose(w[..., 1].T @ w[..., 1], np.eye(2))), float(np.abs(w[..., ::2]).max())
    (True, 0.0)

    Source: Xiao, Bahri, Sohl-Dickstein, Schoenholz and Pennington, "Dynamical Isometry and a Mean Field Theory of
    CNNs: How to Train 10,000-Layer Vanilla Convolutional Neural Networks", ICML 2018, algorithm 1.
    """

    name: ClassVar[str] = "delta_orthogonal"
    gain: Gain = 1.0

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        import numpy as np

        return self.drawn(spec, generator, np.linalg.qr)

    def drawn(self, spec: Spec, generator: np.random.Generator, qr: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The same by another routine for the QR factors (q, r) of a matrix with rows >= columns."""
        import numpy as np

        rows, columns = outputs_and_inputs(spec)
        if not spec.size:
            return at_centre(spec, np.zeros((rows, columns)))
        return at_centre(spec, number(self.gain) * orthonormal(rows, columns, generator, qr))

    def variance(self, spec: Spec) -> float:
        rows, columns = outputs_and_inputs(spec)
        return number(self.gain) ** 2 / max(max(rows, columns) * math.prod(spec.shape[2:]), 1)

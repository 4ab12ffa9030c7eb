"""Rows or columns that are orthonormal: a signal keeps its length, not only on average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import WeightsError
from steelyard.init.base import Gain, Init, number, orthonormal

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Orthogonal(Init):
    """A matrix drawn uniformly from those with orthonormal rows (or columns, of which there are fewer), times `gain`.

    A convolution (out, in, *kernel) is taken as the matrix (out, in x kernel). Every element has the variance
    gain^2 / max(rows, columns), and the mean of the squares of all of them is exactly that.

    The gain 'auto', in `steelyard.init_`, is that of the activation which follows the layer.

    Raises WeightsError for fewer than two axes.

    >>> import numpy as np
    >>> q = Orthogonal()(Spec.of((3, 5), "float64"), np.random.default_rng(0))
    >>> bool(np.allclose(q @ q.T, np.eye(3)))
    True

    Source: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
    linear neural networks", arXiv:1312.6120, 2013; the signs that make the QR factor uniform: Mezzadri,
    "How to generate random matrices from the classical compact groups", 2007.
    """

    name: ClassVar[str] = "orthogonal"
    gain: Gain = 1.0

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        import numpy as np

        return self.drawn(spec, generator, np.linalg.qr)

    def drawn(self, spec: Spec, generator: np.random.Generator, qr: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The same by another routine for the QR factors (q, r) of a matrix with rows >= columns."""
        import numpy as np

        rows, columns = _matrix(spec)
        if not spec.size:
            return np.zeros(spec.shape, spec.dtype.numpy)
        values = number(self.gain) * orthonormal(rows, columns, generator, qr)
        return np.ascontiguousarray(values).reshape(spec.shape).astype(spec.dtype.numpy)

    def variance(self, spec: Spec) -> float:
        return number(self.gain) ** 2 / max(*_matrix(spec), 1)


def _matrix(spec: Spec) -> tuple[int, int]:
    if len(spec.shape) < 2:
        raise WeightsError(f"orthogonal rows need a tensor of two axes or more, not {spec}")
    return spec.shape[0], math.prod(spec.shape[1:])

"""What initialisers share: their interface, fans, distributions of a given variance, and streams of chance."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steelyard.core.spec import Spec
from steelyard.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    import numpy as np

Distribution = Literal["normal", "uniform", "truncated_normal"]
Mode = Literal["fan_in", "fan_out", "fan_avg"]
Gain = float | Literal["auto"]

# The standard deviation of a standard normal variable given that it lies within ±2:
# sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


class Init(ABC):
    """Starting values for a tensor. Final subclasses are frozen dataclasses; their fields are the settings."""

    name: ClassVar[str]  # its row in the table of initialisers

    @abstractmethod
    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        """Values of `spec`; raises WeightsError for a shape that the scheme does not speak of."""

    @abstractmethod
    def variance(self, spec: Spec) -> float:
        """The variance of one element before it is rounded to the dtype."""


def generator(seed: int, name: str) -> np.random.Generator:
    """The random stream of one tensor: counter-based, keyed by SHA-256 of the seed and the name.

    The same on every platform, whatever was drawn before and for whom. The raw bits are fixed for good
    (Philox 4x64, 10 rounds); numpy may revise how it turns them into normal numbers in a new release.

    >>> generator(0, "fc.weight").integers(1000, size=3).tolist()
    [225, 697, 186]

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    import numpy as np

    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def fans(spec: Spec) -> tuple[int, int]:
    """Inputs that each output sums, and outputs that each input feeds.

    For a matrix (out, in), and for a convolution (out, in per group, *kernel) each times the kernel's size.

    >>> fans(Spec.of((64, 3, 5, 5), "float32"))
    (75, 1600)

    Raises WeightsError for fewer than two axes.
    """
    if len(spec.shape) < 2:
        raise WeightsError(f"fan in and fan out need a tensor (out, in, *kernel), not {spec}; use zeros or constant")
    field = math.prod(spec.shape[2:])
    return spec.shape[1] * field, spec.shape[0] * field


def fan(spec: Spec, mode: Mode) -> float:
    """One of the two fans or their mean, at least 1; raises RecipeError for another mode."""
    inputs, outputs = fans(spec)
    known = {"fan_in": inputs, "fan_out": outputs, "fan_avg": (inputs + outputs) / 2}
    if mode not in known:
        raise RecipeError(f"the mode is fan_in, fan_out or fan_avg, not {mode!r}")
    return max(known[mode], 1)


def number(gain: Gain) -> float:
    """The gain as a number; raises RecipeError for 'auto', which only a model can make one."""
    if gain == "auto":
        raise RecipeError("gain='auto' is that of the activation after a layer, so it needs a model: use init_")
    return gain


def at_centre(spec: Spec, matrix: np.ndarray) -> np.ndarray:
    """A kernel (out, in, *kernel) of zeros with the matrix (out, in) at its centre, n // 2 of each axis of the kernel.

    >>> import numpy as np
    >>> at_centre(Spec.of((1, 2, 3), "float32"), np.ones((1, 2))).tolist()
    [[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    import numpy as np

    values = np.zeros(spec.shape, spec.dtype.numpy)
    if spec.size:
        middle: Any = (..., *(size // 2 for size in spec.shape[2:]))
        values[middle] = matrix
    return values


def outputs_and_inputs(spec: Spec) -> tuple[int, int]:
    """The first two axes of a matrix or a convolution; raises WeightsError for fewer."""
    fans(spec)
    return spec.shape[0], spec.shape[1]


def orthonormal(rows: int, columns: int, generator: np.random.Generator, qr: Callable[[np.ndarray], Any]) -> np.ndarray:
    """A matrix drawn uniformly from those with orthonormal rows, or columns if there are fewer.

    `qr` gives the factors (q, r) of a matrix with rows >= columns; their signs are made those of a uniform one.
    """
    import numpy as np

    q, r = qr(generator.standard_normal((max(rows, columns), min(rows, columns))))
    q = np.asarray(q * np.sign(np.diag(r)))
    return q if rows >= columns else q.T


def draw(spec: Spec, generator: np.random.Generator, distribution: Distribution, variance: float) -> np.ndarray:
    """Independent elements of mean 0 and the given variance.

    'uniform' lies within ±sqrt(3 variance); 'truncated_normal' is a normal distribution cut at two of its
    standard deviations, which are so much larger that `variance` is what is left after the cut.
    """
    std = math.sqrt(variance)
    if distribution == "normal":
        values = generator.standard_normal(spec.shape) * std
    elif distribution == "uniform":
        values = generator.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, spec.shape)
    elif distribution == "truncated_normal":
        values = _truncated(spec, generator) * (std / TRUNCATED_STD)
    else:
        raise RecipeError(f"the distribution is normal, uniform or truncated_normal, not {distribution!r}")
    return values.astype(spec.dtype.numpy)


def _truncated(spec: Spec, generator: np.random.Generator) -> np.ndarray:
    """Standard normal numbers within ±2: those outside are drawn again."""
    import numpy as np

    values = generator.standard_normal(spec.size)
    while (outside := np.flatnonzero(np.abs(values) > 2)).size:
        values[outside] = generator.standard_normal(outside.size)
    return values.reshape(spec.shape)

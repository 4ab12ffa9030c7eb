"""Each unit listens to few others, with weights that do not shrink as the layer grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import RecipeError
from steelyard.init.base import Init, fans

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sparse(Init):
    """Exactly `connections` weights into each unit are drawn from N(0, std^2), the others are 0.

    Which ones is drawn for each unit. A unit with fewer inputs has them all. The variance of one element is
    std^2 min(connections, inputs) / inputs. torch's sparse_ sets a share of each *input's* weights to zero instead,
    so that the number of connections of a unit is left to chance.

    Raises RecipeError for a negative `std` or less than one connection, WeightsError for fewer than two axes.

    >>> import numpy as np
    >>> w = Sparse(3)(Spec.of((50, 20), "float32"), np.random.default_rng(0))
    >>> (w != 0).sum(1).tolist() == [3] * 50
    True

    Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 5; the unit variance: Sutskever
    et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    name: ClassVar[str] = "sparse"
    connections: int = 15
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise RecipeError(f"a standard deviation is not negative: {self.std}")
        if self.connections < 1:
            raise RecipeError(f"a unit has at least 1 connection, not {self.connections}")

    def __call__(self, spec: Spec, generator: np.random.Generator) -> np.ndarray:
        import numpy as np

        inputs, _ = fans(spec)
        rows, kept = spec.shape[0], min(self.connections, inputs)
        values = np.zeros((rows, inputs), spec.dtype.numpy)
        if spec.size:
            chosen = np.argpartition(generator.random((rows, inputs)), kept - 1, axis=1)[:, :kept]
            np.put_along_axis(values, chosen, generator.standard_normal((rows, kept)) * self.std, axis=1)
        return values.reshape(spec.shape)

    def variance(self, spec: Spec) -> float:
        inputs, _ = fans(spec)
        return self.std**2 * min(self.connections, inputs) / max(inputs, 1) if math.prod(spec.shape) else 0.0

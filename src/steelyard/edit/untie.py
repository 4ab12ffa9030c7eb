"""Further names as tensors of their own, for readers that know no ties. Decides by names; reads no values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from steelyard.core.transform import Step
from steelyard.core.weights import Weights


@dataclass(frozen=True)
class Untie(Step):
    """Make each further name a tensor of its own, after all others; what shared values holds them twice then.

    Such a tensor is read and held like the one whose name it shared. Weights without ties pass untouched.

    >>> import numpy as np
    >>> w = Untie()(Weights.of({"embed": np.ones(2), "norm": np.ones(1)}, ties={"head": "embed"}))
    >>> list(w), dict(w.ties), w["head"].array().tolist()
    (['embed', 'norm', 'head'], {}, [1.0, 1.0])
    """

    name: ClassVar[str] = "untie"

    def __call__(self, weights: Weights) -> Weights:
        if not weights.ties:
            return weights
        own = [replace(weights[alias], name=alias, stored=None) for alias in weights.ties]
        return Weights([*weights.values(), *own], meta=weights.meta)

"""Tensors that a step would make larger in a file stay as they are. Decides by bytes, those of the header included."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Packed, Smallest
from steelyard.core.spec import Spec
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.errors import RecipeError, WeightsError
from steelyard.formats.layout import described

SMALL = 1 << 20  # bytes of a value that is kept until it is known whether it stays


@dataclass(frozen=True)
class Spare(Step):
    """Apply `step`, but leave alone what it would encode in no fewer bytes than it has: small tensors, mostly.

    A codebook, scales and the description of a codec take bytes of their own, so that a tensor of a few elements is
    smaller, and exact, as it was. What a step leaves plain is not compared: that is no way of making it smaller.

    Raises WeightsError for a step that changes names or their order.

    >>> from steelyard.edit.quantize import Quantize
    >>> small, large = np.float32([[-1, 0.4, 1]]), np.float32(np.arange(4096).reshape(64, 64) % 7)
    >>> w = Spare(Quantize(2))(Weights.of({"small": small, "large": large}))
    >>> w["small"].array().tolist(), w["large"].read().nbytes
    ([[-1.0, 0.4000000059604645, 1.0]], 518)
    """

    name: ClassVar[str] = "spare"
    step: Step

    def __post_init__(self) -> None:
        if not callable(self.step):
            raise RecipeError(f"step: expected a step such as Quantize(4), found {self.step!r}")

    def __call__(self, weights: Weights) -> Weights:
        seen = _Seen()
        watched = weights.with_items(replace(item, read=partial(seen.read, item)) for item in weights.values())
        made = self.step(watched)
        if list(made) != list(weights):
            raise WeightsError(f"the step {self.step.name} changes names or their order, and nothing can be spared")

        def one(name: str, new: Weight) -> Weight:
            old = weights[name]
            if new is watched[name]:
                return old
            if new.scheme is None:
                return new
            return replace(new, read=partial(seen.smaller, old, new), scheme=Smallest((new.scheme, old.scheme)))

        return made.with_items(one(name, new) for name, new in made.items())


class _Seen(threading.local):
    """The small value that was read last, in each thread: what a step has read of such a tensor is not read again."""

    last: tuple[Weight, np.ndarray | Packed] | None = None

    def read(self, weight: Weight) -> np.ndarray | Packed:
        value = weight.read()
        self.last = (weight, value) if value.nbytes <= SMALL else None
        return value

    def smaller(self, old: Weight, new: Weight) -> np.ndarray | Packed:
        """The value of whichever takes fewer bytes in a file; of the old one if both take as many."""
        found = new.read()
        last, self.last = self.last, None
        if old.scheme is None and _bytes(new.name, found) < described(old.name, old.spec):
            return found
        kept = last[1] if last is not None and last[0] is old else old.read()
        return found if _bytes(new.name, found) < _bytes(old.name, kept) else kept


def _bytes(name: str, value: np.ndarray | Packed) -> int:
    return described(name, value if isinstance(value, Packed) else Spec.like(value))

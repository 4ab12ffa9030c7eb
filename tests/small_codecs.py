"""Two small codecs: one that halves, one that takes a tensor apart. The nouns are tested without the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.core.packed import Codec
from steelyard.errors import CodecError


@dataclass(frozen=True)
class Scaled(Codec):
    """Holds x / factor."""

    name: ClassVar[str] = "scaled"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("values",)
    factor: float = 2.0

    def __post_init__(self):
        if self.factor == 0:
            raise CodecError("the factor must not be 0")

    def encode(self, x):
        if x.dtype.kind != "f":
            raise CodecError(f"scaled cannot hold {x.dtype}")
        return {"values": (x / self.factor).astype(x.dtype)}

    def decode(self, parts, spec):
        return (parts["values"] * self.factor).astype(spec.dtype.numpy)


@dataclass(frozen=True)
class Split(Codec):
    """Holds the two halves of a flat tensor; its left half is scaled unless a scheme says otherwise."""

    name: ClassVar[str] = "split"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("left", "right")
    inner: ClassVar[Mapping[str, Codec]] = {"left": Scaled()}

    def encode(self, x):
        half = x.size // 2
        return {"left": x.ravel()[:half], "right": x.ravel()[half:]}

    def decode(self, parts, spec):
        return np.concatenate([parts["left"], parts["right"]]).reshape(spec.shape)


CODECS = {"scaled": Scaled, "split": Split}

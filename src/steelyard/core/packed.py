"""How one tensor is held: a codec and its named parts, and a part may itself be encoded.

Compression is two halves: a lossy projection and a lossless encoding of what it left. Deep Compression
is then a nesting (mask, codebook, entropy code), not a class: ``nest(Bitmask(), mask=Entropy(),
values=nest(Palette(k=16), codes=Entropy()))``. Knows nothing of files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import CodecError, UnknownNameError

if TYPE_CHECKING:
    import numpy as np


class Codec(ABC):
    """One way to hold a tensor. Final subclasses are frozen dataclasses; their fields are the configuration."""

    name: ClassVar[str]  # its row in the table of codecs
    lossless: ClassVar[bool]  # decode(encode(x)) == x, bit for bit, for every x that it accepts
    parts: ClassVar[tuple[str, ...]]  # the names that encode() may return
    inner: ClassVar[Mapping[str, Codec]] = {}  # how a part is held where a scheme does not say
    encodes: ClassVar[bool] = True  # False: what others wrote is decoded, encode() always raises
    settled: ClassVar[bool] = True  # encoding what was decoded gives the same, bit for bit; else it moves a little

    @abstractmethod
    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The parts that hold `x`; raises CodecError for a tensor that it cannot hold."""

    @abstractmethod
    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec` that `parts` hold; raises CodecError if they contradict each other."""


@dataclass(frozen=True)
class Scheme:
    """A codec, and how each of its parts is held in turn (None: plain); the codec knows for the unnamed ones."""

    codec: Codec
    parts: Mapping[str, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in self.codec.parts:
                raise UnknownNameError(f"part of {self.codec.name}", name, self.codec.parts)


@dataclass(frozen=True)
class Smallest:
    """Whichever of the options takes the fewest bytes for the tensor at hand, description included."""

    options: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise CodecError("the smallest of no options: name at least one")


Plan = Scheme | Smallest | Codec | None  # None: the plain array


def nest(codec: Codec, **parts: Plan) -> Scheme:
    """A scheme: `codec`, with the named parts held as said."""
    return Scheme(codec, parts)


def smallest(*options: Plan) -> Smallest:
    """A plan that tries each option on each tensor; ``None`` stands for leaving it plain."""
    return Smallest(options)


@dataclass(frozen=True, eq=False)
class Packed:
    """An encoded tensor."""

    spec: Spec
    codec: Codec
    parts: Mapping[str, np.ndarray | Packed]

    def array(self) -> np.ndarray:
        """The decoded tensor; raises CodecError if the parts do not give what `spec` says."""
        plain = {name: p.array() if isinstance(p, Packed) else p for name, p in self.parts.items()}
        array = self.codec.decode(plain, self.spec)
        if array.shape != self.spec.shape or array.dtype != self.spec.dtype.numpy:
            raise CodecError(f"{self.codec.name}: expected {self.spec}, decoded {array.dtype}{list(array.shape)}")
        return array

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(p.nbytes if isinstance(p, Packed) else Spec.like(p).nbytes for p in self.parts.values())

    @property
    def scheme(self) -> Scheme:
        """How this tensor is held, all choices made."""
        return Scheme(self.codec, {n: p.scheme if isinstance(p, Packed) else None for n, p in self.parts.items()})


def pack(x: np.ndarray, plan: Plan) -> np.ndarray | Packed:
    """Hold `x` as `plan` says; raises CodecError if a codec cannot hold it."""
    if plan is None:
        return x
    if isinstance(plan, Smallest):
        return min((pack(x, option) for option in plan.options), key=_cost)
    scheme = Scheme(plan) if isinstance(plan, Codec) else plan
    parts = scheme.codec.encode(x)
    if not set(parts) <= set(scheme.codec.parts):
        raise CodecError(f"{scheme.codec.name} returned parts {sorted(parts)}, declared {scheme.codec.parts}")
    plans = {**scheme.codec.inner, **scheme.parts}
    held = {name: pack(part, plans.get(name)) for name, part in parts.items()}
    return Packed(Spec.like(x), scheme.codec, held)


def _cost(value: np.ndarray | Packed) -> int:
    """Bytes in a file: those of the arrays, some 80 that name each of them and some 40 that describe each codec."""
    if not isinstance(value, Packed):
        return Spec.like(value).nbytes + 80
    return 40 + sum(_cost(part) for part in value.parts.values())

"""How one tensor is held: a codec and its named parts, and a part may itself be encoded.

Compression is two halves: a lossy projection and a lossless encoding of what it left. Deep Compression
is then a nesting (mask, codebook, entropy code), not a class: ``nest(Bitmask(), mask=Entropy(),
values=nest(Palette(k=16), codes=Entropy()))``. Knows nothing of files; `dismantle` and `assemble` are
what every container uses to store a nesting as plain arrays and one JSON-able description.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.spec import Spec
from steelyard.errors import CodecError, UnknownNameError

if TYPE_CHECKING:
    import numpy as np

MAX_DEPTH = 32  # of codecs in codecs: a hostile file must not exhaust the stack


class Codec(ABC):
    """One way to hold a tensor. Final subclasses are frozen dataclasses; their fields are the configuration."""

    name: ClassVar[str]  # its row in the table of codecs
    lossless: ClassVar[bool]  # decode(encode(x)) == x, bit for bit, for every x that it accepts
    parts: ClassVar[tuple[str, ...]]  # the names that encode() may return
    inner: ClassVar[Mapping[str, Codec]] = {}  # how a part is held where a scheme does not say

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
    """Bytes in a file: the parts and what describes them (a container needs some 60 bytes an array)."""
    if not isinstance(value, Packed):
        return Spec.like(value).nbytes + 60
    layout, leaves = dismantle("", value)
    return value.nbytes + len(json.dumps(layout)) + 60 * len(leaves)


def dismantle(name: str, packed: Packed) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A description that is JSON, and the plain arrays it speaks of by key; `assemble` is the inverse."""
    from steelyard.core.recipe import to_data

    parts: dict[str, Any] = {}
    leaves: dict[str, np.ndarray] = {}
    for part, value in packed.parts.items():
        key = f"{name}/{part}"
        if isinstance(value, Packed):
            parts[part], below = dismantle(key, value)
            leaves.update(below)
        else:
            parts[part], leaves[key] = key, value
    spec = {"shape": list(packed.spec.shape), "dtype": packed.spec.dtype.name}
    return {**spec, "codec": to_data(packed.codec), "parts": parts}, leaves


@dataclass(frozen=True)
class Layout:
    """A parsed description of one packed tensor: all that a file's header tells."""

    spec: Spec
    scheme: Scheme
    leaves: Mapping[str, str | Layout]  # part -> the key of its array, or the part's own layout

    @staticmethod
    def parse(data: object, codec: Callable[[object, str], Codec], at: str) -> Layout:
        """Read a description; `codec` turns its data into a codec. Raises CodecError naming the place."""
        if at.count(".parts.") > MAX_DEPTH:
            raise CodecError(f"{at[:80]}...: codecs are nested more than {MAX_DEPTH} deep")
        if not isinstance(data, dict) or set(data) != {"shape", "dtype", "codec", "parts"}:
            raise CodecError(f"{at}: expected an object of shape, dtype, codec and parts")
        shape, parts = data["shape"], data["parts"]
        if not isinstance(shape, list) or not isinstance(data["dtype"], str) or not isinstance(parts, dict):
            raise CodecError(f"{at}: expected a list as shape, a name as dtype and an object as parts")
        found = codec(data["codec"], f"{at}.codec")
        leaves: dict[str, str | Layout] = {}
        for part, below in parts.items():
            leaves[part] = below if isinstance(below, str) else Layout.parse(below, codec, f"{at}.parts.{part}")
        inner = {part: below.scheme if isinstance(below, Layout) else None for part, below in leaves.items()}
        unknown = set(leaves) - set(found.parts)
        if unknown:
            raise CodecError(f"{at}: {found.name} has no part {sorted(unknown)[0]!r}")
        return Layout(Spec.of(tuple(shape), data["dtype"]), Scheme(found, inner), leaves)

    def keys(self) -> list[str]:
        """The keys of all arrays below, in order."""
        return [k for v in self.leaves.values() for k in ([v] if isinstance(v, str) else v.keys())]

    def assemble(self, read: Callable[[str], np.ndarray]) -> Packed:
        """The packed tensor, its arrays fetched by key."""
        parts = {n: read(v) if isinstance(v, str) else v.assemble(read) for n, v in self.leaves.items()}
        return Packed(self.spec, self.scheme.codec, parts)

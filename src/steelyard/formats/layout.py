"""How a packed tensor is described in a file: which codec, and which arrays of the file are its parts.

A layout is ``[codec, dtype, shape, {part: layout or key of an array}]``. An empty key stands for the usual one,
``name/part/part``: in small files every byte of the header counts. In place of a key may stand ``[key, sum]``, or the
sum alone for the usual key: the CRC-32 of the array, which is checked when it is read. Knows the description, and no
container.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steelyard.core.packed import Codec, Packed, Scheme
from steelyard.core.recipe import to_data
from steelyard.core.spec import Spec
from steelyard.errors import CodecError, DamageError, quoted
from steelyard.formats.base import flat_bytes

if TYPE_CHECKING:
    import numpy as np

SHORT = 1 << 16  # bytes of an array that is laid beside others
MAX_DEPTH = 32  # of codecs in codecs: a hostile file must not exhaust the stack


def summed(array: np.ndarray) -> int:
    """The CRC-32 of the elements of an array in C order, little-endian."""
    return zlib.crc32(flat_bytes(array))


def check_sum(array: np.ndarray, told: int, part: str) -> None:
    """Raise DamageError for an array whose sum is not `told`."""
    if (found := summed(array)) != told:
        text = f"the bytes of the part {part!r} are not those that were written: their CRC-32 is {found:08x}, expected "
        raise DamageError(f"{text}{told:08x}")


def checked_sum(data: Any, at: str) -> int:
    """A sum as a file tells it; raises CodecError for what is none."""
    if type(data) is not int or not 0 <= data < 1 << 32:
        raise CodecError(f"{at}: expected a CRC-32 from 0 to 4294967295")
    return data


def sum_of_all(told: Any, arrays: Iterable[tuple[str, Spec]]) -> int:
    """The CRC-32 of all that a file says: what is `told` of packed tensors, and what each array is, by name.

    Of what is said and not of how: the order of the arrays and the spelling of the header are a writer's own.

    >>> sum_of_all({}, [("b", Spec.of((2,), "uint8")), ("a", Spec.of((), "float32"))])
    4202683340
    """
    said = [told, *([name, spec.dtype.name, list(spec.shape)] for name, spec in sorted(arrays, key=lambda x: x[0]))]
    lines = "\n".join(compact_json(data, hostile=True) for data in said)
    return zlib.crc32(lines.encode("utf-8", "surrogatepass"))


def compact_json(data: Any, *, hostile: bool = False) -> str:
    """JSON in as few bytes as it needs, as UTF-8 where the text can be encoded; hostile: it may hold infinities."""
    return json.dumps(data, ensure_ascii=False, allow_nan=hostile, separators=(",", ":"))


def with_sums(layout: list[Any], usual: str, sums: Mapping[str, int]) -> list[Any]:
    """A layout as `dismantle` makes it, under the name `usual`, with the sums of arrays beside their keys."""
    parts: dict[str, Any] = {}
    for part, below in layout[3].items():
        key = f"{usual}/{part}"
        if not isinstance(below, str):
            parts[part] = with_sums(below, key, sums)
        else:
            parts[part] = [below, sums[below]] if below else sums[key]
    return [*layout[:3], parts]


def dismantle(name: str, packed: Packed, usual: str | None = None) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The layout of a packed tensor, and its arrays by key; `Layout.parse` and `assemble` are the inverse.

    Keys begin with `name`; those that would be the same under `usual` (None: `name`) are left empty in the layout.
    """
    usual = name if usual is None else usual
    parts: dict[str, Any] = {}
    leaves: dict[str, np.ndarray] = {}
    for part, value in packed.parts.items():
        key, expected = f"{name}/{part}", f"{usual}/{part}"
        if isinstance(value, Packed):
            parts[part], below = dismantle(key, value, expected)
            leaves.update(below)
        else:
            parts[part], leaves[key] = "" if key == expected else key, value
    return [to_data(packed.codec), packed.spec.dtype.name, list(packed.spec.shape), parts], leaves


def described(name: str, value: Spec | Packed) -> int:
    """About how many bytes a tensor, plain or packed, takes in a safetensors file with all that the header says of it.

    >>> described("w", Spec.of((3,), "float32"))
    67
    """
    if not isinstance(value, Packed):
        return value.nbytes + _entry(name, value)
    layout, leaves = dismantle(name, value)
    if alone(layout, leaves):
        ((_, only),) = leaves.items()
        return only.size + len(json.dumps({name: [only.size, *layout[2]]}, separators=(",", ":")))
    text = len(json.dumps(json.dumps({name: layout}, separators=(",", ":"))))
    return text + sum(_entry(key, Spec.like(x)) + Spec.like(x).nbytes for key, x in leaves.items())


def _entry(key: str, spec: Spec) -> int:
    """The bytes that the header of a file spends on an array."""
    said = {key: {"dtype": spec.dtype.safetensors, "shape": list(spec.shape), "data_offsets": [0, spec.nbytes]}}
    return len(json.dumps(said, separators=(",", ":")))


def alone(layout: list[Any], leaves: Mapping[str, np.ndarray]) -> bool:
    """Whether a packed tensor has one part only, of few bytes and with no codec within: it can lie beside others."""
    if len(leaves) != 1 or not isinstance(next(iter(layout[3].values())), str):
        return False
    (array,) = leaves.values()
    return array.dtype == "uint8" and array.ndim == 1 and array.size <= SHORT


@dataclass(frozen=True)
class Layout:
    """A parsed layout: all that a file's header tells of one packed tensor."""

    spec: Spec
    scheme: Scheme
    leaves: Mapping[str, str | Layout]  # part -> the key of its array, or the part's own layout
    sums: Mapping[str, int] = field(default_factory=dict)  # part -> the CRC-32 of its array, where it is told

    @staticmethod
    def parse(data: object, usual: str, codec: Callable[[object, str], Codec], at: str) -> Layout:
        """Read a layout; `usual` is what empty keys begin with, `codec` turns its data into a codec.

        Raises CodecError, or what `codec` raises, naming the place.
        """
        if at.count(".parts.") > MAX_DEPTH:
            raise CodecError(f"{at[:80]}...: codecs are nested more than {MAX_DEPTH} deep")
        if not isinstance(data, list) or len(data) != 4:
            raise CodecError(f"{at}: expected [codec, dtype, shape, parts]")
        named, dtype, shape, parts = data
        if not isinstance(shape, list) or not isinstance(dtype, str) or not isinstance(parts, dict):
            raise CodecError(f"{at}: expected a name as dtype, a list as shape and an object as parts")
        found = codec(named, f"{at}.codec")
        leaves: dict[str, str | Layout] = {}
        sums: dict[str, int] = {}
        for part, below in parts.items():
            if part not in found.parts:
                raise CodecError(f"{at}: {found.name} has no part {quoted(part)}")
            key = f"{usual}/{part}"
            if type(below) is int:
                below = ["", below]
            if isinstance(below, list) and len(below) == 2:
                below, sums[part] = below[0], checked_sum(below[1], f"{at}.parts.{part}")
            parsed = (below or key) if isinstance(below, str) else Layout.parse(below, key, codec, f"{at}.parts.{part}")
            leaves[part] = parsed
        inner = {part: below.scheme if isinstance(below, Layout) else None for part, below in leaves.items()}
        return Layout(Spec.of(tuple(shape), dtype), Scheme(found, inner), leaves, sums)

    def keys(self) -> list[str]:
        """The keys of all arrays below, in order."""
        return [k for v in self.leaves.values() for k in ([v] if isinstance(v, str) else v.keys())]

    def assemble(self, read: Callable[[str], np.ndarray]) -> Packed:
        """The packed tensor, its arrays fetched by key; raises DamageError for one whose sum is another."""
        parts = {n: read(v) if isinstance(v, str) else v.assemble(read) for n, v in self.leaves.items()}
        for part, told in self.sums.items():
            array = parts[part]
            if not isinstance(array, Packed):  # of which the arrays have been checked
                check_sum(array, told, part)
        return Packed(self.spec, self.scheme.codec, parts)

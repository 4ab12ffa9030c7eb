"""What a container cannot say by itself: packed tensors, ties and, where it would be lost, their order.

One JSON text under the key ``steelyard``, the same in every container::

    {"version": 1, "packed": {name: layout}, "ties": {alias: name}, "order": [name, ...],
     "joined": {key: [codec, dtype, part, {name: [bytes, *shape]}, [sum, ...]]}, "sum": sum of all that is said}

Only what is needed is there; where nothing is needed there is no text. Joined are packed tensors of one codec whose
only part is a few bytes: these lie one after the other in the array of that key, because a header entry for each
would be longer than they are. Sums are the CRC-32 of the bytes of each, and of this text with the names, types and
shapes of all arrays, where a container has none of its own. The text is the authority for how arrays belong together,
not the spelling of keys. Knows nothing of files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from steelyard.codecs import CODECS
from steelyard.core.packed import Codec, Packed
from steelyard.core.recipe import Reader
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import DamageError, FormatError, SteelyardError, printable, quoted
from steelyard.formats.layout import (
    Layout,
    alone,
    checked_sum,
    compact_json,
    dismantle,
    sum_of_all,
    summed,
    with_sums,
)

if TYPE_CHECKING:
    import numpy as np

KEY = "steelyard"
JOINED = "joined by steelyard"  # the array of several packed tensors: known by its name should the text be lost
VERSION = 1


@dataclass(frozen=True)
class Slice:
    """The bytes of an array that are the only part of a packed tensor."""

    begin: int
    end: int
    layout: Layout


@dataclass(frozen=True)
class Manifest:
    """The parsed text."""

    packed: Mapping[str, Layout] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # what one container adds for itself
    joined: Mapping[str, Mapping[str, Slice]] = field(default_factory=dict)  # key of an array -> what lies in it
    sealed: tuple[int, Any] | None = None  # the sum of all that the file says, and what the text says besides

    @staticmethod
    def parse(text: str, path: object, extra: Container[str] = ()) -> Manifest:
        """Read the text; raises FormatError naming the file and the place in the text."""
        try:
            return _parse(load_json(text), extra)
        except SteelyardError as error:
            raise FormatError(f"metadata {KEY!r}: {error}", path=path) from error
        except RecursionError as error:
            raise FormatError(f"metadata {KEY!r}: nested too deep", path=path) from error

    def collect(self, arrays: Mapping[str, Weight], meta: Mapping[str, str], path: object) -> Weights:
        """The weights that `arrays`, the plain tensors of a file by key, stand for; raises FormatError."""
        self._check_sum(arrays, path)
        owner: dict[str, str] = {}
        items: dict[str, Weight] = {}
        for name, layout in self.packed.items():
            for key in layout.keys():  # noqa: SIM118 - a Layout is no mapping
                if key not in arrays or key in owner:
                    what = "is missing" if key not in arrays else f"belongs to {quoted(owner[key])} already"
                    raise FormatError(f"tensor {quoted(name)}: its part {quoted(key)} {what}", path=path)
                owner[key] = name
        inside = {name: key for key, slices in self.joined.items() for name in slices}
        for key, slices in self.joined.items():
            _check_joined(key, slices, arrays, owner, path)
        owner |= dict.fromkeys(self.joined, "")
        everything = {**self.packed, **inside}
        for name in _order(arrays, owner, self.packed, self.joined) if self.order is None else self.order:
            if name in self.packed:
                items[name] = _packed(name, self.packed[name], arrays, path)
            elif name in inside:
                items[name] = _sliced(name, self.joined[inside[name]][name], arrays[inside[name]])
            elif name in arrays and name not in owner:
                items[name] = arrays[name]
            else:
                raise FormatError(f"metadata {KEY!r}: the order names {quoted(name)}, which is not there", path=path)
        told = len(self.packed) + sum(map(len, self.joined.values()))
        if len(items) != told + len(arrays) - len(owner) or any(n in arrays and n not in owner for n in everything):
            raise FormatError(
                f"metadata {KEY!r}: packed and plain tensors have one name, or the order lacks one", path=path
            )
        try:
            return Weights(items.values(), self.ties, meta)
        except SteelyardError as error:
            raise FormatError(f"metadata {KEY!r}: {error}", path=path) from error

    def _check_sum(self, arrays: Mapping[str, Weight], path: object) -> None:
        """Raise FormatError where the file says something else than what was written."""
        if self.sealed is None:
            return
        expected, told = self.sealed
        found = sum_of_all(told, ((key, array.spec) for key, array in arrays.items()))
        if found != expected:
            text = f"what it says of its tensors is not what was written: its CRC-32 is {found:08x}, expected "
            remedy = f"fetch the file again; if it was changed on purpose, take 'sum' out of the metadata {KEY!r}"
            raise FormatError(f"{text}{expected:08x}; {remedy}", path=path)


def load_json(text: str) -> Any:
    """JSON without its ambiguities: no duplicate key, no NaN; raises FormatError.

    >>> load_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: the key 'a' is given twice
    """
    try:
        return _decoder().decode(text)
    except RecursionError as error:
        raise FormatError("the JSON is nested too deep") from error
    except ValueError as error:
        raise FormatError(f"expected JSON, found otherwise: {str(error)[:100]}") from error


def strict_scanner() -> Callable[[str, int], tuple[Any, int]]:
    """What reads one value that stands at a place of a text, as `load_json` does, and where the value ends.

    It raises StopIteration where there is no value, JSONDecodeError in one, FormatError, and RecursionError.
    """
    scan: Callable[[str, int], tuple[Any, int]] = _decoder().scan_once  # type: ignore[attr-defined]
    return scan


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_int=_whole)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FormatError(f"the key {quoted(twice)} is given twice")
    return found


def _whole(text: str) -> int:
    """A whole number; "-0" is one for Python, and a fraction for others."""
    if text == "-0":
        raise FormatError("-0 is no count")
    return int(text)


def _no_number(text: str) -> Any:
    raise FormatError(f"{text} is no JSON")


def _parse(data: Any, extra: Container[str]) -> Manifest:
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise FormatError(
            f"expected an object of version {VERSION}; use a newer steelyard, or rename the metadata if it is yours"
        )
    known = {"version", "packed", "ties", "order", "joined", "sum"}
    unknown = [key for key in data if key not in known and key not in extra]
    if unknown:
        raise FormatError(f"did not expect the key {quoted(unknown[0])}")
    packed, ties, order = data.get("packed", {}), data.get("ties", {}), data.get("order")
    if not isinstance(packed, dict) or not isinstance(ties, dict) or not isinstance(order, (list, type(None))):
        raise FormatError("expected objects as packed and ties and a list as order")
    if any(not isinstance(text, str) for text in (*ties.values(), *(order or ()))):
        raise FormatError("expected names in ties and order")
    codec = Reader(CODECS, {}).codec
    layouts = {name: Layout.parse(below, name, codec, f"packed.{quoted(name)}") for name, below in packed.items()}
    own = {key: data[key] for key in data if key not in known}
    joined = _joined(data.get("joined", {}), codec)
    sealed = None
    if "sum" in data:
        sealed = checked_sum(data["sum"], "sum"), {key: value for key, value in data.items() if key != "sum"}
    return Manifest(layouts, ties, None if order is None else tuple(order), own, joined, sealed)


def _joined(data: Any, codec: Callable[[object, str], Codec]) -> dict[str, dict[str, Slice]]:
    if not isinstance(data, dict):
        raise FormatError("expected an object as joined")
    found: dict[str, dict[str, Slice]] = {}
    for key, below in data.items():
        at = f"joined.{quoted(key)}"
        if not isinstance(below, list) or len(below) not in (4, 5) or not isinstance(below[3], dict) or not below[3]:
            raise FormatError(f"{at}: expected [codec, dtype, part, tensors] and perhaps sums")
        (named, dtype, part, tensors), sums = below[:4], [None] * len(below[3]) if len(below) == 4 else below[4]
        if not isinstance(sums, list) or len(sums) != len(tensors):
            raise FormatError(f"{at}: expected as many sums as tensors")
        if not isinstance(part, str):
            raise FormatError(f"{at}: expected [codec, dtype, part, tensors], the part a name")
        found[key], begin = {}, 0
        for (name, numbers), told in zip(tensors.items(), sums, strict=True):
            if not isinstance(numbers, list) or not numbers or type(numbers[0]) is not int or numbers[0] < 0:
                raise FormatError(f"{at}.{quoted(name)}: expected the bytes and the shape")
            if any(name in slices for slices in found.values()):
                raise FormatError(f"{at}: {quoted(name)} is joined twice")
            layout = Layout.parse(
                [named, dtype, numbers[1:], {part: key if told is None else [key, told]}],
                name,
                codec,
                f"{at}.{quoted(name)}",
            )
            found[key][name] = Slice(begin, begin + numbers[0], layout)
            begin += numbers[0]
    return found


def _check_joined(
    key: str, slices: Mapping[str, Slice], arrays: Mapping[str, Weight], owner: Mapping[str, str], path: object
) -> None:
    """Raise FormatError unless the array is there, belongs to nothing else, and is as long as what lies in it."""
    if key not in arrays or key in owner:
        what = "is missing" if key not in arrays else f"belongs to {quoted(owner[key])} already"
        raise FormatError(f"the joined array {quoted(key)} {what}", path=path)
    spec, end = arrays[key].spec, max(s.end for s in slices.values())
    if spec.dtype.name != "uint8" or spec.shape != (end,):
        raise FormatError(f"the joined array {quoted(key)}: expected {end} bytes, found {spec}", path=path)


def _order(
    arrays: Iterable[str], owner: Mapping[str, str], packed: Iterable[str], joined: Mapping[str, Iterable[str]]
) -> list[str]:
    """A packed tensor stands where the first of its arrays does; one without arrays stands at the end."""
    found = [name for key in arrays for name in (joined[key] if key in joined else (owner.get(key, key),))]
    return list(dict.fromkeys([*found, *packed]))


def _sliced(name: str, place: Slice, array: Weight) -> Weight:
    """A packed tensor whose only part lies in an array with others."""

    def read() -> Packed:
        import numpy as np

        if array.fill is None:
            return _assembled(name, place.layout, array.origin, lambda _: array.array()[place.begin : place.end])
        stream = np.empty(place.end - place.begin, np.uint8)
        array.fill(place.begin, stream)
        return _assembled(name, place.layout, array.origin, lambda _: stream)

    return Weight(name, place.layout.spec, read, place.end - place.begin, array.origin, place.layout.scheme)


def _packed(name: str, layout: Layout, arrays: Mapping[str, Weight], path: object) -> Weight:
    parts = [arrays[key] for key in layout.keys()]  # noqa: SIM118 - a Layout is no mapping
    stored = sum(part.stored or 0 for part in parts)
    origin = parts[0].origin if parts else printable(str(path))
    read = partial(_assembled, name, layout, origin, lambda key: arrays[key].array())
    return Weight(name, layout.spec, read, stored, origin, layout.scheme)


def _assembled(name: str, layout: Layout, origin: str, read: Callable[[str], np.ndarray]) -> Packed:
    """A packed tensor from its arrays; raises DamageError, naming it, where they are not those that were written."""
    try:
        return layout.assemble(read)
    except DamageError as error:
        raise DamageError(f"{origin}: {quoted(name)}: {error}; fetch the file again") from error


@dataclass
class Draft:
    """The manifest of a file that is being written. ``keys`` grows in the order of the arrays."""

    weights: Weights
    keys: dict[str, str] = field(default_factory=dict)  # key of an array -> name of the weight that it is part of
    packed: dict[str, Any] = field(default_factory=dict)
    joined: dict[str, Any] = field(default_factory=dict)
    _short: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> its only array and how long that is
    _sums: dict[str, int] = field(default_factory=dict)  # key of an array of a packed tensor -> its CRC-32

    def plain(self, name: str) -> str:
        """The key of a tensor that is held plain."""
        self.keys[name] = name
        return name

    def dismantle(self, name: str, packed: Packed) -> dict[str, np.ndarray]:
        """The arrays of a packed tensor by keys that nothing else has."""
        prefix = name
        while True:
            layout, leaves = dismantle(prefix, packed, name)
            if not any(key in self.keys or key in self.weights for key in leaves):
                break
            prefix += "~"
        self.packed[name] = layout
        self._sums.update({key: summed(array) for key, array in leaves.items()})
        self.keys.update(dict.fromkeys(leaves, name))
        if alone(layout, leaves):
            ((key, array),) = leaves.items()
            self._short[name] = (key, array.size)
        return leaves

    def join(self) -> dict[str, list[str]]:
        """Tell tensors of one codec with a short array each as joined; for each new key, the keys that it stands for.

        For a container that can lay arrays one after the other; to be called when all tensors are known.
        """
        groups: dict[str, list[str]] = {}
        for name in self._short:
            codec, dtype, _, parts = self.packed[name]
            groups.setdefault(compact_json([codec, dtype, next(iter(parts))]), []).append(name)
        found: dict[str, list[str]] = {}
        for told, names in groups.items():
            if len(names) < 2:
                continue
            key = self._free("joined", found)
            found[key] = [self._short[name][0] for name in names]
            tensors = {name: [self._short[name][1], *self.packed.pop(name)[2]] for name in names}
            self.joined[key] = [*json.loads(told), tensors]
        replaced = {old: key for key, olds in found.items() for old in olds}
        self.keys = {replaced.get(key, key): name for key, name in self.keys.items()}
        return found

    def marked(self) -> dict[str, str]:
        """Call joined arrays so that they are known should the text be lost; the new keys by the old ones."""
        found: dict[str, str] = {}
        for old in self.joined:
            found[old] = self._free(JOINED, found.values())
        self.joined = {found[key]: below for key, below in self.joined.items()}
        self.keys = {found.get(key, key): name for key, name in self.keys.items()}
        return found

    def _free(self, key: str, taken: Container[str]) -> str:
        """A key that nothing else has."""
        while key in self.keys or key in self.weights or key in taken:
            key += "~"
        return key

    def _joined(self, below: list[Any], sums: bool) -> list[Any]:
        """What is told of one array of several tensors."""
        return [*below, [self._sums[self._short[name][0]] for name in below[3]]] if sums else below

    def text(self, arrays: Iterable[tuple[str, Spec]] | None = None, **extra: Any) -> str | None:
        """The JSON; None where the container needs none. `extra` is what the container adds for itself.

        arrays: all arrays of a container that has no sums of its own, if any tensor is packed, by key: then the text
        has those of all arrays of packed tensors, and of all that is said.
        """
        sums = arrays is not None
        data: dict[str, Any] = {"version": VERSION}
        if self.packed:
            told = {name: with_sums(layout, name, self._sums) for name, layout in self.packed.items()}
            data["packed"] = told if sums else self.packed
        if self.joined:
            data["joined"] = {key: self._joined(below, sums) for key, below in self.joined.items()}
        if self.weights.ties:
            data["ties"] = dict(self.weights.ties)
        names = {key: below[3] for key, below in self.joined.items()}
        alike = JOINED in self.weights  # without a text it would be taken for one that was lost
        if alike or _order(self.keys, self.keys, self.packed, names) != list(self.weights):
            data["order"] = list(self.weights)
        data.update({key: value for key, value in extra.items() if value})
        if arrays is not None and (self.packed or self.joined):
            data["sum"] = sum_of_all(data, arrays)
        return compact_json(data) if len(data) > 1 else None

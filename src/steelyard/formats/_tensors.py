"""The tensors of a checkpoint of PyTorch: where they stand in its object, and how they are read from its storages.

Decides which views are possible, and how a nested object becomes names: the keys joined by dots. Knows neither
pickles nor the containers in which storages lie.
"""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats._inert import LARGEST, Dict, Foreign, Global
from steelyard.formats._rebuild import STORAGES, TORCH, Storage, Unheld, View
from steelyard.formats.base import empty
from steelyard.formats.manifest import KEY
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

RANK = 64  # dimensions that numpy can hold
DEPTH = 128  # of containers in containers
NAME = 1000  # characters of the name of a tensor
SCALARS, TEXT = 1000, 4000  # numbers and texts that become metadata, and the characters of one
REPEATED = 1 << 26  # bytes of a tensor whose elements share bytes, so that few bytes cannot fill the memory


class Store(ABC):
    """Where the bytes of storages lie."""

    source: Source
    big: bool = False  # whether the bytes lie in big-endian order

    @abstractmethod
    def nbytes(self, key: str) -> int | None:
        """The bytes of a storage; None where there is none of this key."""

    @abstractmethod
    def packed(self, key: str) -> int:
        """The bytes that it takes in the file."""

    @abstractmethod
    def direct(self, key: str, /) -> bool:
        """Whether any part of it can be read without what is before."""

    @abstractmethod
    def offset(self, key: str) -> int:
        """About where it lies in the file, for messages."""

    @abstractmethod
    def fill(self, key: str, first: int, buffer: memoryview) -> None:
        """Fill `buffer` with its bytes from byte `first` on."""


@dataclass(frozen=True)
class Tensor:
    """A view that was checked."""

    name: str
    key: str
    first: int  # byte within the storage
    spec: Spec
    stride: tuple[int, ...]
    conjugate: bool
    negative: bool

    @property
    def span(self) -> int:
        """The elements from the first to the last in the storage."""
        if not self.spec.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.spec.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in C order."""
        expected = 1
        for n, step in zip(reversed(self.spec.shape), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return not self.spec.size
            expected *= n
        return True

    def weight(self, store: Store) -> Weight:
        """The tensor as a weight that is read from `store`."""
        part = self.contiguous and store.direct(self.key)
        fill = partial(self._fill, store) if part else None
        raw = store.nbytes(self.key) or 0
        stored = min(self.spec.nbytes, raw) * store.packed(self.key) // raw if raw else 0
        origin = store.source.origin(store.offset(self.key))
        return Weight(self.name, self.spec, partial(self._read, store), stored, origin, fill=fill)

    def _fill(self, store: Store, first: int, flat: np.ndarray) -> None:
        """Read the elements of a contiguous tensor from `first` on into `flat`."""
        import numpy as np

        store.fill(self.key, self.first + first * flat.itemsize, flat.view(np.uint8).data)
        if store.big != (sys.byteorder == "big") and flat.itemsize > 1:
            half = flat.itemsize // (2 if self.spec.dtype.kind == "complex" else 1)
            flat.view(f"u{half}").byteswap(inplace=True)
        if self.conjugate:
            np.conjugate(flat, out=flat)
        if self.negative:
            np.negative(flat, out=flat)

    def _read(self, store: Store) -> np.ndarray:
        import numpy as np

        offset = store.offset(self.key)
        if self.contiguous:
            array = empty(self.spec, store.source, offset, self.name)
            self._fill(store, 0, array.reshape(-1))
            return array
        flat = empty(Spec((self.span,), self.spec.dtype), store.source, offset, self.name)
        self._fill(store, 0, flat)
        strides = [step * flat.itemsize for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.spec.shape, strides))


def checked(name: str, view: View, store: Store, where: object) -> Tensor | str:
    """The tensor that a view is; the reason where it is not held. Raises FormatError for one that cannot be."""

    def wrong(text: str) -> FormatError:
        return FormatError(f"tensor {quoted(name)}: {text}", path=where, offset=view.at)

    storage = view.storage
    if not isinstance(storage, Storage):
        raise wrong("expected a storage, found something else")
    dtype = _dtype(storage, view.dtype)
    if isinstance(dtype, str):
        return dtype
    start, room = _room(storage, store, wrong)
    size, stride, offset = dimensions(view.size, wrong), dimensions(view.stride, wrong), view.offset
    if len(size) != len(stride) or not _count(offset):
        raise wrong(f"{len(size)} dimensions with {len(stride)} strides from {str(offset)[:30]} on")
    if math.prod(n or 1 for n in size) > LARGEST:
        raise wrong(f"{str(size)[:100]} has more than 2^63 elements")
    item = dtype.bits // 8
    flags = view.flags if isinstance(view.flags, Dict) else Dict()
    signs = flags.get("conj") is True, flags.get("neg") is True
    found = Tensor(name, storage.key, start + offset * item, Spec(size, dtype), stride, *signs)
    if (offset + found.span) * item > room:
        raise wrong(f"reaches to byte {(offset + found.span) * item} of a storage of {room} bytes")
    if found.spec.nbytes > max(room, REPEATED):
        raise wrong(f"repeats {room} bytes until they are {found.spec.nbytes}; save it without the repetition")
    return found


def _dtype(storage: Storage, given: object) -> DType | str:
    if given is None:
        name = STORAGES[storage.kind][0]
        return DTYPES[name] if name else f"{storage.kind} is quantised"
    name = given.name.removeprefix("torch.") if isinstance(given, Global) else "?"
    return TORCH.get(name, f"no dtype {quoted(name)} is held here")


def _room(storage: Storage, store: Store, wrong: Callable[[str], FormatError]) -> tuple[int, int]:
    """Where the storage begins within the bytes under its key, and how many bytes it has."""
    if not _count(storage.count):
        raise wrong(f"a storage of {str(storage.count)[:30]} elements")
    expected, found = storage.count * storage.item, store.nbytes(storage.key)
    if found is None:
        if not expected:
            return 0, 0
        raise wrong(f"the file has no storage {quoted(storage.key)}; fetch it again")
    if expected != found:
        raise wrong(f"its storage {quoted(storage.key)} is announced with {expected} bytes and has {found}")
    if storage.part is None:
        return 0, found
    offset, count = storage.part
    if not _count(offset) or not _count(count):
        raise wrong("a view of a storage that is none")
    if (offset + count) * storage.item > found:
        raise wrong(f"its storage is a view to byte {(offset + count) * storage.item} of {found}")
    return offset * storage.item, count * storage.item


def _count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= LARGEST


def dimensions(value: object, wrong: Callable[[str], FormatError]) -> tuple[int, ...]:
    """A shape, strides or other numbers that are none below zero; raises what `wrong` makes of the reason."""
    if not isinstance(value, (tuple, list)) or len(value) > RANK or not all(_count(n) for n in value):
        raise wrong(f"expected up to {RANK} sizes and strides from 0 to 2^63-1, found others")
    return tuple(value)


class Found:
    """The tensors and the numbers in an object, by their names."""

    def __init__(self, where: object):
        self.where, self.left = where, 0
        self.views: dict[str, View | Unheld] = {}
        self.meta: dict[str, str] = {}
        self.names: dict[str, int] = {}  # how often each was asked for
        self.dropped = 0  # numbers and texts that are too many or too long

    def walk(self, root: object, name: str, alone: str, where: object, work: int) -> None:
        """Collect what is in `root` under `name`; `alone` is the name of a tensor that is the root itself.

        `work`, the operations of the pickle, bounds how often one thing may be met again. Raises FormatError,
        naming `where`, for what is nested too deep or too often.
        """
        self.where, self.left = where, 4 * work + 1000
        if isinstance(root, (View, Unheld)):
            self._take(name or alone, root)
            return
        path: list[tuple[int, str, bool, Iterator[tuple[str, object]]]] = [(id(root), name, True, _children(root))]
        open_ids = {id(root)}
        while path:
            ident, prefix, plain, children = path[-1]
            label, value = next(children, (None, None))
            if label is None:
                path.pop()
                open_ids.discard(ident)
                continue
            self.left -= 1
            if self.left < 0:
                raise FormatError("pickle: the same things stand within themselves too often", path=self.where)
            below = f"{prefix}.{label}" if prefix and label else prefix or label
            if isinstance(value, (View, Unheld)):
                self._take(below or alone, value)
            elif isinstance(value, (Dict, list, tuple, Foreign)):
                if id(value) in open_ids:
                    continue
                if len(path) >= DEPTH:
                    raise FormatError(f"pickle: containers are nested more than {DEPTH} deep", path=self.where)
                open_ids.add(id(value))
                path.append((id(value), below[: NAME + 1], plain and not isinstance(value, Foreign), _children(value)))
            elif plain:
                self._note(below, value)

    def _take(self, name: str, value: View | Unheld) -> None:
        if len(name) > NAME:
            raise FormatError(f"tensor {quoted(name)}: its name has more than {NAME} characters", path=self.where)
        again = self.names[name] = self.names.get(name, -1) + 1
        self.views[f"{name}~{again}" if again else name] = value

    def _note(self, name: str, value: object) -> None:
        """A number or a text becomes metadata."""
        if not isinstance(value, (str, int, float)) or (type(value) is int and abs(value) > LARGEST):
            return
        if (
            name == KEY
            or len(self.meta) >= SCALARS
            or len(name) > NAME
            or (isinstance(value, str) and len(value) > TEXT)
        ):
            self.dropped += 1
            return
        self.meta[_clean(name)] = _clean(str(value))


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


_HOLDERS = ("_parameters", "_buffers", "_modules")  # of a pickled nn.Module: no part of the names in its state dict


def _children(value: object) -> Iterator[tuple[str, object]]:
    """What is in a container, each with its part of the name; '' adds none."""
    if isinstance(value, Dict):
        latest = {(isinstance(key, str), _label(key)): below for key, below in value.pairs}
        yield from ((label, below) for (_, label), below in latest.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), below) for index, below in enumerate(value))
    elif isinstance(value, Foreign):
        if value.args:
            yield "args", value.args
        yield from ((str(index), below) for index, below in enumerate(value.items))
        for state in value.state:
            for part in state if isinstance(state, tuple) else (state,):
                if not isinstance(part, Dict):
                    yield "", part
                    continue
                for label, below in _children(part):
                    yield "" if label in _HOLDERS else label, below


def _label(key: object) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    if isinstance(key, (int, float)) and not (type(key) is int and abs(key) > LARGEST):
        return str(key)
    if isinstance(key, tuple) and len(key) <= 8 and not any(isinstance(part, tuple) for part in key):
        return "(" + ",".join(_label(part) for part in key) + ")"
    return "?" if key is not None else "None"


def collect(found: Found, store: Store, meta: dict[str, str]) -> Weights:
    """The weights that the views in `found` are; identical views become ties."""
    items: dict[object, Weight] = {}
    ties: dict[str, str] = {}
    skipped: list[str] = []
    for name, view in found.views.items():
        if isinstance(view, Unheld):
            skipped.append(f"{name}: {view.why}")
            continue
        tensor = checked(name, view, store, found.where)
        if isinstance(tensor, str):
            skipped.append(f"{name}: {tensor}")
            continue
        same = (tensor.key, tensor.first, tensor.spec, tensor.stride, tensor.conjugate, tensor.negative)
        if same in items:
            ties[name] = items[same].name
        else:
            items[same] = tensor.weight(store)
    if skipped:
        meta["pickle.skipped"] = json.dumps(skipped[:SCALARS])
    if found.dropped:
        meta["pickle.left_out"] = f"{found.dropped} numbers and texts"
    return Weights(items.values(), ties, {**found.meta, **meta})


def listed(wanted: Mapping[str, int], more: int = 0) -> list[str]:
    """What a pickle wanted, as name@byte; `more` is the number of names that were not remembered."""
    found = [f"{name}@{at}" for name, at in wanted.items()]
    return [*found, f"and {more} more"] if more else found

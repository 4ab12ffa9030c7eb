"""Where the storages of PyTorch's older files lie: pickles and raw bytes in a row (to 2020), or a tar of them (2016).

Decides how a pickle of unknown length is read from a file: a little, then four times as much until it ends. In both
kinds each storage is eight bytes, the number of its elements, and then the elements in little-endian order; so the
places follow from the numbers alone. Nothing is unpacked to a path.

Source: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py (_legacy_save, _legacy_load)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from steelyard.errors import FormatError, quoted
from steelyard.formats._inert import Global, TooShortError
from steelyard.formats._pickle import OPCODES, Machine
from steelyard.formats._rebuild import BUILDERS, STORAGES, Storage, View, storages
from steelyard.formats._tensors import Store
from steelyard.formats.source import Source

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
HEAD = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."  # what follows the two bytes of the pickle's protocol
FIRST, LIMIT = 1 << 16, 100_000_000  # bytes of a pickle that are read at first, and at most
RECORD = 512  # bytes of a tar
MEMBERS = {"sys_info", "pickle", "tensors", "storages"}
ITEMS = 1_000_000  # storages or tensors of a file


@dataclass
class Places(Store):
    """Storages that lie in the file as they are."""

    source: Source
    found: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (byte in the file, bytes)

    def nbytes(self, key: str) -> int | None:
        """The bytes of the storage."""
        return self.found[key][1] if key in self.found else None

    def packed(self, key: str) -> int:
        """The bytes of the storage."""
        return self.nbytes(key) or 0

    def direct(self, _key: str, /) -> bool:
        """Always."""
        return True

    def offset(self, key: str) -> int:
        """Where the storage begins."""
        return self.found[key][0] if key in self.found else 0

    def fill(self, key: str, first: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `first` of the storage on."""
        with self.source.reading() as file:
            self.source.fill(file, self.offset(key) + first, buffer)


@dataclass
class Pickles:
    """Pickles and numbers that follow each other in the bytes from `at` to `end` of a file."""

    source: Source
    at: int
    end: int
    wanted: dict[str, int] = field(default_factory=dict)
    spent: int = 0

    def load(self, persistent: Callable[[Machine, object, int], object] | None = None) -> Any:
        """The next pickled object; raises FormatError."""
        reach = FIRST
        while True:
            raw = self.source.bytes(self.at, min(reach, LIMIT, self.end - self.at))
            machine = Machine(raw, where=self.source.path, base=self.at, builders=BUILDERS, persistent=persistent)
            machine.wanted = dict(self.wanted)
            try:
                found = machine.load()
            except TooShortError:
                if len(raw) < min(reach, LIMIT) or reach >= LIMIT:
                    raise
                reach *= 4
                continue
            self.at += machine.at
            self.wanted, self.spent = machine.wanted, self.spent + machine.spent
            if self.spent > OPCODES:
                raise FormatError(f"more than {OPCODES} operations in the pickles", path=self.source.path)
            return found

    def numbers(self, form: str) -> tuple[int, ...]:
        """The next numbers, as `struct` says."""
        count = struct.calcsize(form)
        if count > self.end - self.at:
            raise FormatError(
                "the numbers of a tensor are cut off; fetch it again", path=self.source.path, offset=self.at
            )
        found = struct.unpack(form, self.source.bytes(self.at, count)) if count else ()
        self.at += count
        return found

    def storage(self, item: int, key: str) -> tuple[int, int]:
        """The place of the storage that comes next, whose elements have `item` bytes."""
        start = self.at
        (count,) = self.numbers("<q")
        if not 0 <= count <= (self.end - self.at) // item:
            text = f"storage {quoted(key)} of {count} elements of {item} bytes ends after the file; fetch it again"
            raise FormatError(text, path=self.source.path, offset=start)
        place = self.at, count * item
        self.at += count * item
        return place


def legacy(source: Source) -> tuple[object, Pickles, Places]:
    """The object of a file of pickles, how far it was read, and its storages; raises FormatError."""
    pickles = Pickles(source, 0, source.size)
    for name, value in (("magic number", MAGIC), ("protocol", PROTOCOL)):
        if pickles.load() != value:
            raise FormatError(f"expected {value:#x} as {name}, found otherwise", path=source.path, offset=0)
    pickles.load()  # the machine that wrote it; the bytes are little-endian whatever it says
    seen: dict[str, Storage] = {}
    root = pickles.load(storages(seen))
    keys, places = pickles.load(), Places(source)
    if not isinstance(keys, list):
        raise FormatError("expected a list of storages after the object", path=source.path, offset=pickles.at)
    for key in keys:
        if not isinstance(key, str) or key not in seen or key in places.found:
            text = f"storage {quoted(str(key)[:100])} is listed twice, or belongs to no tensor"
            raise FormatError(text, path=source.path, offset=pickles.at)
        places.found[key] = pickles.storage(seen[key].item, key)
    if pickles.at != source.size:
        text = f"{source.size - pickles.at} bytes follow after the last storage; a file holds one object"
        raise FormatError(text, path=source.path, offset=pickles.at)
    return root, pickles, places


def is_tar(source: Source) -> bool:
    """Whether a file is a tar whose first member is one of those of 2016."""
    if source.size < 2 * RECORD:
        return False
    head = source.bytes(0, RECORD)
    return head[257:262] == b"ustar" and head[:100].rstrip(b"\0").removeprefix(b"./").decode("latin-1") in MEMBERS


def tar(source: Source) -> tuple[object, Pickles, Places]:
    """The object of a tar, how far it was read, and its storages; raises FormatError."""
    spans = dict(_members(source))
    missing = MEMBERS - {"sys_info"} - set(spans)
    if missing:
        raise FormatError(f"tar: there is no member {quoted(min(missing))}; fetch it again", path=source.path)
    part = Pickles(source, *spans["storages"])
    seen, places = _tar_storages(part)
    part.at, part.end = spans["tensors"]
    views: dict[str, View] = {}
    for _ in range(_number(part)):
        at, (key, storage) = part.at, _entry(part)[:2]
        (rank,) = part.numbers("<i4x")
        if not 0 <= rank <= 64:
            raise FormatError(f"tensor {quoted(key)} of {rank} dimensions", path=source.path, offset=at)
        size, stride, (offset,) = part.numbers(f"<{rank}q"), part.numbers(f"<{rank}q"), part.numbers("<q")
        views[key] = View(seen.get(str(storage)[:40]), offset, size, stride, None, None, at)
    part.at, part.end = spans["pickle"]

    def persistent(_m: Machine, ident: object, _at: int) -> object:
        if isinstance(ident, tuple):
            return ident[0] if ident and isinstance(ident[0], Global) else None
        return views.get(str(ident)[:40]) if isinstance(ident, (int, str)) else None

    return part.load(persistent), part, places


def _tar_storages(part: Pickles) -> tuple[dict[str, Storage], Places]:
    """The storages of a tar, and the views of them, by key."""
    seen, places = dict[str, Storage](), Places(part.source)
    for _ in range(_number(part)):
        at, (key, _, kind) = part.at, _entry(part)
        name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else "?"
        if name not in STORAGES:
            raise FormatError(f"storage {quoted(key)} of the type {quoted(name)}", path=part.source.path, offset=at)
        item = STORAGES[name][1]
        places.found[key] = part.storage(item, key)
        seen[key] = Storage(key, name, places.found[key][1] // item)
    for view in _list(part, part.load()):
        if not isinstance(view, tuple) or len(view) != 4 or not all(isinstance(text, (int, str)) for text in view):
            raise FormatError("tar: a view of a storage that is none", path=part.source.path, offset=part.at)
        key, root, offset, count = view
        whole = seen.get(str(root)[:40])
        if whole is None:
            raise FormatError(
                f"tar: there is no storage {quoted(str(root)[:40])}", path=part.source.path, offset=part.at
            )
        seen[str(key)[:40]] = Storage(whole.key, whole.kind, whole.count, (offset, count))
    return seen, places


def _number(part: Pickles) -> int:
    found = part.load()
    if type(found) is not int or not 0 <= found <= ITEMS:
        text = f"tar: expected a number up to {ITEMS}"
        raise FormatError(text, path=part.source.path, offset=part.at)
    return found


def _entry(part: Pickles) -> tuple[str, Any, Any]:
    """(key, ..., ...) as it stands before each storage and each tensor."""
    found = part.load()
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[0], (int, str)):
        raise FormatError("tar: expected a key and what belongs to it", path=part.source.path, offset=part.at)
    return str(found[0])[:40], found[1], found[2]


def _list(part: Pickles, found: object) -> list[Any]:
    if not isinstance(found, list):
        raise FormatError("tar: expected a list", path=part.source.path, offset=part.at)
    return found


def _members(source: Source) -> Iterator[tuple[str, tuple[int, int]]]:
    """The members of a tar: their names, and where their bytes begin and end."""
    at, seen = 0, set[str]()
    while at + RECORD <= source.size and len(seen) <= 16:
        head = source.bytes(at, RECORD)
        if not any(head):
            return
        name = head[:100].rstrip(b"\0").decode("latin-1").removeprefix("./")
        try:
            size = int(head[124:136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            size = -1
        start = at + RECORD
        if head[257:262] != b"ustar" or not 0 <= size <= source.size - start or name in seen:
            raise FormatError(f"tar: member {quoted(name)} is damaged or doubled", path=source.path, offset=at)
        seen.add(name)
        yield name, (start, start + size)
        at = start + -(-size // RECORD) * RECORD
    raise FormatError("tar: it has no end; fetch it again", path=source.path, offset=min(at, source.size))

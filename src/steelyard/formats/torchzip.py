"""PyTorch checkpoints: ``torch.save`` of today (a zip), of before 2020 (pickles and raw bytes), of 2016 (a tar).

Decides which bytes of a file are its pickle and where its storages lie; TorchScript archives are read as well, their
code is not looked at. No unpickler is imported or run: ``_pickle`` reads the opcodes, and what else the pickle
wanted is listed under ``pickle.globals`` as ``name@byte``, where bytes count from the start of the pickle's member,
or of the file where it has none. Numbers and texts beside the tensors become metadata.

Sources: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py and caffe2/serialize/inline_container.h
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.weights import Weights
from steelyard.errors import FormatError, SteelyardError, printable, quoted
from steelyard.formats._oldtorch import HEAD, Pickles, Places, is_tar, legacy, tar
from steelyard.formats._pickle import Machine
from steelyard.formats._rebuild import BUILDERS, storages
from steelyard.formats._tensors import Found, Store, collect, listed
from steelyard.formats._zip import LOCAL, STORED, Archive, Member
from steelyard.formats.base import Format
from steelyard.formats.source import LocalFile, Source

PICKLE = "data.pkl"
PICKLE_LIMIT = 100_000_000  # bytes
OTHERS = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True)
class Torch(Format):
    """What ``torch.save`` and ``torch.jit.save`` write; read only."""

    name: ClassVar[str] = "torch"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".bin", ".ckpt", ".jit")
    entries: ClassVar[tuple[str, ...]] = ("pytorch_model.bin",)

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A zip archive with a data.pkl, a pickle of torch's magic number, or a tar of its members."""
        if head.startswith(LOCAL):
            start = source.bytes(0, min(30 + 256, source.size))
            if start[30 : 30 + int.from_bytes(start[26:28], "little")].endswith(b"/" + PICKLE.encode()):
                return True  # torch writes it first
            try:
                return _main(Archive.of(source)) is not None
            except SteelyardError:
                return False
        return head[2:15] == HEAD or is_tar(source)

    def open(self, source: Source, /) -> Weights:
        """The weights in a file: reads the pickle and the places of the storages; raises FormatError."""
        with _without_collection():
            return _open(source)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for cycles while millions of small objects are made that have none: it would take half of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _open(source: Source) -> Weights:
    head = source.bytes(0, min(16, source.size))
    if head.startswith(LOCAL):
        return _open_zip(source)
    if head[2:15] == HEAD:
        return _open_old(source, *legacy(source))
    if is_tar(source):
        return _open_old(source, *tar(source))
    if head[:1] == b"\x80":
        return _open_pickle(source)
    other = next((text for magic, text in OTHERS.items() if head.startswith(magic)), "no container of torch")
    text = f"unknown format: {other} begins with {head!r}; unpack it, or save it again with torch"
    raise FormatError(text, path=source.path, offset=0)


@dataclass(frozen=True)
class Members(Store):
    """Storages that are members of a zip archive."""

    archive: Archive
    prefix: str
    big: bool = False

    @property
    def source(self) -> Source:  # type: ignore[override]
        """The archive."""
        return self.archive.source

    def nbytes(self, key: str) -> int | None:
        """The unpacked size of the member."""
        member = self._find(key)
        return None if member is None else member.size

    def packed(self, key: str) -> int:
        """The size of the member in the file."""
        member = self._find(key)
        return 0 if member is None else member.packed

    def direct(self, key: str, /) -> bool:
        """Whether the member is stored as it is."""
        member = self._find(key)
        return member is not None and member.method == STORED

    def offset(self, key: str) -> int:
        """Where the header of the member lies."""
        member = self._find(key)
        return 0 if member is None else member.header

    def fill(self, key: str, first: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `first` of the member on."""
        member = self._find(key)
        if member is not None and len(buffer):
            with self.source.reading() as file:
                at = self.archive.data(file, member)
                self.archive.fill(file, member, at, first, buffer)

    def _find(self, key: str) -> Member | None:
        return self.archive.members.get(self.prefix + key)


def _main(archive: Archive) -> str | None:
    """The name of the pickle of an archive; None where it has none."""
    found = [name for name in archive.members if name == PICKLE or name.endswith("/" + PICKLE)]
    top = [name for name in found if name.count("/") <= 1]
    if len(top) > 1:
        listed = ", ".join(quoted(name) for name in top[:3])
        raise FormatError(f"zip: expected one {PICKLE}, found {listed}", path=archive.source.path)
    return top[0] if top else None


def _open_zip(source: Source) -> Weights:
    archive = Archive.of(source)
    if isinstance(source, LocalFile):
        archive.check()  # elsewhere each header would be a request; there it is compared when its member is read
    main = _main(archive)
    if main is None:
        what = "of weights, but of others" if archive.members else "at all"
        text = f"zip: expected a member NAME/{PICKLE}, found no member {what}; name the file that torch.save wrote"
        raise FormatError(text, path=source.path)
    prefix = main.removesuffix(PICKLE)
    store = Members(archive, prefix, _big(archive, prefix))
    found, wanted = Found(source.path), list[str]()
    for member, folder, name in ((main, "data/", ""), (f"{prefix}constants.pkl", "constants/", "constants")):
        if member not in archive.members:
            continue
        data, _ = archive.read(member, PICKLE_LIMIT)
        where = f"{source.path}, {printable(member)}"
        machine = Machine(data, where=where, builders=BUILDERS, persistent=storages({}, folder))
        root = machine.load()
        if machine.at != len(data):
            raise FormatError(f"pickle: {len(data) - machine.at} bytes follow it", path=where, offset=machine.at)
        found.walk(root, name, _stem(source), where, machine.spent)
        wanted += listed(machine.wanted, machine.more)
    return collect(found, store, {"pickle.globals": json.dumps(wanted)} if wanted else {})


def _open_old(source: Source, root: object, pickles: Pickles, places: Places) -> Weights:
    found = Found(source.path)
    found.walk(root, "", _stem(source), source.path, pickles.spent)
    wanted = listed(pickles.wanted)
    return collect(found, places, {"pickle.globals": json.dumps(wanted)} if wanted else {})


def _open_pickle(source: Source) -> Weights:
    """A pickle without storages: no tensor can be in it, but what it wants to import can be listed."""
    pickles = Pickles(source, 0, source.size)
    return _open_old(source, pickles.load(), pickles, Places(source))


def _stem(source: Source) -> str:
    """What a tensor is called that has no name: the file, without its suffix."""
    return source.name.rpartition(".")[0] or source.name


def _big(archive: Archive, prefix: str) -> bool:
    """Whether the archive says that its numbers are big-endian."""
    if f"{prefix}byteorder" not in archive.members:
        return False
    order, at = archive.read(f"{prefix}byteorder", 16)
    if order not in (b"little", b"big"):
        raise FormatError(f"expected little or big as byteorder, found {order!r}", path=archive.source.path, offset=at)
    return order == b"big"

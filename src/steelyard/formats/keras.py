"""Keras: the archive of a whole model, a zip of its config and of the HDF5 file of its weights.

Decides that the member ``model.weights.h5`` is read where it lies in the archive, or from a nameless file on the disk
where it is deflated. The config is text in the metadata: no layer is ever made of it, and no Lambda runs. What the
datasets are is decided by ``hdf5``, the one format that this one contains.

Source: https://keras.io/guides/serialization_and_saving/
"""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats._zip import STORED, Archive
from steelyard.formats.base import Format, writing
from steelyard.formats.hdf5 import Hdf5
from steelyard.formats.source import Folder, Source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WEIGHTS = "model.weights.h5"
TEXTS = ("config.json", "metadata.json")
TEXT_LIMIT = 1 << 24  # bytes
SPOOL_LIMIT = 1 << 36  # bytes that a deflated member may take on the disk


@dataclass(frozen=True)
class Keras(Format):
    """What ``model.save("model.keras")`` writes; read only."""

    name: ClassVar[str] = "keras"
    suffixes: ClassVar[tuple[str, ...]] = (".keras",)
    entries: ClassVar[tuple[str, ...]] = ("*.keras",)

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A zip archive with a config and weights."""
        if not head.startswith(b"PK\x03\x04"):
            return False
        try:
            return {WEIGHTS, TEXTS[0]} <= set(Archive.of(source).members)
        except FormatError:
            return False

    def open(self, source: Source, /) -> Weights:
        """The weights in an archive: reads its directory, its texts, and what describes the datasets."""
        archive = Archive.of(source)
        if WEIGHTS not in archive.members:
            raise FormatError(f"expected a member {WEIGHTS!r}, found none; this is no model of Keras", path=source.path)
        weights = Hdf5().open(_member(archive))
        meta = dict(weights.meta)
        for name in TEXTS:
            if name in archive.members:
                raw, _ = archive.read(name, TEXT_LIMIT)
                meta[name] = raw.decode("utf-8", "replace")
        return Weights(weights.values(), weights.ties, meta)


def _member(archive: Archive) -> Source:
    """The file of weights in an archive, as a file of its own."""
    member, source = archive.members[WEIGHTS], archive.source
    path = f"{source.path}/{WEIGHTS}"
    with source.reading() as file:
        begin = archive.data(file, member)
        if member.method == STORED:
            return _Inner(path, member.size, source, begin)
        if member.size > SPOOL_LIMIT:
            text = f"{WEIGHTS} takes {member.size} bytes, the limit is {SPOOL_LIMIT}; store it without deflating"
            raise FormatError(text, path=source.path, offset=begin)
        with tempfile.TemporaryFile(buffering=0) as spool:
            for block in archive.unpacked(file, member, begin):
                with writing(Path(path)):
                    spool.write(block)
            if spool.tell() != member.size:
                text = f"{WEIGHTS} unpacks to less than it announces"
                raise FormatError(text, path=source.path, offset=begin)
            return _Spooled(path, member.size, source, _Spool(os.dup(spool.fileno())))


class _Spool:
    """A file without a name; it is gone with this."""

    def __init__(self, number: int):
        self.number = number
        weakref.finalize(self, os.close, number)


@dataclass(frozen=True)
class _Inner(Source):
    """A piece of another file, from byte `begin` on."""

    path: str
    size: int
    outer: Source
    begin: int

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The piece as an open file."""
        with self.outer.reading() as file:

            def read(at: int, view: memoryview) -> int:
                file.seek(self.begin + at)
                return int(file.readinto(view))  # type: ignore[attr-defined]

            yield _Positioned(self.size, read)  # type: ignore[misc]

    @property
    def folder(self) -> Folder:
        """The folder of the other file."""
        return self.outer.folder


@dataclass(frozen=True)
class _Spooled(Source):
    """A file without a name that was unpacked from another one."""

    path: str
    size: int
    outer: Source
    spool: _Spool

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The file, with a place of its own; raises FormatError if the other one changed."""
        with self.outer.reading():
            yield _Positioned(self.size, lambda at, view: os.preadv(self.spool.number, [view], at))  # type: ignore[misc]

    @property
    def folder(self) -> Folder:
        """The folder of the other file."""
        return self.outer.folder


class _Positioned(io.RawIOBase):
    """A file of `size` bytes with a place of its own in it."""

    def __init__(self, size: int, read: Callable[[int, memoryview], int]):
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to `offset`."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into `buffer` what there is."""
        view = memoryview(buffer).cast("B")[: max(self._size - self._at, 0)]
        count = self._read(self._at, view) if len(view) else 0
        self._at += count
        return count

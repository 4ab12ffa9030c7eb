"""Where the bytes of weights come from: one file as it was when it was opened, and the folder that it lies in.

Decides that nothing is read from a file that changed since it was opened, and that a name out of a file never
leads out of the folder of that file. Knows nothing of any container.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from steelyard.errors import FormatError, printable, quoted

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST = 1000  # characters of the name of a file
NAMES = 100_000  # files of a folder that are looked at


class Source(ABC):
    """One file: its size, and its bytes at any place. What it is made of must not change between two reads."""

    path: Path | str  # what errors call it
    size: int  # bytes

    @abstractmethod
    def reading(self) -> AbstractContextManager[IO[bytes]]:
        """The open file, which can seek; raises FormatError if it changed since this Source was made."""

    @property
    @abstractmethod
    def folder(self) -> Folder:
        """The folder of the file, for the other files of the same weights."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    def fill(self, file: IO[bytes], offset: int, buffer: WriteableBuffer) -> None:
        """Fill `buffer` with the bytes from `offset` on; raises FormatError if the file ends before."""
        if not memoryview(buffer).nbytes:
            return
        rest = memoryview(buffer).cast("B")
        try:
            file.seek(offset)
            while len(rest):
                count = file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise FormatError(f"the file ends {len(rest)} bytes too early", path=self.path, offset=offset)
                rest = rest[count:]
        except OSError as error:
            raise FormatError(unreadable(error), path=self.path, offset=offset) from error

    def bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        buffer = bytearray(count)
        with self.reading() as file:
            self.fill(file, offset, buffer)
        return bytes(buffer)

    def origin(self, offset: int) -> str:
        """What an error says of a tensor whose bytes begin at `offset`."""
        return f"{printable(str(self.path))} @{offset}"


class Folder(ABC):
    """A folder and the files in it. Names in it are relative, with '/' between their parts."""

    path: Path | str  # what errors call it

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the files that lie directly in it, sorted."""

    @abstractmethod
    def source(self, name: str) -> Source:
        """The file `name`; raises FormatError where there is none, or where the name leads out of the folder."""

    def find(self, name: str) -> Source | None:
        """The file `name`, or None where the folder has none; raises FormatError for a name that leads out."""
        return self.source(name) if name in self.names() else None


@dataclass(frozen=True)
class LocalFile(Source):
    """A file on this machine. Every read opens it anew and checks that it is still the same."""

    path: Path
    size: int
    stamp: tuple[int, int, int]  # device, inode, time of the last change in ns

    @staticmethod
    def of(path: Path) -> LocalFile:
        """The file at `path`; raises FormatError if it is not a regular file that can be read."""
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise FormatError(unreadable(error), path=path) from error
        if stat.S_ISDIR(status.st_mode):
            raise FormatError("expected a file, found a directory; name the file in it", path=path)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("expected a regular file, found a device, a pipe or a socket", path=path)
        if status.st_size == 0:
            raise FormatError("expected weights, found an empty file; write or download it again", path=path)
        return LocalFile(path, status.st_size, _stamp(status))

    @contextmanager
    def reading(self) -> Iterator[io.FileIO]:
        """The open file, without a buffer; raises FormatError if it changed since this Source was made."""
        try:
            file = io.FileIO(self.path, "r")
        except OSError as error:
            raise FormatError(unreadable(error), path=self.path) from error
        with file:
            status = os.fstat(file.fileno())
            if (status.st_size, _stamp(status)) != (self.size, self.stamp):
                raise FormatError("the file was changed since it was opened; open it again", path=self.path)
            yield file

    @property
    def folder(self) -> LocalFolder:
        """The folder that the path names, whatever the path is a link to."""
        return LocalFolder(self.path.parent)


@dataclass(frozen=True)
class InMemory(Source):
    """Bytes that are in memory already, under the name by which errors call them.

    >>> InMemory(b"abc", "made up").bytes(1, 2)
    b'bc'
    """

    content: bytes
    path: Path | str = "memory"

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of bytes."""
        return len(self.content)

    @contextmanager
    def reading(self) -> Iterator[io.BytesIO]:
        """The bytes as a file."""
        yield io.BytesIO(self.content)

    @property
    def folder(self) -> Folder:
        """Raises FormatError: what is in memory lies beside no other file."""
        raise FormatError("is in memory and beside no other file", path=self.path)


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A folder on this machine."""

    path: Path

    def names(self) -> list[str]:
        """The names of the entries that are no folders; raises FormatError where it cannot be read."""
        found: list[str] = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if not entry.is_dir():
                        found.append(entry.name)
                    if len(found) > NAMES:
                        raise FormatError(f"more than {NAMES} files in one folder; name the file", path=self.path)
        except OSError as error:
            raise FormatError(unreadable(error), path=self.path) from error
        return sorted(found)

    def source(self, name: str) -> LocalFile:
        """The file `name`, which must lie in this folder even where it is a link."""
        path = self.path / inside(name, self.path)
        try:
            root, real = os.path.realpath(self._root()), os.path.realpath(path)
        except OSError as error:
            raise FormatError(f"{quoted(name)} {unreadable(error)}", path=self.path) from error
        if os.path.commonpath((root, real)) != root:
            raise FormatError(f"{quoted(name)} is a link that leads out of the folder; copy the file", path=self.path)
        return LocalFile.of(path)

    def _root(self) -> Path:
        """What links may lead to: this folder, or all of a model in the cache of the Hugging Face hub.

        There, ``models--x/snapshots/revision/file`` is a link to ``models--x/blobs/hash``.
        """
        above = self.path.absolute().parent
        cached = above.name == "snapshots" and (above.parent / "blobs").is_dir()
        return above.parent if cached else self.path


def inside(name: str, folder: Path | str) -> str:
    """`name`, a name out of a file; raises FormatError for one that is absolute, leads upwards, or is none.

    >>> inside("shards/model-00001.safetensors", "m")
    'shards/model-00001.safetensors'
    >>> inside("../secret", "m")
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: m: '../secret' leads out of the folder; only files in it are read
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise FormatError(f"{quoted(name)} leads out of the folder; only files in it are read", path=folder)
    if not 0 < len(name) <= LONGEST or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FormatError(f"{quoted(name)} is no name of a file", path=folder)
    return name


def unreadable(error: OSError | ValueError) -> str:
    """What an error says of a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the path"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns

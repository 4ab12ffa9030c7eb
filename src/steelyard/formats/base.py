"""What every container promises, and the half that they share: a file that is written.

Decides that a file is only ever replaced as a whole. Knows nothing of any particular container; what they
share in reading is in ``source``.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer

HEAD = 16  # bytes that `Format.claims` gets to see
COPY = 1 << 20  # bytes that are copied at a time between files
TEMPORARY = re.compile(r"\.steelyard-[0-9a-f]{12}\.tmp")  # how new files are called until they are whole


class Format(ABC):
    """One container that can be read. Final subclasses are frozen dataclasses, one row each in FORMATS."""

    name: ClassVar[str]  # its row in the table of formats
    suffixes: ClassVar[tuple[str, ...]] = ()  # in lower case, with the dot
    entries: ClassVar[tuple[str, ...]] = ()  # globs: the file by which a whole folder of this format is opened
    several: ClassVar[bool] = False  # whether its file names others, which hold the tensors

    @abstractmethod
    def claims(self, head: bytes, source: Source, /) -> bool:
        """Whether the content, of which `head` is the beginning, is of this format."""

    @abstractmethod
    def open(self, source: Source, /) -> Weights:
        """The weights in a file; reads its header only. Raises FormatError for a file that breaks the rules."""


class Writable(Format):
    """One container that can also be written; its fields, if it has any, say how."""

    dtypes: ClassVar[frozenset[str]]  # the names of the dtypes that it holds plain

    @abstractmethod
    def write(self, weights: Weights, path: Path, /) -> int:
        """Write all of `weights` or nothing; the bytes of what was written. Raises FormatError."""

    def move(self, draft: Path, path: Path, /) -> None:
        """Give what was written to `draft`, on the same disk, the name `path`, as a whole. Raises FormatError."""
        with writing(path):
            if path.exists():
                draft.chmod(stat.S_IMODE(path.stat().st_mode))
            draft.replace(path)


class Resumable(Writable):
    """One container that can be written in several attempts."""

    @abstractmethod
    def resume(self, weights: Weights, path: Path, /) -> int:
        """Like `write`, but what an attempt before, of the same weights, has left in the folder of `path` is kept.

        Nobody else writes to that folder. What is left there when an attempt fails is for the next one.
        """


def empty(spec: Spec, source: Source, offset: int, name: str) -> np.ndarray:
    """A fresh array for a tensor of a file; raises FormatError where memory or numpy cannot hold it."""
    import numpy as np

    try:
        return np.empty(spec.shape, spec.dtype.numpy)
    except (MemoryError, ValueError, OverflowError) as error:
        text = f"tensor {quoted(name)}: {spec.dtype} of rank {len(spec.shape)} does not fit into memory: {error}"
        raise FormatError(text[:300], path=source.path, offset=offset) from error


def announced(weight: Weight, value: np.ndarray) -> np.ndarray:
    """`value`, checked to be what its weight says; raises WeightsError otherwise."""
    return replace(weight, read=lambda: value).array()


def check_text(text: str, what: str, path: Path | str) -> None:
    """Raise FormatError for half a surrogate pair, which no file can hold as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{what} {quoted(text)} is not Unicode text; rename it", path=path) from error


def check_target(target: Path, source: Path | None = None, *, force: bool = False) -> None:
    """Raise FormatError for a target that is a folder, the source itself, or there already and not to be replaced."""
    if target.is_dir():
        raise FormatError("expected a file to write, found a directory; name a file in it", path=target)
    if source is not None and target.exists() and source.exists() and source.samefile(target):
        raise FormatError("is the source itself; write to another name", path=target)
    if target.exists() and not force:
        raise FormatError("exists already; choose another name, or replace it with --force", path=target)


def flat_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, little-endian, without a copy where they already lie so."""
    import numpy as np

    array = np.ascontiguousarray(array)
    if array.dtype.str[0] == ">" or (sys.byteorder == "big" and array.dtype.itemsize > 1):
        array = array.byteswap()
    return array.reshape(-1).view(np.uint8).data


class Sink:
    """The file that is being written; the errors of the disk get the name of the target."""

    def __init__(self, file: io.FileIO, path: Path, kept: int = 0, wrote: Callable[[int], None] | None = None):
        self._file, self._path = file, path
        self._kept = kept  # bytes at the beginning that are there from an attempt before
        self._wrote = wrote  # is told where the file ends

    def write(self, data: ReadableBuffer) -> int:
        """Append `data`, and the number of its bytes; raises FormatError where the disk does not take it."""
        count = memoryview(data).nbytes
        if count:
            rest = memoryview(data).cast("B")
            with writing(self._path):
                rest = rest[self._agreeing(rest) :]
                while len(rest):
                    rest = rest[self._file.write(rest) :]
                if self._wrote is not None:
                    self._wrote(self._file.tell())
        return count

    def skip(self, count: int, unit: int = 1) -> int:
        """Pass over as many whole units of the next `count` bytes as are there already; their number of bytes."""
        if not self._kept:
            return 0
        at = self._file.tell()
        there = max(0, min(count, self._kept - at)) // unit * unit
        self.seek(at + there)
        return there

    def _agreeing(self, data: memoryview) -> int:
        """How many bytes of `data` are there already; where others are, those and all that follow them go."""
        at = self._file.tell() if self._kept else 0
        if self._kept <= at:
            return 0
        there = self._file.read(min(len(data), self._kept - at))
        if there == data[: len(there)]:
            return len(there)
        self._file.seek(at)
        self.truncate()
        return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset`."""
        with writing(self._path):
            return self._file.seek(offset, whence)

    def truncate(self) -> None:
        """Drop what follows after here."""
        with writing(self._path):
            self._file.truncate()
        self._kept = min(self._kept, self._file.tell())

    def tell(self) -> int:
        """Where the next byte goes."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing to do: there is no buffer."""

    def fileno(self) -> int:
        """The number that the system gave to the file."""
        return self._file.fileno()


@contextmanager
def replacing(path: Path) -> Iterator[Sink]:
    """A new file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises FormatError where `path` cannot be written; what was there before stays whole.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise FormatError("expected a file to write, found a directory or a device", path=path)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    with staging(target, path) as (sink, temporary):
        yield sink
        with writing(path):
            os.fsync(sink.fileno())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)


@contextmanager
def staging(target: Path, path: Path) -> Iterator[tuple[Sink, Path]]:
    """A new file in the folder of `target`, and its name, which is gone after the block; errors call it `path`.

    What processes that were killed have left in that folder goes, too.
    """
    with writing(path):
        if not target.parent.is_dir():
            raise FormatError(f"the folder {quoted(str(target.parent))} is not there; create it first", path=path)
        _swept(target.parent.absolute())
        file, temporary = _fresh(target.parent)
    try:
        with file:
            yield Sink(file, path), temporary
    finally:
        temporary.unlink(missing_ok=True)


def _fresh(folder: Path) -> tuple[io.FileIO, Path]:
    """A new file that is locked while it is open, and its name."""
    while True:
        path = folder / f".steelyard-{secrets.token_hex(6)}.tmp"
        file = io.FileIO(path, "x+")  # no buffer that could fail once more when it is closed
        if locked(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            return file, path
        file.close()  # another process took it for a leftover before it was locked
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the new files in a folder whose process ended before it could: those that nobody holds locked."""
    with suppress(OSError):  # the folder may be one that cannot be listed, and what is left in it does no harm
        for found in folder.iterdir():
            if TEMPORARY.fullmatch(found.name) and stat.S_ISREG(found.lstat().st_mode):
                number = os.open(found, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if locked(number):
                        found.unlink()
                finally:
                    os.close(number)


_swept = cache(sweep)  # once in a process: a folder may get many files


def locked(number: int) -> bool | None:
    """Lock an open file until it is closed: whether that was possible; None on a system without such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return None
    return True


@contextmanager
def spooling(path: Path) -> Iterator[io.FileIO]:
    """A nameless file on the disk of `path` for what must wait until its place in the file is known."""
    with ExitStack() as stack:
        with writing(path):
            spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent, buffering=0))
        yield spool


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The errors of the disk inside the block become FormatErrors that name `path`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"cannot be written: {reason}", path=path) from error

"""A file that may take several attempts to write: what one leaves behind, the next goes on from.

Decides that bytes count once they are on the disk, and that a number beside them, the mark, says how many those
are; what follows after it is written again. Knows nothing of what the file holds, nor whether both attempts are
of the same: who calls must know.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from steelyard.formats.base import Sink, writing

MARK = 1 << 28  # bytes after which a mark is made
WORTH = 1 << 24  # bytes that are worth a mark when an attempt ends early


@contextmanager
def resuming(path: Path) -> Iterator[Sink]:
    """A new file that takes the place of `path` when the block ends well; else it stays, for the next call.

    `path` lies in a folder that nobody else writes to. The sink knows how many bytes are there already. Raises
    FormatError where the file cannot be written.
    """
    draft = path.with_name(f"{path.name}.part")
    mark = _Mark(path.with_name(f"{path.name}.mark"))
    with writing(path):
        file = io.FileIO(draft, "r+" if draft.exists() else "x+")
    with file:
        with writing(path):
            file.truncate(min(mark.bytes, os.fstat(file.fileno()).st_size))
            kept = os.fstat(file.fileno()).st_size
        try:
            with ThreadPoolExecutor(1) as pool:
                yield Sink(file, path, kept, lambda at: mark.wrote(file, at, pool))
            with writing(path):
                os.fsync(file.fileno())
                draft.replace(path)
                mark.remove()
        except BaseException:
            if file.tell() - mark.bytes >= WORTH:
                with suppress(OSError):  # the error that ended the attempt is the one to tell
                    mark.make(file, file.tell())
            if not mark.bytes:
                draft.unlink(missing_ok=True)
            raise


class _Mark:
    """How many bytes of a file are on the disk for sure."""

    def __init__(self, path: Path):
        self._path = path
        self.bytes = _number(path)
        self._making: Future[None] | None = None

    def wrote(self, file: io.FileIO, at: int, pool: ThreadPoolExecutor) -> None:
        """The file ends at `at`: make a mark there, beside the work, if it is time for one."""
        if at < self.bytes:  # what was there turned out to be something else
            self.remove()
        if at - self.bytes < MARK or (self._making is not None and not self._making.done()):
            return
        if self._making is not None:
            self._making.result()
        self._making = pool.submit(self.make, file, at)

    def make(self, file: io.FileIO, at: int) -> None:
        """Put the bytes up to `at` on the disk, and then the number."""
        os.fsync(file.fileno())
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_text(str(at))
        fresh.replace(self._path)
        self.bytes = at

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self.bytes = 0


def _number(path: Path) -> int:
    """The number in a file; 0 where there is none."""
    try:
        text = path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0

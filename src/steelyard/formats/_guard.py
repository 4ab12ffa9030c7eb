"""The file that the HDF5 library reads from: what would send the library round in circles never reaches it.

Decides that a global heap whose objects do not fill it is refused (the library steps from object to object by
their sizes, and a size of nothing keeps it there for ever), and how often and how much the library may read.

Specification: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, "Global Heap"
"""

from __future__ import annotations

import io
import struct
from typing import IO, TYPE_CHECKING

from steelyard.errors import FormatError
from steelyard.formats.source import Source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEAP = b"GCOL"
HEAD, OBJECT = 16, 16  # bytes before the objects of a heap, and before the content of an object
HEAP_LIMIT = 1 << 26  # bytes
READS = 1_000_000


class Guard(io.RawIOBase):
    """A file that can be read and sought, and is closed by whoever opened it."""

    def __init__(self, file: IO[bytes], source: Source):
        self._file, self._source, self._left = file, source, READS

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to `offset`."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._file.tell()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into `buffer`; raises FormatError for a heap that is damaged."""
        self._left -= 1
        if self._left < 0:
            raise FormatError(f"more than {READS} reads to find what is in it", path=self._source.path, offset=0)
        at = self._file.tell()
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        view = memoryview(buffer).cast("B")
        if bytes(view[:4]) == HEAP and count >= HEAD:
            self._check(at, struct.unpack_from("<Q", view, 8)[0])
            self._file.seek(at + count)
        return int(count)

    def _check(self, begin: int, size: int) -> None:
        """The objects of the heap at `begin` must lie in its `size` bytes, one after the other."""
        if not HEAD <= size <= min(HEAP_LIMIT, self._source.size - begin):
            raise FormatError(f"a global heap of {size} bytes", path=self._source.path, offset=begin)
        raw = bytearray(size)
        self._source.fill(self._file, begin, raw)
        at = HEAD
        while size - at >= OBJECT:
            index, length = struct.unpack_from("<H6xQ", raw, at)
            step = length if index == 0 else OBJECT + (length + 7) // 8 * 8  # the free space counts its own head
            if not OBJECT <= step <= size - at:
                text = f"a global heap with an object of {length} bytes, {size - at} are left"
                raise FormatError(text, path=self._source.path, offset=begin + at)
            at += step

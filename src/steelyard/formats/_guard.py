"""The file that the HDF5 library reads from: what would send the library round in circles never reaches it.

Decides that a global heap whose objects do not fill it is refused (the library steps from object to object by
their sizes, and a size of nothing keeps it there for ever), and how often and how much the library may read.

Specification: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, "Global Heap"
"""

from __future__ import annotations

import io
import math
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
TEXT = 16  # bytes that say where a text lies: its length, the address of its heap, its number there


class Guard(io.RawIOBase):
    """A file that can be read and sought, and is closed by whoever opened it."""

    def __init__(self, file: IO[bytes], source: Source):
        self._file, self._source, self._left = file, source, READS
        self._seen: dict[int, int] = {}  # where the library read from, heaps left out -> up to where
        self._looked: dict[bytes, int] = {}  # the name of an attribute -> how much was seen when it was looked for
        self._found: set[bytes] = set()  # the names of those that were found
        self._checked: set[int] = set()  # where attributes lie that were looked at

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
        else:
            self._seen[at] = max(self._seen.get(at, 0), at + count)
        return int(count)

    def check_texts(self, name: bytes) -> bool:
        """Whether the texts of the attributes called `name` are as long as their places in the heaps.

        The library would ask for memory before it looks. False where no such attribute is in what it has read;
        raises FormatError for a text that is longer than its place.
        """
        total = sum(self._seen.values()) + len(self._seen)
        if self._looked.get(name) != total:
            self._looked[name] = total
            for begin, end in self._spans():
                raw = bytearray(end - begin)
                self._source.fill(self._file, begin, raw)
                at = raw.find(name + b"\0")
                while at >= 0:
                    if begin + at not in self._checked and self._check_attribute(bytes(raw), at, len(name) + 1, begin):
                        self._checked.add(begin + at)
                        self._found.add(name)
                    at = raw.find(name + b"\0", at + 1)
        return name in self._found

    def _spans(self) -> list[tuple[int, int]]:
        """What the library has read, as pieces that do not touch."""
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(self._seen.items()):
            if spans and start <= spans[-1][1]:
                start, last = spans.pop()
                stop = max(stop, last)
            spans.append((start, stop))
        return spans

    def _check_attribute(self, raw: bytes, at: int, length: int, begin: int) -> bool:
        """Check the attribute message whose name of `length` bytes is at `raw[at]`; False where it is none."""
        for version, head, unit in ((1, 8, 8), (2, 8, 1), (3, 9, 1)):
            if at < head or raw[at - head] != version:
                continue
            sizes = struct.unpack_from("<3H", raw, at - head + 2)
            if sizes[0] != length:
                continue
            first = at + sum(-(-size // unit) * unit for size in sizes)
            last = first + TEXT * self._count(raw[first - -(-sizes[2] // unit) * unit : first])
            if last > len(raw):
                continue
            for place in range(first, last, TEXT):
                size, heap, number = struct.unpack_from("<LQL", raw, place)
                self._check_text(size, heap, number, begin + place)
            return True
        return False

    @staticmethod
    def _count(space: bytes) -> int:
        """How many values a dataspace message announces, no more than there can be in a header."""
        if len(space) < 4 or space[0] not in (1, 2):
            return 0
        rank, head = space[1], 8 if space[0] == 1 else 4
        dims = [int.from_bytes(space[head + 8 * n : head + 8 * n + 8], "little") for n in range(rank)]
        return min(math.prod(dims), 1 << 20)

    def _check_text(self, length: int, heap: int, number: int, at: int) -> None:
        """Check a text of `length` bytes, which is the object `number` of the heap at byte `heap`."""
        head = bytearray(HEAD)
        if length == 0:
            return
        if heap > self._source.size - HEAD:
            raise FormatError(f"a text in a heap at byte {heap}", path=self._source.path, offset=at)
        self._source.fill(self._file, heap, head)
        if head[:4] != HEAP or length > struct.unpack_from("<Q", head, 8)[0]:
            text = f"a text of {length} bytes, object {number} of a heap that has not so many"
            raise FormatError(text, path=self._source.path, offset=at)

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

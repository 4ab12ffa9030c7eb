"""The values of one HDF5 dataset: in one piece, in chunks that are filtered, or inside the header.

Decides that what unpacks to more than a chunk is refused before memory is asked for. Knows nothing of groups, links
and types. Checksums of the filter fletcher32 are taken off and not compared.

Specification: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight
from steelyard.errors import FormatError, printable, quoted
from steelyard.formats.base import empty
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import h5py
    import numpy as np

DEFLATE_LIMIT = 1032  # no deflated byte stands for more
CHECKSUM = 4  # bytes of fletcher32


@dataclass(frozen=True)
class Chunked:
    """The shape of the chunks of a dataset, and the filters that were applied to each, in order."""

    shape: tuple[int, ...]
    filters: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """One dataset of numbers and where its values lie."""

    source: Source
    path: str
    spec: Spec
    swapped: bool  # big-endian
    stored: int
    library: Callable[[Source], AbstractContextManager[h5py.File]]  # opens the file again
    begin: int | None = None  # where the values lie in one piece
    chunks: Chunked | None = None
    foreign: str = ""  # a filter that is not undone here

    def contiguous(self, begin: int) -> Dataset:
        """The dataset with its values in one piece."""
        return replace(self, begin=begin)

    def chunked(self, chunks: Chunked) -> Dataset:
        """The dataset with its values in chunks."""
        return replace(self, chunks=chunks)

    def unreadable(self, foreign: str) -> Dataset:
        """The dataset behind a filter that is not undone here."""
        return replace(self, foreign=foreign)

    def weight(self, name: str) -> Weight:
        """The dataset as a weight."""
        if self.begin is not None:
            origin = self.source.origin(self.begin)
            return Weight(name, self.spec, self._whole, self.stored, origin, fill=self._fill)
        read = self._assembled if self.chunks is not None else self._refused if self.foreign else self._library
        return Weight(name, self.spec, read, self.stored, self.source.origin(0))

    def _wrong(self, text: str, offset: int | None = None) -> FormatError:
        return FormatError(f"{quoted(self.path)}: {text}", path=self.source.path, offset=offset)

    def _refused(self) -> np.ndarray:
        raise self._wrong(f"the filter {printable(self.foreign)} is not undone here; write it with gzip or plain")

    def _fill(self, first: int, flat: np.ndarray) -> None:
        """Read the elements from `first` on into `flat`."""
        import numpy as np

        with self.source.reading() as file:
            self.source.fill(file, (self.begin or 0) + first * flat.itemsize, flat.view(np.uint8).data)
        self._turn(flat)

    def _turn(self, array: np.ndarray) -> None:
        if array.itemsize > 1 and self.swapped != (sys.byteorder == "big"):
            array.byteswap(inplace=True)

    def _whole(self) -> np.ndarray:
        array = empty(self.spec, self.source, self.begin or 0, self.path)
        self._fill(0, array.reshape(-1))
        return array

    def _library(self) -> np.ndarray:
        """A small dataset whose values lie in its header, or nowhere: the library knows them."""
        import numpy as np
        from h5py import h5s

        array = empty(self.spec, self.source, 0, self.path)
        if array.size:
            with self.library(self.source) as file:
                found = _dataset(file, self.path)
                raw = np.empty(self.spec.shape, f"V{array.itemsize}")
                found.read(h5s.ALL, h5s.ALL, raw, mtype=found.get_type())
                array.reshape(-1).view(np.uint8)[:] = raw.reshape(-1).view(np.uint8)
        self._turn(array)
        return array

    def _assembled(self) -> np.ndarray:
        """The values out of their chunks, of which one at a time is in memory."""
        shape = self.chunks.shape if self.chunks else ()
        array = empty(self.spec, self.source, 0, self.path)
        expected = math.prod(-(-n // m) for n, m in zip(self.spec.shape, shape, strict=True)) if array.size else 0
        places = self._places(expected)
        with self.source.reading() as file:
            for place, (begin, size, mask) in places.items():
                if any(at % m or at >= n for at, n, m in zip(place, self.spec.shape, shape, strict=True)):
                    raise self._wrong(f"there is no chunk at {place}", begin)
                if begin + size > self.source.size:
                    raise self._wrong(f"a chunk from byte {begin} to {begin + size}; the file is cut off", begin)
                raw = bytearray(size)
                self.source.fill(file, begin, raw)
                chunk = self._unfiltered(bytes(raw), mask, begin)
                window = tuple(
                    slice(at, min(at + m, n)) for at, n, m in zip(place, self.spec.shape, shape, strict=True)
                )
                array[window] = chunk[tuple(slice(0, each.stop - each.start) for each in window)]
        self._turn(array)
        return array

    def _places(self, expected: int) -> dict[tuple[int, ...], tuple[int, int, int]]:
        """Where each chunk lies: its byte, its size, and which filters were left out."""
        places: dict[tuple[int, ...], tuple[int, int, int]] = {}

        def note(info: Any) -> object:
            places[tuple(info.chunk_offset)] = (int(info.byte_offset), int(info.size), int(info.filter_mask))
            return None if len(places) <= expected else True

        if expected:
            with self.library(self.source) as file:
                _dataset(file, self.path).chunk_iter(note)
        if len(places) != expected:
            found = len(places) if len(places) < expected else "more"
            raise self._wrong(f"expected {expected} chunks, found {found}; values that were never written are none")
        return places

    def _unfiltered(self, raw: bytes, mask: int, begin: int) -> np.ndarray:
        """One chunk, its filters undone from the last to the first."""
        import numpy as np

        shape, filters = (self.chunks.shape, self.chunks.filters) if self.chunks else ((), ())
        item = self.spec.dtype.numpy.itemsize
        nbytes = math.prod(shape) * item
        for number, kind in reversed([*enumerate(filters)]):
            if mask >> number & 1:
                continue
            if kind == "fletcher32":
                raw = raw[:-CHECKSUM]
            elif kind == "deflate":
                raw = self._inflated(raw, nbytes + CHECKSUM, begin)
            else:
                whole = len(raw) // item * item
                planes = np.frombuffer(raw[:whole], np.uint8).reshape(item, -1)
                raw = planes.T.tobytes() + raw[whole:]
        if len(raw) != nbytes:
            raise self._wrong(f"a chunk of {nbytes} bytes has {len(raw)}", begin)
        return np.frombuffer(raw, self.spec.dtype.numpy).reshape(shape)

    def _inflated(self, raw: bytes, most: int, begin: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            found = stream.decompress(raw, most + 1)
        except zlib.error as error:
            raise self._wrong(f"a chunk that does not inflate ({error})", begin) from error
        if len(found) > most or not stream.eof:
            raise self._wrong("a chunk that inflates to more than it holds, or is cut off", begin)
        return found


def _dataset(file: h5py.File, path: str) -> Any:
    from h5py import h5d

    return h5d.open(file.id, path.encode())

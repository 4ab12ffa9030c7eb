"""The wire format of protocol buffers, read where it lies in a file: fields come one by one, payloads are stepped over.

Decides which encodings are valid: no groups, no field 0, no varint beyond 64 bits, no length beyond its message, and
only so many fields in all. Knows no message: what a field number means is the caller's.

Specification: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NamedTuple

from steelyard.errors import FormatError
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
WIRES = {VARINT: "a varint", FIXED64: "8 bytes", LENGTH: "a length", FIXED32: "4 bytes"}
FIELDS = 1_000_000  # of all messages that are looked into
LONGEST = 10  # bytes of a varint of 64 bits
SMALL, LARGE = 512, 1 << 16  # bytes that are read at a time: few after a payload was stepped over, more in a row
TEXT = 1 << 16  # bytes of a text


class Field(NamedTuple):
    """One field: its number, its wire type, the value of a varint, and where its payload lies in the file."""

    number: int
    wire: int
    value: int
    begin: int
    end: int


class Wire:
    """The messages in an open file."""

    def __init__(self, source: Source, file: IO[bytes], limit: int = FIELDS):
        self._source, self._file, self._left, self._limit = source, file, limit, limit
        self._data, self._base, self._size = b"", 0, SMALL

    def wrong(self, at: str, text: str, offset: int) -> FormatError:
        """The error for what is wrong at byte `offset`, in the field with the path `at`."""
        return FormatError(f"{at}: {text}" if at else text, path=self._source.path, offset=offset)

    def fields(self, begin: int, end: int, at: str) -> Iterator[Field]:
        """The fields of the message that lies from `begin` to `end`; raises FormatError naming `at` and the byte."""
        while begin < end:
            self._left -= 1
            if self._left < 0:
                raise self._endless(at, begin)
            here, data = begin - self._base, self._data
            if here >= 0 and here + 2 <= len(data) and data[here] < 128 and data[here + 1] < 128:
                tag, value, here = data[here], data[here + 1], begin + 2  # what nearly all fields are: read in one go
                wire = tag & 7
                if wire > LENGTH or wire == FIXED64:
                    value, here = 0, begin + 1
            else:
                tag, here = self._varint(begin, end, at)
                wire, value = tag & 7, 0
                if wire in (VARINT, LENGTH):
                    value, here = self._varint(here, end, at)
            if wire == LENGTH:
                stop, value = here + value, 0
            elif wire == VARINT:
                stop = here
            elif wire in (FIXED32, FIXED64):
                stop = here + (4 if wire == FIXED32 else 8)
            else:
                text = f"expected a field of wire type 0, 1, 2 or 5, found {wire}"
                raise self.wrong(at, f"{text} (a group)" if wire in (3, 4) else text, begin)
            if not 8 <= tag < 1 << 32:
                raise self.wrong(at, f"expected a field number from 1 to 2^29-1, found {tag >> 3}", begin)
            if stop > end:
                left = max(end - here, 0)
                text = f"field {tag >> 3} takes {stop - here} bytes, {left} are left of its message"
                raise self.wrong(at, text, begin)
            yield tuple.__new__(Field, (tag >> 3, wire, value, here, stop))  # in half the time of Field(...)
            begin = stop

    def charge(self, fields: int, at: str, offset: int) -> None:
        """Count what takes as long as so many fields; raises FormatError where that is too many."""
        self._left -= fields
        if self._left < 0:
            raise self._endless(at, offset)

    def _endless(self, at: str, offset: int) -> FormatError:
        return self.wrong(at, f"more than {self._limit} fields; this is no graph of a network", offset)

    def text(self, field: Field, at: str) -> str:
        """The text of a field; raises FormatError where it is none, or endless."""
        self.expect(field, LENGTH, at)
        if field.end - field.begin > TEXT:
            raise self.wrong(at, f"a text of {field.end - field.begin} bytes, the limit is {TEXT}", field.begin)
        here = field.begin - self._base
        if here < 0 or field.end - self._base > len(self._data):
            self._load(field.begin, field.end - field.begin)
            here = 0
        try:
            return self._data[here : here + field.end - field.begin].decode()
        except UnicodeDecodeError as error:
            raise self.wrong(at, "expected UTF-8", field.begin + error.start) from error

    def expect(self, field: Field, wire: int, at: str) -> None:
        """Raise FormatError where `field` is not of the wire type `wire`."""
        if field.wire != wire:
            text = f"expected {WIRES[wire]} (wire type {wire}), found {WIRES[field.wire]} (wire type {field.wire})"
            raise self.wrong(at, text, field.begin)

    def signed(self, field: Field, at: str) -> int:
        """The value of a field of type int64 or int32; raises FormatError where it is no varint."""
        self.expect(field, VARINT, at)
        return field.value - (1 << 64) if field.value >> 63 else field.value

    def repeated(self, field: Field, at: str) -> list[int]:
        """The values of one piece of a repeated int64, packed or not; each counts as a field."""
        if field.wire == VARINT:
            return [self.signed(field, at)]
        self.expect(field, LENGTH, at)
        found, here = [], field.begin
        while here < field.end:
            self.charge(1, at, here)
            value, here = self._varint(here, field.end, at)
            found.append(value - (1 << 64) if value >> 63 else value)
        return found

    def _varint(self, begin: int, end: int, at: str) -> tuple[int, int]:
        """The varint at `begin`, and where it ends; raises FormatError if `end` comes before."""
        here = begin - self._base
        if here < 0 or here + LONGEST > len(self._data):
            self._load(begin, LONGEST)
            here = 0
        data = self._data
        value = data[here]
        if value < 128:
            if begin >= end:
                raise self.wrong(at, "the message ends inside a field", begin)
            return value, begin + 1
        value &= 127
        for count in range(1, LONGEST):
            byte = data[here + count]
            value |= (byte & 127) << 7 * count
            if byte < 128:
                if begin + count >= end:
                    break
                if value >> 64:
                    raise self.wrong(at, "a varint of more than 64 bits", begin)
                return value, begin + count + 1
        if begin + LONGEST > end:
            raise self.wrong(at, "the message ends inside a varint", begin)
        raise self.wrong(at, f"a varint of more than {LONGEST} bytes", begin)

    def _load(self, begin: int, count: int) -> None:
        """Have at least `count` bytes from `begin` on at hand; behind the end of the file there are zeros."""
        near = 0 <= begin - self._base <= len(self._data)
        self._size = min(self._size * 2, LARGE) if near and self._data else SMALL
        found = bytearray(max(min(max(self._size, count), self._source.size - begin), 0))
        self._source.fill(self._file, begin, found)
        last = begin + len(found) >= self._source.size
        self._data, self._base = bytes(found) + bytes(LONGEST if last else 0), begin


def varints(raw: np.ndarray) -> tuple[np.ndarray, int]:
    """The varints in bytes as uint64, and how many bytes at the end belong to one that is not complete.

    >>> import numpy as np
    >>> varints(np.uint8([1, 0x96, 0x01, 0x80]))
    (array([  1, 150], dtype=uint64), 1)

    Raises ValueError for one of more than ten bytes.
    """
    import numpy as np

    ends = np.flatnonzero(raw < 128)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    rest = len(raw) - (int(ends[-1]) + 1 if len(ends) else 0)
    lengths = ends - starts + 1
    longest = int(lengths.max(initial=0))
    if max(longest, rest + 1) > LONGEST:
        raise ValueError(f"a varint of more than {LONGEST} bytes")
    values = np.zeros(len(ends), np.uint64)
    for place in range(longest):
        there = lengths > place
        values[there] |= (raw[starts[there] + place] & 127).astype(np.uint64) << np.uint64(7 * place)
    return values, rest

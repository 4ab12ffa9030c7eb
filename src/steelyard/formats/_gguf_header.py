"""The header of a GGUF file, strictly: every count, length, type, alignment, dimension and offset is checked first.

Decides what a valid header is. Values of metadata are stepped over and stay bytes until somebody asks for one:
a vocabulary of 150,000 tokens costs one walk over its lengths. Knows no tensor's values and no codec.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import FormatError, quoted
from steelyard.formats.source import Source

MAGIC = b"GGUF"
HEADER_LIMIT = 100_000_000  # bytes
KEYS = 1 << 16  # entries of metadata
TENSORS = 1 << 18
STRINGS = 1 << 22  # in all arrays of text together; the largest vocabularies and their merges have a million
KEY_LENGTH = (1 << 16) - 1  # bytes, as the specification has it
NAME_LENGTH = 1024  # bytes; the specification says 64, and some writers do not keep it
RANK = 4
DEPTH = 4  # of arrays in arrays
ALIGNMENTS = tuple(1 << i for i in range(3, 17))
DEFAULT_ALIGNMENT = 32
AHEAD = 1 << 20  # bytes that are read at a time, at most

VALUES: tuple[str, ...] = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "float32",
    "bool",
    "string",
    "array",
    "uint64",
    "int64",
    "float64",
)
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
BOOL, STRING, ARRAY, UINT32 = 7, 8, 9, 4
WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}  # the whole numbers among them


@dataclass(frozen=True)
class Kind:
    """A type of tensor: so many elements in so many bytes, plain as `dtype`, or held by a codec."""

    code: int
    name: str  # in lower case; that of the codec where there is one
    block: int = 1
    width: int = 0
    dtype: str | None = None


_PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
_BLOCKS = {  # code: name, elements and bytes of a block
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}
KINDS = {code: Kind(code, dtype, 1, DTYPES[dtype].bits // 8, dtype) for code, dtype in _PLAIN.items()}
KINDS |= {code: Kind(code, *row) for code, row in _BLOCKS.items()}
REMOVED = {4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8"}
REMOVED |= {36: "iq4_nl_4_4", 37: "iq4_nl_4_8", 38: "iq4_nl_8_8"}


@dataclass(frozen=True)
class Value:
    """One entry of metadata: its type, and where its bytes begin in the header."""

    kind: int
    begin: int


@dataclass(frozen=True)
class Entry:
    """One tensor; `begin` is where its bytes lie in the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # as numpy has it, the fastest axis last
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All that the header tells."""

    raw: bytes | bytearray  # its bytes, from the first of the file on
    version: int
    alignment: int
    values: Mapping[str, Value]
    tensors: tuple[Entry, ...]

    @staticmethod
    def read(source: Source) -> Header:
        """Read and check a header; raises FormatError naming the file, the field and the byte."""
        with source.reading() as file:
            return _header(_Bytes(source, file))

    def number(self, key: str) -> int | None:
        """A whole number of the metadata, or None where the key is not there or is no whole number."""
        value = self.values.get(key)
        if value is None or value.kind not in WHOLE:
            return None
        return int(struct.unpack_from(WHOLE[value.kind], self.raw, value.begin)[0])


class _Bytes:
    """The beginning of a file, as far as it was needed."""

    def __init__(self, source: Source, file: IO[bytes]):
        self.raw, self.size, self.strings = bytearray(), source.size, 0
        self._source, self._file = source, file

    def wrong(self, text: str, offset: int) -> FormatError:
        return FormatError(text, path=self._source.path, offset=offset)

    def need(self, end: int, at: int, what: str) -> None:
        """Have the bytes up to `end`; raises FormatError where the file or the limit ends before."""
        have = len(self.raw)
        if end <= have:
            return
        if end > self.size:
            found = f"{what}: expected {_short(end - at)} bytes, the file has {max(0, self.size - at)} from here on"
            raise self.wrong(f"{found}; fetch it again", at)
        if end > HEADER_LIMIT:
            raise self.wrong(f"{what}: the header takes more than {HEADER_LIMIT} bytes, the limit", at)
        until = max(end, min(self.size, HEADER_LIMIT, have + max(4096, min(have, AHEAD))))
        more = bytearray(until - have)
        self._source.fill(self._file, have, more)
        self.raw += more

    def u32(self, at: int, what: str) -> int:
        self.need(at + 4, at, what)
        return int.from_bytes(self.raw[at : at + 4], "little")

    def u64(self, at: int, what: str) -> int:
        self.need(at + 8, at, what)
        return int.from_bytes(self.raw[at : at + 8], "little")

    def text(self, at: int, limit: int, what: str) -> tuple[str, int]:
        """A text of at most `limit` bytes behind its length, and where it ends."""
        count = self.u64(at, what)
        if count > limit:
            raise self.wrong(f"{what} has {_short(count)} bytes, the limit is {limit}", at)
        end = at + 8 + count
        self.need(end, at, what)
        try:
            return self.raw[at + 8 : end].decode(), end
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8", at + 8 + error.start) from error


def _header(source: _Bytes) -> Header:
    source.need(24, 0, "the header")
    version = _version(source)
    tensors, keys = source.u64(8, "the number of tensors"), source.u64(16, "the number of metadata entries")
    for what, count, least, limit, at in (
        ("tensors", tensors, 24, TENSORS, 8),
        ("metadata entries", keys, 13, KEYS, 16),
    ):
        if count > min(limit, (source.size - 24) // least):
            raise source.wrong(
                f"{_short(count)} {what} do not fit a file of {source.size} bytes, or exceed {limit}", at
            )
    values, at = _values(source, keys)
    alignment = _alignment(source, values.get("general.alignment"))
    entries, at = _entries(source, tensors, at)
    start = at + -at % alignment
    found = [_place(source, start, alignment, entry) for entry in entries]
    _check_overlap(source, found)
    return Header(source.raw, version, alignment, values, tuple(entry for entry, _ in found))


def _version(source: _Bytes) -> int:
    if source.raw[:4] != MAGIC:
        raise source.wrong(f"expected the magic {MAGIC!r}, found {bytes(source.raw[:4])!r}", 0)
    version = source.u32(4, "the version")
    if version in (2, 3):
        return version
    if int.from_bytes(source.raw[4:8], "big") in (1, 2, 3):
        text = "a big-endian file; only little-endian ones are read: turn it round with gguf-convert-endian of gguf-py"
        raise source.wrong(text, 4)
    raise source.wrong(f"expected version 2 or 3 of GGUF, found {version}; write it again with a current tool", 4)


def _values(source: _Bytes, count: int) -> tuple[dict[str, Value], int]:
    """The metadata by key, and where it ends."""
    found: dict[str, Value] = {}
    at = 24
    for i in range(count):
        key, end = source.text(at, KEY_LENGTH, f"the key of metadata entry {i}")
        if key in found:
            raise source.wrong(f"the metadata key {quoted(key)} is given twice", at)
        kind = source.u32(end, f"the type of metadata {quoted(key)}")
        found[key] = Value(kind, end + 4)
        at = _skip(source, kind, end + 4, f"metadata {quoted(key)}", 0)
    return found, at


def _skip(source: _Bytes, kind: int, at: int, what: str, depth: int) -> int:
    """Where a value of a type that begins at `at` ends."""
    width = WIDTHS.get(kind)
    if width is not None:
        source.need(at + width, at, what)
        if kind == BOOL and source.raw[at] > 1:
            raise source.wrong(f"{what}: expected 0 or 1 as a truth value, found {source.raw[at]}", at)
        return at + width
    if kind == STRING:
        end = at + 8 + source.u64(at, what)
        source.need(end, at, what)
        return end
    if kind != ARRAY:
        raise source.wrong(f"{what}: there is no type of value {kind}", at - 4)
    inner, count = source.u32(at, what), source.u64(at + 4, what)
    start = at + 12
    width = WIDTHS.get(inner)
    least = width if width is not None else 8 if inner == STRING else 12
    if count > (source.size - start) // least:
        raise source.wrong(f"{what}: {_short(count)} elements do not fit into the {source.size - start} bytes left", at)
    if width is not None:
        source.need(start + count * width, at, what)
        if inner == BOOL and source.raw[start : start + count].translate(None, b"\0\1"):
            raise source.wrong(f"{what}: expected 0 or 1 as truth values", start)
        return start + count * width
    source.strings += count
    if source.strings > STRINGS:
        raise source.wrong(f"{what}: more than {STRINGS} texts in arrays, the limit", at)
    if inner == STRING:
        return _skip_texts(source, start, count, what)
    if inner != ARRAY:
        raise source.wrong(f"{what}: there is no type of element {inner}", at)
    if depth + 1 >= DEPTH:
        raise source.wrong(f"{what}: arrays lie in arrays {DEPTH} deep or deeper, which nothing needs", at)
    for _ in range(count):
        start = _skip(source, ARRAY, start, what, depth + 1)
    return start


def _skip_texts(source: _Bytes, at: int, count: int, what: str) -> int:
    """Where `count` texts end that follow one another; the one loop that must be quick."""
    length, raw = struct.Struct("<Q").unpack_from, source.raw
    have = len(raw) - 8
    for _ in range(count):
        if at > have:
            source.need(at + 8, at, what)
            have = len(raw) - 8
        begin = at
        at += 8 + length(raw, at)[0]
        if at > source.size:
            source.need(at, begin, what)
    source.need(at, at, what)
    return at


def _alignment(source: _Bytes, value: Value | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.kind != UINT32:
        found = VALUES[value.kind]
        raise source.wrong(f"metadata 'general.alignment': expected a uint32, found {found}", value.begin - 4)
    alignment = source.u32(value.begin, "general.alignment")
    if alignment not in ALIGNMENTS:
        text = f"expected a power of two from {ALIGNMENTS[0]} to {ALIGNMENTS[-1]}, found {alignment}"
        raise source.wrong(f"metadata 'general.alignment': {text}", value.begin)
    return alignment


def _entries(source: _Bytes, count: int, at: int) -> tuple[list[tuple[Entry, int]], int]:
    """The tensors, `begin` counted from the start of the data, each with where it is described; and the end."""
    found: dict[str, tuple[Entry, int]] = {}
    for i in range(count):
        begin = at
        name, at = source.text(at, NAME_LENGTH, f"the name of tensor {i}")
        what = f"tensor {quoted(name)}"
        if name in found:
            raise source.wrong(f"{what} is there twice", begin)
        rank = source.u32(at, what)
        if rank > RANK:
            raise source.wrong(f"{what}: {rank} dimensions, the limit is {RANK}", at)
        end = at + 4 + 8 * rank + 12
        source.need(end, at, what)
        *dims, code, offset = struct.unpack_from(f"<{rank}QIQ", source.raw, at + 4)
        if any(n >> 63 for n in dims) or Spec(tuple(dims), DTYPES["int8"]).size >> 60:
            raise source.wrong(f"{what}: the dimensions {dims} have more than 2^60 elements", at + 4)
        kind = _kind(source, code, what, end - 12)
        if (dims[0] if dims else 1) % kind.block:
            rows = dims[0] if dims else 1
            text = f"rows of {rows} elements are not whole blocks of {kind.block}, as {kind.name} has them"
            raise source.wrong(f"{what}: {text}", at + 4)
        shape = tuple(reversed(dims))
        nbytes = Spec(shape, DTYPES["int8"]).size // kind.block * kind.width
        found[name] = Entry(name, kind, shape, offset, nbytes), end - 8
        at = end
    return list(found.values()), at


def _kind(source: _Bytes, code: int, what: str, at: int) -> Kind:
    kind = KINDS.get(code)
    if kind is not None:
        return kind
    if code in REMOVED:
        text = f"the type {REMOVED[code]} ({code}) was removed from GGML; quantize the original again"
    else:
        text = f"there is no type {code}; a newer steelyard may know it"
    raise source.wrong(f"{what}: {text}", at)


def _place(source: _Bytes, start: int, alignment: int, found: tuple[Entry, int]) -> tuple[Entry, int]:
    """The tensor with its place in the file, which must lie in it and be aligned."""
    entry, at = found
    what, offset = f"tensor {quoted(entry.name)}", entry.begin
    if offset % alignment:
        raise source.wrong(f"{what}: the offset {offset} is no multiple of the alignment {alignment}", at)
    begin = start + offset
    if begin + entry.nbytes > source.size + (0 if entry.nbytes else alignment):
        text = f"{entry.nbytes} bytes from byte {begin} on, the file has {source.size}; fetch it again"
        raise source.wrong(f"{what}: expected {text}", at)
    return Entry(entry.name, entry.kind, entry.shape, begin, entry.nbytes), at


def _check_overlap(source: _Bytes, found: list[tuple[Entry, int]]) -> None:
    end, before = 0, ""
    for entry, at in sorted(found, key=lambda one: one[0].begin):
        if entry.nbytes and entry.begin < end:
            raise source.wrong(f"tensor {quoted(entry.name)} lies on tensor {quoted(before)}", at)
        if entry.nbytes:
            end, before = entry.begin + entry.nbytes, entry.name


def _short(count: int) -> str:
    """A number that may be endless, as an error shows it."""
    return "2^64-1" if count == (1 << 64) - 1 else str(count)

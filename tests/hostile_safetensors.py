"""Damaged and hostile safetensors files, made on demand: what every entry point must refuse, and what it must bear.

HOSTILE are the bytes of small files, each with a piece of the message that must come. LARGE are files that are
written because of their size, with what must be said of them. VALID are files that are odd and in order. Kept apart
from the tests, so that Python and the command line are put to one list.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (an object, or its bytes) and of data; `length` lies about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """A header of one tensor of four bytes, with some keys of its entry changed."""
    return {"a": {**F32, **changes}}


HOSTILE = {
    "seven bytes": (b"\x02\0\0\0\0\0\0", "8 bytes of header length"),
    "length 2^63": (blob(b"{}", length=2**63), "limit is 100000000"),
    "length over the limit": (blob(b"{}", length=100_000_001), "limit is 100000000"),
    "length beyond the file": (blob(b"{}", length=3), "cut off"),
    "no header": (blob(b""), "begins with"),
    "array": (blob(b"[]"), "begins with"),
    "null": (blob(b"null"), "begins with"),
    "leading space": (blob(b" {}"), "begins with"),
    "byte order mark": (blob(b"\xef\xbb\xbf{}"), "begins with"),
    "spaces": (blob(b" " * 1_000_000), "begins with"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "byte 10: the header is not UTF-8"),
    "no JSON": (blob(b"{a}"), "expected JSON"),
    "two objects": (blob(b"{}{}"), "expected JSON"),
    "deep": (blob(b'{"a":' * 100_000), "nested too deep"),
    "deep list": (blob(b'{"a":' + b"[" * 100_000), "nested too deep"),
    "long integer": (blob(b'{"a":' + b"9" * 10_000 + b"}"), "expected JSON"),
    "duplicate tensor": (blob(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"1234"), "'a' is given twice"),
    "duplicate metadata": (blob(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is given twice"),
    "duplicate key in metadata": (blob(b'{"__metadata__":{"k":"a","k":"b"}}'), "'k' is given twice"),
    "metadata list": (blob({"__metadata__": []}), "__metadata__"),
    "metadata number": (blob({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata surrogate": (blob({"__metadata__": {"a": "\ud800"}}), "Unicode"),
    "name surrogate": (blob({"\ud800": F32}, b"1234"), "Unicode"),
    "NaN": (blob(b'{"a":NaN}'), "NaN"),
    "Infinity": (blob(b'{"a":-Infinity}'), "Infinity"),
    "1e400": (blob(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', b"1234"), "dimensions"),
    "tensor null": (blob({"a": None}), "expected an object"),
    "missing key": (blob({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "expected an object"),
    "extra key": (blob(entry(more=1), b"1234"), "expected an object"),
    "unknown dtype": (blob(entry(dtype="F33"), b"1234"), "unknown dtype 'F33'"),
    "dtype list": (blob(entry(dtype=["F32"]), b"1234"), "unknown dtype"),
    "negative dimension": (blob(entry(shape=[-1]), b"1234"), "dimensions"),
    "float dimension": (blob(entry(shape=[1.0]), b"1234"), "dimensions"),
    "bool dimension": (blob(entry(shape=[True]), b"1234"), "dimensions"),
    "string dimension": (blob(entry(shape=["1"]), b"1234"), "dimensions"),
    "shape number": (blob(entry(shape=1), b"1234"), "dimensions"),
    "400 digits": (blob(entry(shape=[10**399]), b"1234"), "dimensions"),
    "product 2^64": (blob(entry(shape=[2**32, 2**32]), b"1234"), r"takes over 2\^47 bytes"),
    "product wraps to 4": (blob(entry(shape=[2**62 + 1, 4]), b"1234"), r"takes over 2\^47"),
    "zero times 2^64": (blob(entry(shape=[0, 2**64], data_offsets=[0, 0])), "dimensions"),
    "begin > end": (blob(entry(data_offsets=[4, 0]), b"1234"), "begin <= end"),
    "negative begin": (blob(entry(data_offsets=[-4, 0]), b"1234"), "begin <= end"),
    "one offset": (blob(entry(data_offsets=[4]), b"1234"), "begin <= end"),
    "bool offset": (blob(entry(data_offsets=[False, 4]), b"1234"), "begin <= end"),
    "size too small": (blob(entry(data_offsets=[0, 3]), b"123"), "takes 4 bytes, data_offsets have 3"),
    "half a byte": (blob(entry(dtype="F4", shape=[7], data_offsets=[0, 4]), b"1234"), "takes 3.5 bytes"),
    "past the end": (blob(entry(), b"123"), "fetch it again"),
    "trailing bytes": (
        blob(entry(), b"1234PK\x03\x04"),
        "4 bytes follow after the last tensor; fetch the file again, or cut them off",
    ),
    "only trailing": (blob({}, b"1"), "1 bytes follow"),
    "hole": (blob(entry(data_offsets=[1, 5]), b"12345"), "hole of 1 bytes"),
    "overlap": (blob({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456"), "'b' overlaps"),
    "one range twice": (blob({"a": F32, "b": F32}, b"1234"), "overlaps"),
    "reserved key": (blob({"__metadata__": {"steelyard": "mine"}}), "'steelyard': expected JSON"),
    "escaped name": (blob({"a\x1b[2J\n": None}), r"tensor 'a\\x1b\[2J\\n'"),
    "metadata null": (blob({"__metadata__": None}), "__metadata__"),
    "list without end": (blob(b'{"a":['), "expected JSON"),
    "text without end": (blob(b'{"a'), "expected JSON"),
    "comma at the end": (blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', b"1234"), "expected JSON"),
    "comma too many": (blob(b'{,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"), "expected JSON"),
    "no comma": (blob(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"b":1}'), "expected JSON"),
    "NUL after the object": (blob(b"{}\0"), "expected JSON"),
    "line in a name": (blob(b'{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"), "expected JSON"),
    "tensor and metadata of one name": (
        blob(b'{"__metadata__":{},"__metadata__":%b}' % json.dumps(F32).encode()),
        "twice",
    ),
    "rank 20,000": (blob(entry(shape=[1] * 20_000, data_offsets=[0, 4]), b"1234"), "the limit is 10000"),
    "odd bits": (blob(entry(dtype="F6_E2M3", shape=[3], data_offsets=[0, 2]), b"12"), "takes 2.25 bytes"),
    "ELF after the last tensor": (
        blob(entry(), b"1234\x7fELF"),
        "4 bytes follow after the last tensor; fetch the file again, or cut them off",
    ),
    "hole between": (blob({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, b"123456789012"), "hole of 4 bytes"),
    "empty tensor inside another": (
        blob({"a": F32, "b": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]}}, b"1234"),
        "'b' overlaps",
    ),
    "offset 2^64": (blob(entry(data_offsets=[2**64, 2**64 + 4]), b"1234"), "begin <= end"),
    "float offset": (blob(entry(data_offsets=[0.0, 4.0]), b"1234"), "begin <= end"),
    "dimension -0": (blob(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[-0,0]}}'), "-0 is no count"),
}


LAXER = {  # what the reference library opens nevertheless, and the reason for which it is refused here
    "leading space": "the specification: the header MUST begin with an opening brace",
    "duplicate tensor": "the specification: duplicate keys are disallowed",
    "duplicate key in metadata": "the specification: duplicate keys are disallowed",
    "metadata null": "the specification: a map from text to text",
    "extra key": "the specification has three keys; what a fourth one means to whoever wrote it is unknown",
    "rank 20,000": "a shape that no program holds, so that memory stays bounded",
    "reserved key": "the metadata key of this package, which says how packed tensors are held",
}

LAXER_SAYS = (  # what an error says where the reason is one of these
    "expected a header that begins with",
    "is given twice",
    "expected text under text",
    "expected an object of dtype, shape and data_offsets",
    "the limit is 10000",
    "metadata 'steelyard'",
    "does not fit into memory",  # said when the values are asked for: the header is in order
    "no standard says how",
)


@dataclass(frozen=True)
class Large:
    """A file that is made by a function; `message` is a piece of what must be said of it."""

    make: Callable[[Path], int]  # writes the file; the bytes of its header
    message: str


def _file(path: Path, header: bytes, data: int = 0) -> int:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)
    return len(header)


def _entries(count: int, last: bytes) -> bytes:
    rows = (b'"%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count))
    return b"{" + b",".join(rows) + b"," + last + b"}"


LIMIT = 99_000_000  # bytes of a header: nearly as many as are allowed

LARGE = {
    "spaces after the brace": Large(lambda path: _file(path, b"{" + b" " * LIMIT), "expected JSON"),
    "spaces after the object": Large(lambda path: _file(path, b"{}" + b" " * LIMIT, 1), "1 bytes follow"),
    "a text of 99 MB": Large(lambda path: _file(path, b'{"a":"' + b"x" * LIMIT + b'"}'), "expected an object"),
    "a name of 99 MB": Large(lambda path: _file(path, b'{"' + b"x" * LIMIT + b'":1}'), "expected an object"),
    "a dtype of 99 MB": Large(
        lambda path: _file(path, b'{"a":{"dtype":"' + b"x" * LIMIT + b'","shape":[],"data_offsets":[0,0]}}'), "unknown"
    ),
    "a shape of 99 MB": Large(
        lambda path: _file(path, b'{"a":{"dtype":"U8","shape":[' + b"1" * LIMIT + b'],"data_offsets":[0,1]}}', 1),
        "expected JSON",
    ),
    "an offset of 99 MB": Large(
        lambda path: _file(path, b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,' + b"1" * LIMIT + b"]}}", 1),
        "expected JSON",
    ),
    "99 MB of opening braces": Large(lambda path: _file(path, b"{" * LIMIT), "expected JSON"),
    "99 MB of names without values": Large(lambda path: _file(path, b'{"":' * (LIMIT // 4)), "nested too deep"),
    "99 MB of lists": Large(lambda path: _file(path, b'{"a":' + b"[" * LIMIT), "nested too deep"),
    "99 MB that are no UTF-8": Large(lambda path: _file(path, b"{" + b"\xff" * LIMIT), "not UTF-8"),
    "metadata of 99 MB without end": Large(
        lambda path: _file(path, b'{"__metadata__":{' + b'"":"},' * (LIMIT // 6)), "expected JSON"
    ),
    "a gigabyte": Large(lambda path: _sized(path, 10**9), "the limit is 100000000"),
    "500,000 entries and one wrong": Large(
        lambda path: _file(path, _entries(500_000, b'"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}'), 500_000),
        "'x' overlaps",
    ),
}


def _sized(path: Path, header: int) -> int:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", header) + b"{")
        file.truncate(8 + header)
    return header


ODD_NAMES = (
    "a\0b",
    "\x1b[2J\x1b[31mred",
    "\u202egnp.exe",
    "../../etc/passwd",
    "/dev/null",
    "two\nlines\r",
    "",
    "\u2028",
    "é",
)
VALID: dict[str, bytes] = {
    "odd names": blob(
        {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(ODD_NAMES)},
        bytes(len(ODD_NAMES)),
    ),
    "odd metadata": blob({"__metadata__": {name: name for name in ODD_NAMES}, **entry()}, b"1234"),
    "no tensors": blob({}),
    "metadata alone": blob({"__metadata__": {}}),
    "nothing in great shape": blob(entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
    "a name of a megabyte": blob({"\x1b" * 1_000_000: F32}, b"1234"),
    "rank 10,000": blob(entry(shape=[1] * 10_000, data_offsets=[0, 4]), b"1234"),
    "rank 1001": blob(entry(shape=[1] * 1000 + [0], data_offsets=[0, 0])),
    "escapes": blob(b'{"\\u0061\\/":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "other order of keys": blob(b'{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}', b"1234"),
    "spaces between": blob(b'{ "a" :\t{"dtype": "F32",\n"shape": [ 1 ], "data_offsets": [0 ,4]}\r\n}  ', b"1234"),
    "the last first": blob({"a": {**F32, "data_offsets": [4, 8]}, "b": F32}, b"12345678"),
    "empty ones between": blob(
        {
            "a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]},
            "b": F32,
            "c": {"dtype": "U8", "shape": [0, 3], "data_offsets": [0, 0]},
        },
        b"1234",
    ),
}

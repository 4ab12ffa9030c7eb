"""The typed metadata of GGUF as text, and back without the loss of a bit.

A text stays as it is. Anything else is JSON, and what JSON does not tell is in one more text under the key
``gguf.types``: ``{"llama.block_count": "uint32", "tokenizer.ggml.tokens": "string[]"}``. With that key the
metadata of a GGUF file survives a stay in another container. Knows no tensor.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any

from steelyard.core.weights import Texts
from steelyard.errors import FormatError, quoted
from steelyard.formats._gguf_header import ARRAY, BOOL, DEPTH, STRING, VALUES, WHOLE, WIDTHS, Header, Value
from steelyard.formats.layout import compact_json
from steelyard.formats.manifest import load_json

TYPES = "gguf.types"
NUMBERS = {**WHOLE, 6: "<f", 12: "<d", BOOL: "<?"}
_LONE = re.compile("[\ud800-\udfff]")  # bytes that are no UTF-8, as Python reads them


def texts(header: Header, hidden: frozenset[str] = frozenset()) -> Texts:
    """The metadata of a header, each entry turned into text when it is asked for."""
    made: dict[str, Any] = {}
    types: dict[str, str] = {}
    for key, value in header.values.items():
        if key in hidden:
            continue
        kind = _label(header.raw, value)
        if kind is not None:
            types[key] = kind
        made[key] = partial(_text, header.raw, value, kind is None)
    if types:
        made[TYPES] = lambda _enough: compact_json(types)
    return Texts(made)


def types_of(meta: Mapping[str, str], path: object) -> dict[str, str]:
    """The types that metadata says of itself; raises FormatError."""
    found = load_json(meta[TYPES]) if TYPES in meta else {}
    if not isinstance(found, dict) or not all(isinstance(kind, str) for kind in found.values()):
        raise FormatError(f"metadata {TYPES!r}: expected an object of names of types; remove it", path=path)
    return found


def packed_value(key: str, text: str, label: str | None, path: object) -> bytes:
    """An entry as it lies in the file behind its key: the type and the value; raises FormatError naming the key."""
    if label is None:
        return _u32(STRING) + _string(text)
    try:
        many = label.endswith("[]")
        inner = VALUES.index(label.removesuffix("[]"))
        value = load_json(text)
        if many:
            return _u32(ARRAY) + _array(inner, value, 0)
        if inner == ARRAY:
            raise ValueError("an array has the type of its elements, such as uint8[]")
        return _u32(inner) + _one(inner, value)
    except (ValueError, TypeError, struct.error, OverflowError, FormatError) as error:
        text = f"expected {label[:40]}, as {TYPES!r} says, found {quoted(text)} ({error})"
        raise FormatError(f"metadata {quoted(key)}: {text}"[:500], path=path) from error


def _label(raw: bytes | bytearray, value: Value) -> str | None:
    """What `gguf.types` says of a value; None for text."""
    if value.kind == ARRAY:
        return f"{VALUES[int.from_bytes(raw[value.begin : value.begin + 4], 'little')]}[]"
    if value.kind != STRING:
        return VALUES[value.kind]
    try:
        _bytes(raw, value.begin)[0].decode()
    except UnicodeDecodeError:
        return "string"
    return None


def _text(raw: bytes | bytearray, value: Value, plain: bool, enough: int | None) -> str:
    """The text of a value, or one that begins as it does: each element of an array has a character and a comma."""
    if plain:
        return _bytes(raw, value.begin)[0].decode()
    array = value.kind == ARRAY
    found = _read_array(raw, value.begin, enough)[0][1] if array else _read(raw, value.kind, value.begin)[0]
    return _LONE.sub(lambda lone: f"\\u{ord(lone[0]):04x}", compact_json(found))


def _bytes(raw: bytes | bytearray, at: int) -> tuple[bytes, int]:
    begin = at + 8
    end = begin + int.from_bytes(raw[at:begin], "little")
    return bytes(raw[begin:end]), end


def _read(raw: bytes | bytearray, kind: int, at: int) -> tuple[Any, int]:
    """What JSON can say of a value, and where it ends."""
    if kind == STRING:
        found, end = _bytes(raw, at)
        return found.decode(errors="surrogateescape"), end
    if kind == ARRAY:
        return _read_array(raw, at)
    end = at + WIDTHS[kind]
    (number,) = struct.unpack_from(NUMBERS[kind], raw, at)
    return (_readable(number, bytes(raw[at:end])) if isinstance(number, float) else number), end


def _read_array(raw: bytes | bytearray, at: int, most: int | None = None) -> tuple[list[Any], int]:
    """[the name of the type of the elements, the elements or the first `most`], and where these end."""
    kind, count = struct.unpack_from("<IQ", raw, at)
    count = count if most is None else min(count, most)
    at += 12
    if kind in WHOLE or kind == BOOL:
        code = NUMBERS[kind][1]
        return [VALUES[kind], list(struct.unpack_from(f"<{count}{code}", raw, at))], at + count * WIDTHS[kind]
    found = []
    for _ in range(count):
        value, at = _read(raw, kind, at)
        found.append(value)
    return [VALUES[kind], found], at


def _readable(number: float, raw: bytes) -> float | str:
    """The float with the fewest digits that gives the same bytes again; a text where JSON has no number."""
    if number - number == 0:
        if len(raw) == 8:
            return number
        return next(
            v for v in (*(float(f"{number:.{digits}g}") for digits in (6, 7, 8)), number) if _float(v, 4) == raw
        )
    if number == number:
        return "Infinity" if number > 0 else "-Infinity"
    return "NaN" if raw == _float(float("nan"), len(raw)) else f"NaN:{raw[::-1].hex()}"


def _float(number: float, width: int) -> bytes:
    try:
        return struct.pack("<f" if width == 4 else "<d", number)
    except OverflowError:  # rounded upwards beyond the largest
        return b""


def _one(kind: int, value: Any) -> bytes:
    """A value as it lies in the file; raises ValueError, TypeError, OverflowError or struct.error."""
    if kind == STRING:
        if not isinstance(value, str):
            raise TypeError("no text")
        return _string(value)
    if kind in WHOLE or kind == BOOL:
        if type(value) is not (bool if kind == BOOL else int):
            raise TypeError("another type")
        return struct.pack(NUMBERS[kind], value)
    if isinstance(value, str):
        value, sign, bits = value.partition(":")
        if sign:
            raw = bytes.fromhex(bits)[::-1]
            (number,) = struct.unpack(NUMBERS[kind], raw)
            if number == number:
                raise ValueError("the bits of no NaN")
            return raw
        if value not in ("NaN", "Infinity", "-Infinity"):
            raise ValueError("no number")
        value = float(value)
    elif type(value) not in (int, float):
        raise TypeError("no number")
    return struct.pack(NUMBERS[kind], value)


def _array(kind: int, values: Any, depth: int) -> bytes:
    """An array as it lies in the file, its elements of one type."""
    if not isinstance(values, list) or depth >= DEPTH:
        raise TypeError("no list")
    head = struct.pack("<IQ", kind, len(values))
    if kind == ARRAY:
        pairs = [(VALUES.index(inner), below) for inner, below in values]
        return head + b"".join(_array(inner, below, depth + 1) for inner, below in pairs)
    return head + b"".join([_one(kind, value) for value in values])


def _string(text: str) -> bytes:
    raw = text.encode(errors="surrogateescape")
    return len(raw).to_bytes(8, "little") + raw


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")

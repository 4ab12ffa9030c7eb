"""One tensor of an ONNX file, a TensorProto: what it is, where its values lie, and how they are read.

Decides that the values are as many as the shape says, given once, and nowhere outside the folder of the file. Knows
nothing of graphs.

Specification: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.core.weights import Weight
from steelyard.errors import FormatError, quoted
from steelyard.formats._protobuf import FIXED32, FIXED64, LENGTH, VARINT, Field, Wire, varints
from steelyard.formats.base import empty
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

RANK_LIMIT = 64  # of numpy
UNPACKED = 10  # fields that take as long as a number that lies alone; nobody writes them so
STRING = 8  # the data type of text
TYPES = {  # TensorProto.DataType -> the dtype, and the field that holds its values where they are not raw
    1: ("float32", "float_data"),
    2: ("uint8", "int32_data"),
    3: ("int8", "int32_data"),
    4: ("uint16", "int32_data"),
    5: ("int16", "int32_data"),
    6: ("int32", "int32_data"),
    7: ("int64", "int64_data"),
    9: ("bool", "int32_data"),
    10: ("float16", "int32_data"),
    11: ("float64", "double_data"),
    12: ("uint32", "uint64_data"),
    13: ("uint64", "uint64_data"),
    14: ("complex64", "float_data"),
    15: ("complex128", "double_data"),
    16: ("bfloat16", "int32_data"),
    17: ("float8_e4m3fn", "int32_data"),
    18: ("float8_e4m3fnuz", "int32_data"),
    19: ("float8_e5m2", "int32_data"),
    20: ("float8_e5m2fnuz", "int32_data"),
    21: ("uint4", "int32_data"),
    22: ("int4", "int32_data"),
    23: ("float4_e2m1fn", "int32_data"),
    24: ("float8_e8m0fnu", "int32_data"),
    25: ("uint2", "int32_data"),
    26: ("int2", "int32_data"),
}
TYPED = {4: "float_data", 5: "int32_data", 7: "int64_data", 10: "double_data", 11: "uint64_data"}  # of TensorProto


@dataclass(frozen=True)
class Tensor:
    """A parsed TensorProto: where its values lie, raw in one piece, or in pieces of a typed field."""

    spec: Spec
    source: Source
    begin: int
    pieces: tuple[Field, ...] | None  # None: raw
    stored: int

    def weight(self, name: str) -> Weight:
        """The tensor as a weight that is called `name`."""
        raw = self.pieces is None
        fill = partial(_fill, self) if raw and self.spec.dtype.bits >= 8 else None
        read = partial(_read_raw if raw else _read_typed, self, name)
        return Weight(name, self.spec, read, self.stored, self.source.origin(self.begin), fill=fill)


@dataclass
class Parts:
    """What a TensorProto says, field by field."""

    dims: list[int] = field(default_factory=list)
    code: Field | None = None
    name: str = ""
    raw: Field | None = None
    typed: list[Field] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    location: int = 0


class Tensors:
    """The tensors of one open file, and the other files that hold their values."""

    def __init__(self, source: Source, wire: Wire):
        self._source, self._wire = source, wire
        self._files: dict[str, Source] = {}

    def locate(self, found: Field, parts: Parts, at: str) -> Tensor | None:
        """The tensor that `parts`, those of the TensorProto `found`, describe; None for text.

        Raises FormatError for what is no tensor, or whose values are not where and as many as it says.
        """
        if len(parts.dims) > RANK_LIMIT or any(n < 0 for n in parts.dims):
            text = f"expected up to {RANK_LIMIT} dimensions from 0 to 2^63-1, found {str(parts.dims)[:100]}"
            raise self._wire.wrong(f"{at}.dims", text, found.begin)
        code = 0 if parts.code is None else self._wire.signed(parts.code, f"{at}.data_type")
        if code == STRING:
            return None
        if code not in TYPES:
            text = f"there is no type {code}; known are 1 to {max(TYPES)}"
            raise self._wire.wrong(f"{at}.data_type", text, parts.code.begin if parts.code else found.begin)
        dtype, typed = TYPES[code]
        spec, wire = Spec(tuple(parts.dims), DTYPES[dtype]), self._wire
        if parts.location == 1:
            if parts.raw is not None or parts.typed:
                raise wire.wrong(at, "values are given both here and in an external file", found.begin)
            source, begin = self._external(parts, at, spec, found.begin)
            return Tensor(spec, source, begin, None, spec.nbytes)
        if parts.location or parts.external:
            raise wire.wrong(f"{at}.data_location", "expected 1 beside external_data", found.begin)
        if parts.raw is None:
            return self._typed(found, parts, at, spec, typed)
        if not parts.typed:
            begin, count = parts.raw.begin, parts.raw.end - parts.raw.begin
            if count != spec.nbytes:
                text = f"{str(spec)[:100]} takes {_brief(spec.nbytes)} bytes, the field has {count}"
                raise wire.wrong(f"{at}.raw_data", text, begin)
            return Tensor(spec, self._source, begin, None, count)
        raise wire.wrong(at, f"values are given twice, as raw_data and {typed}", parts.raw.begin)

    def _typed(self, found: Field, parts: Parts, at: str, spec: Spec, typed: str) -> Tensor:
        """Where the values lie that are not raw, but in the field `typed`."""
        wire = self._wire
        begin = parts.typed[0].begin if parts.typed else found.begin
        for piece in parts.typed:
            if TYPED[piece.number] != typed:
                text = f"expected values in {typed}, found them in {TYPED[piece.number]}"
                raise wire.wrong(at, text, piece.begin)
        stored = sum(piece.end - piece.begin for piece in parts.typed)
        low, high = _possible(spec, typed)
        if not low <= stored <= high:
            expected = _brief(low) if low == high else f"{_brief(low)} to {_brief(high)}"
            raise wire.wrong(
                f"{at}.{typed}", f"{str(spec)[:100]} takes {expected} bytes, the field has {stored}", begin
            )
        return Tensor(spec, self._source, begin, tuple(parts.typed), stored)

    def parts(self, found: Field, at: str) -> Parts:
        """What the TensorProto `found` says; raises FormatError naming `at`, the field and the byte."""
        wire, parts = self._wire, Parts()
        wire.expect(found, LENGTH, at)
        for below in wire.fields(found.begin, found.end, at):
            number = below.number
            if number == 1:
                parts.dims += wire.repeated(below, f"{at}.dims")
            elif number == 2:
                parts.code = below
            elif number == 3:
                raise wire.wrong(f"{at}.segment", "a tensor in segments is not supported; save it whole", below.begin)
            elif number in TYPED:
                parts.typed.append(_checked(wire, below, at))
            elif number == 8:
                parts.name = wire.text(below, f"{at}.name")
            elif number == 9:
                wire.expect(below, LENGTH, f"{at}.raw_data")
                if parts.raw is not None:
                    raise wire.wrong(f"{at}.raw_data", "is given twice", below.begin)
                parts.raw = below
            elif number == 13:
                key, value = pair(wire, below, f"{at}.external_data")
                parts.external[key] = value
            elif number == 14:
                parts.location = wire.signed(below, f"{at}.data_location")
        return parts

    def _external(self, parts: Parts, at: str, spec: Spec, here: int) -> tuple[Source, int]:
        """The file in the folder of the model that holds the values, and where they begin in it."""
        at = f"{at}.external_data"
        location = parts.external.get("location")
        if location is None:
            raise self._wire.wrong(at, "expected a location, found none", here)
        offset = self._number(parts.external, "offset", 0, at, here)
        length = self._number(parts.external, "length", spec.nbytes, at, here)
        if length != spec.nbytes:
            text = f"{str(spec)[:100]} takes {_brief(spec.nbytes)} bytes, the length is {length}"
            raise self._wire.wrong(at, text, here)
        source = self._files.get(location)
        if source is None:
            try:
                source = self._files[location] = self._source.folder.source(location)
            except FormatError as error:
                raise self._wire.wrong(at, str(error), here) from error
        if offset + length > source.size:
            text = f"bytes {offset} to {_brief(offset + length)} of {quoted(location)}, which has {source.size}"
            raise self._wire.wrong(at, text, here)
        return source, offset

    def _number(self, external: dict[str, str], key: str, default: int, at: str, here: int) -> int:
        text = external.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._wire.wrong(f"{at}.{key}", f"expected a number of bytes, found {quoted(text)}", here)
        return int(text)


def pair(wire: Wire, found: Field, at: str) -> tuple[str, str]:
    """The key and the value of a StringStringEntryProto; raises FormatError naming `at` and the byte."""
    wire.expect(found, LENGTH, at)
    key = value = ""
    for below in wire.fields(found.begin, found.end, at):
        if below.number == 1:
            key = wire.text(below, f"{at}.key")
        elif below.number == 2:
            value = wire.text(below, f"{at}.value")
    return key, value


def _checked(wire: Wire, piece: Field, at: str) -> Field:
    """A piece of a typed field, packed or one value; raises FormatError for another wire type."""
    single = {"float_data": FIXED32, "double_data": FIXED64}.get(TYPED[piece.number], VARINT)
    if piece.wire != LENGTH:
        wire.charge(UNPACKED, at, piece.begin)
        wire.expect(piece, single, f"{at}.{TYPED[piece.number]}")
    return piece


def _possible(spec: Spec, typed: str) -> tuple[int, int]:
    """The fewest and the most bytes that the values of `spec` take in the field `typed`."""
    if typed in ("float_data", "double_data"):
        return spec.nbytes, spec.nbytes
    count = spec.nbytes if spec.dtype.bits < 8 else spec.size  # narrow values lie packed, a byte in each varint
    return count, 10 * count


def _brief(count: int) -> str:
    return str(count) if count < 10**20 else f"about 2^{math.frexp(float(min(count, 10**300)))[1]}"


def _fill(tensor: Tensor, first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on of a raw tensor into `flat`."""
    import numpy as np

    with tensor.source.reading() as file:
        tensor.source.fill(file, tensor.begin + first * flat.itemsize, flat.view(np.uint8).data)
    if sys.byteorder == "big":
        flat.byteswap(inplace=True)


def _read_raw(tensor: Tensor, name: str) -> np.ndarray:
    import numpy as np

    if tensor.spec.dtype.bits >= 8:
        array = empty(tensor.spec, tensor.source, tensor.begin, name)
        _fill(tensor, 0, array.reshape(-1))
        return array
    raw = np.empty(tensor.stored, np.uint8)
    with tensor.source.reading() as file:
        tensor.source.fill(file, tensor.begin, raw.data)
    return _unpacked(raw, tensor.spec)


def _unpacked(raw: np.ndarray, spec: Spec) -> np.ndarray:
    """Values narrower than a byte out of the bytes that hold them, the lowest bits first."""
    import numpy as np

    bits = spec.dtype.bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (raw[:, None] >> shifts & ((1 << bits) - 1)).reshape(-1)[: spec.size]
    return _from_codes(codes, spec.dtype).reshape(spec.shape)


def _from_codes(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """Values from their bits, one value in each byte."""
    import numpy as np

    if dtype.kind == "int":
        half = np.uint8(1 << dtype.bits - 1)
        return ((codes ^ half).astype(np.int8) - np.int8(half)).astype(dtype.numpy)
    return codes.astype(np.uint8).view(dtype.numpy)


def _read_typed(tensor: Tensor, name: str) -> np.ndarray:
    """The values of a typed field: floats as they lie, whole numbers as varints."""
    import numpy as np

    source, spec = tensor.source, tensor.spec
    raw = np.empty(tensor.stored, np.uint8)
    at = 0
    with source.reading() as file:
        for piece in tensor.pieces or ():
            source.fill(file, piece.begin, raw[at : at + piece.end - piece.begin].data)
            at += piece.end - piece.begin
    if spec.dtype.kind in ("float", "complex") and spec.dtype.bits >= 32:
        little = spec.dtype.numpy.newbyteorder("<")
        return raw.view(little).astype(spec.dtype.numpy).reshape(spec.shape)

    def wrong(text: str) -> FormatError:
        return FormatError(f"tensor {quoted(name)}: {text}", path=source.path, offset=tensor.begin)

    try:
        values, rest = varints(raw)
    except ValueError as error:
        raise wrong(str(error)) from error
    expected = spec.nbytes if spec.dtype.bits < 8 else spec.size
    if rest or len(values) != expected:
        raise wrong(f"{str(spec)[:100]} takes {expected} whole numbers, found {len(values)}")
    return _narrowed(values, spec)


def _narrowed(values: np.ndarray, spec: Spec) -> np.ndarray:
    """The tensor whose values, or whose bits where they are no whole numbers, are the lowest of 64-bit ones."""
    import numpy as np

    dtype = spec.dtype
    if dtype.bits < 8:
        return _unpacked(values.astype(np.uint8), spec)
    if dtype.kind == "bool":
        values = values.astype(np.bool_)
    found: np.ndarray = values.astype(f"u{dtype.numpy.itemsize}").view(dtype.numpy).reshape(spec.shape)
    return found

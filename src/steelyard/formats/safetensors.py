"""safetensors: eight bytes of header length, a JSON header, and the bytes of all tensors without a gap.

Decides what is a valid file (stricter than the reference library where the specification is) and how a
file is laid out: the header in the order of the weights, the data with the widest elements first, so that
every tensor lies aligned. Packed tensors are written as their parts; any safetensors reader opens them.
Knows nothing of what the tensors mean.

Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import struct
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.packed import Packed
from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats.base import (
    COPY,
    Sink,
    Writable,
    announced,
    check_text,
    empty,
    flat_bytes,
    replacing,
    spooling,
)
from steelyard.formats.manifest import KEY, Draft, Manifest, compact_json, load_json
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

HEADER_LIMIT = 100_000_000  # bytes, as in the reference library
LARGEST = 2**63 - 1  # of a dimension or an offset
UNREADABLE = frozenset({"float6_e2m3fn", "float6_e3m2fn"})  # how their bits lie is specified nowhere
BLOCK = 1 << 20  # bytes of a tensor that are read at a time where it need not be read whole
CODES: dict[str, DType] = {row.safetensors: row for row in DTYPES.values() if row.safetensors}


@dataclass(frozen=True)
class Safetensors(Writable):
    """The container of https://github.com/huggingface/safetensors."""

    name: ClassVar[str] = "safetensors"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)
    entries: ClassVar[tuple[str, ...]] = ("model.safetensors", "*.safetensors")
    dtypes: ClassVar[frozenset[str]] = frozenset(row.name for row in CODES.values()) - UNREADABLE

    def claims(self, head: bytes, _source: Source, /) -> bool:
        """A length within the limit, then an opening brace."""
        return len(head) > 8 and 2 <= int.from_bytes(head[:8], "little") <= HEADER_LIMIT and head[8:9] == b"{"

    def open(self, source: Source, /) -> Weights:
        """The weights in a file: reads the header and not one byte more."""
        path = source.path
        text, start = _header(source)
        try:
            header = load_json(text)
        except FormatError as error:
            raise FormatError(f"header: {error}", path=path, offset=8) from error
        if not isinstance(header, dict):
            raise FormatError("header: expected an object", path=path, offset=8)
        meta = _metadata(header.pop("__metadata__", {}), path)
        tensors = {name: _Tensor.parse(name, entry, path, start) for name, entry in header.items()}
        _check_cover(tensors, source, start)
        arrays = {name: tensor.weight(name, source) for name, tensor in tensors.items()}
        own = meta.pop(KEY, None)
        manifest = Manifest() if own is None else Manifest.parse(own, path)
        return manifest.collect(arrays, meta, path)

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, plain tensors block by block where they can be read so; the bytes of the finished file."""
        with replacing(path) as sink:
            return self.stream(weights, path, sink)

    def stream(self, weights: Weights, path: Path, sink: Sink, /) -> int:
        """Write `weights` into a file that is open, whose name for errors is `path`; its bytes."""
        _check(weights, path)
        packed = {name for name, item in weights.items() if item.scheme is not None}
        if not _write(weights, path, sink, packed):
            # a tensor announced as plain turned out to be packed, so that no size is known beforehand
            sink.seek(0)
            sink.truncate()
            _write(weights, path, sink, set(weights))
        return sink.tell()


def _header(source: Source) -> tuple[str, int]:
    """The text of the header, and where the data starts."""
    if source.size < 8:
        raise FormatError(f"expected 8 bytes of header length, the file has {source.size}", path=source.path, offset=0)
    with source.reading() as file:
        length = bytearray(8)
        source.fill(file, 0, length)
        (count,) = struct.unpack("<Q", length)
        if count > HEADER_LIMIT:
            text = f"the header length is {count}, the limit is {HEADER_LIMIT}; this is no safetensors file"
            raise FormatError(text, path=source.path, offset=0)
        if count > source.size - 8:
            text = f"the header length is {count}, the file has {source.size} bytes; it is cut off: fetch it again"
            raise FormatError(text, path=source.path, offset=0)
        raw = bytearray(count)
        source.fill(file, 8, raw)
    if raw[:1] != b"{":
        raise FormatError(
            f"expected a header that begins with '{{', found {bytes(raw[:1])!r}", path=source.path, offset=8
        )
    try:
        return raw.decode("utf-8"), 8 + count
    except UnicodeDecodeError as error:
        raise FormatError("the header is not UTF-8", path=source.path, offset=8 + error.start) from error


def _metadata(data: Any, path: Path | str) -> dict[str, str]:
    if not isinstance(data, dict) or any(not isinstance(value, str) for value in data.values()):
        raise FormatError("header: expected text under text in '__metadata__'", path=path, offset=8)
    for text in (*data, *data.values()):
        check_text(text, "metadata", path)
    return dict(data)


@dataclass(frozen=True)
class _Tensor:
    """One entry of the header; `begin` and `end` count from the start of the file."""

    spec: Spec
    begin: int
    end: int

    @staticmethod
    def parse(name: str, entry: Any, path: Path | str, start: int) -> _Tensor:
        def wrong(text: str) -> FormatError:
            return FormatError(f"tensor {quoted(name)}: {text}", path=path, offset=8)

        check_text(name, "tensor name", path)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise wrong("expected an object of dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in CODES:
            raise wrong(f"unknown dtype {quoted(str(code))}; known are {', '.join(CODES)}")
        if not _counts(shape):
            raise wrong(f"expected dimensions from 0 to 2^63-1, found {str(shape)[:100]}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise wrong(f"expected data_offsets [begin, end] with begin <= end, found {str(offsets)[:100]}")
        spec = Spec(tuple(shape), CODES[code])
        bits, (begin, end) = spec.size * spec.dtype.bits, offsets
        if bits != 8 * (end - begin):
            found = f"{bits / 8:.10g}" if bits < 2**50 else "over 2^47"
            raise wrong(f"{code} of shape {str(shape)[:100]} takes {found} bytes, data_offsets have {end - begin}")
        return _Tensor(spec, start + begin, start + end)

    def weight(self, name: str, source: Source) -> Weight:
        read = partial(_read, name, self, source)
        fill = partial(_fill, self, source) if self.spec.dtype.bits >= 8 else None
        return Weight(name, self.spec, read, self.end - self.begin, source.origin(self.begin), fill=fill)


def _counts(data: Any) -> bool:
    return isinstance(data, list) and all(type(n) is int and 0 <= n <= LARGEST for n in data)


def _check_cover(tensors: dict[str, _Tensor], source: Source, start: int) -> None:
    """The tensors must cover the data from its start to the end of the file, each byte once."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps the one before" if tensor.begin < at else f"leaves a hole of {tensor.begin - at} bytes"
            raise FormatError(f"tensor {quoted(name)} {what}", path=source.path, offset=tensor.begin)
        at = tensor.end
        if at > source.size:
            text = f"tensor {quoted(name)} ends at byte {at}, the file at {source.size}; fetch it again"
            raise FormatError(text, path=source.path, offset=tensor.begin)
    if at != source.size:
        raise FormatError(f"{source.size - at} bytes follow after the last tensor", path=source.path, offset=at)


def _read(name: str, tensor: _Tensor, source: Source) -> np.ndarray:
    import numpy as np

    spec = tensor.spec
    if spec.dtype.name in UNREADABLE:
        text = f"tensor {quoted(name)}: no standard says how {spec.dtype} lies; convert it where it was made"
        raise FormatError(text, path=source.path, offset=tensor.begin)
    array = empty(spec, source, tensor.begin, name)
    if spec.dtype.bits < 8:
        with source.reading() as file:
            raw = np.empty(tensor.end - tensor.begin, np.uint8)
            source.fill(file, tensor.begin, raw.data)
            nibbles = np.stack((raw & 15, raw >> 4), axis=-1)  # (bytes, 2): the low half comes first
            array.reshape(-1).view(np.uint8)[:] = nibbles.reshape(-1)
        return array
    _fill(tensor, source, 0, array.reshape(-1))
    return array


def _fill(tensor: _Tensor, source: Source, first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on into `flat`."""
    import numpy as np

    with source.reading() as file:
        source.fill(file, tensor.begin + first * flat.itemsize, flat.view(np.uint8).data)
    if sys.byteorder == "big":
        flat.byteswap(inplace=True)


def _data(array: np.ndarray) -> memoryview:
    """The bytes of an array as they lie in the file."""
    import numpy as np

    raw = flat_bytes(array)
    if Spec.like(array).dtype.bits == 8 * array.dtype.itemsize:
        return raw
    nibbles = np.frombuffer(raw, np.uint8) & 15
    return (nibbles[0::2] | nibbles[1::2] << 4).data


def _check(weights: Weights, path: Path) -> None:
    if KEY in weights.meta:
        raise FormatError(f"the metadata key {KEY!r} is reserved; rename it", path=path)
    for text in (*weights.meta, *weights.meta.values(), *weights.ties):
        check_text(text, "metadata", path)
    for name, item in weights.items():
        check_text(name, "tensor name", path)
        if name == "__metadata__":
            raise FormatError("a tensor cannot be named '__metadata__'; rename it", path=path)
        if item.scheme is None:
            _check_spec(name, item.spec, path)


def _check_spec(name: str, spec: Spec, path: Path) -> None:
    where = f"tensor {quoted(name)}"
    if spec.dtype.name not in Safetensors.dtypes:
        remedy = "cast it, encode it, or write .npz"
        raise FormatError(f"{where}: safetensors holds no {spec.dtype}; {remedy}", path=path)
    if spec.size * spec.dtype.bits % 8:
        raise FormatError(f"{where}: {spec} does not end on a byte; pad it to an even size", path=path)


@dataclass(frozen=True)
class _Piece:
    """One array to write: a weight to be read when its turn comes, or bytes of the spool."""

    key: str
    spec: Spec
    weight: Weight | None
    at: int = 0  # where it starts in the spool


def _write(weights: Weights, path: Path, sink: Sink, encoded: set[str]) -> bool:
    """Write everything; False if a weight outside `encoded` turned out to be packed."""
    draft = Draft(weights)
    with spooling(path) as spool:
        pieces = [piece for item in weights.values() for piece in _plan(item, draft, spool, path, item.name in encoded)]
        ordered = sorted(pieces, key=lambda piece: -piece.spec.dtype.bits)
        sink.write(_head(pieces, ordered, {**weights.meta}, draft.text(), path))
        for piece in ordered:
            if piece.weight is None:
                spool.seek(piece.at)
                _copy(spool, sink, piece.spec.nbytes)
                continue
            if piece.weight.fill is not None:
                for block in piece.weight.blocks(max(1, BLOCK // piece.spec.dtype.numpy.itemsize)):
                    sink.write(_data(block))
                continue
            value = piece.weight.read()
            if isinstance(value, Packed):
                return False
            sink.write(_data(announced(piece.weight, value)))
    return True


def _plan(item: Weight, draft: Draft, spool: io.FileIO, path: Path, encoded: bool) -> list[_Piece]:
    """What one weight adds to the file; one of `encoded` is read now, since its sizes are not known before."""
    if not encoded:
        return [_Piece(draft.plain(item.name), item.spec, item)]
    value = item.read()
    if isinstance(value, Packed):
        leaves = draft.dismantle(item.name, value)
    else:
        leaves = {draft.plain(item.name): announced(item, value)}
    pieces = []
    for key, array in leaves.items():
        piece = _Piece(key, Spec.like(array), None, spool.tell())
        _check_spec(key, piece.spec, path)
        Sink(spool, path).write(_data(array))
        pieces.append(piece)
    return pieces


def _head(pieces: list[_Piece], ordered: list[_Piece], meta: dict[str, str], own: str | None, path: Path) -> bytes:
    """The length and the header, padded so that the data starts at a multiple of 8."""
    offsets: dict[str, int] = {}
    at = 0
    for piece in ordered:
        offsets[piece.key] = at
        at += piece.spec.nbytes
    if own is not None:
        meta[KEY] = own
    entries: dict[str, Any] = {"__metadata__": meta} if meta else {}
    for piece in pieces:
        begin, spec = offsets[piece.key], piece.spec
        span = [begin, begin + spec.nbytes]
        entries[piece.key] = {"dtype": spec.dtype.safetensors, "shape": list(spec.shape), "data_offsets": span}
    text = compact_json(entries).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"the header takes {len(text)} bytes, the limit is {HEADER_LIMIT}; split the file", path=path)
    return struct.pack("<Q", len(text)) + text


def _copy(spool: io.FileIO, sink: Sink, count: int) -> None:
    while count:
        block = spool.read(min(count, COPY))
        count -= sink.write(block)

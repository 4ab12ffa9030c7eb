"""safetensors: eight bytes of header length, a JSON header, and the bytes of all tensors without a gap.

Decides how a file is laid out: the header in the order of the weights, the data with the widest elements
first, so that every tensor lies aligned. What a valid file is, `_safetensors_header` decides. Packed
tensors are written as their parts; any safetensors reader opens them. Where there are such and the header is a good
part of the file it lies deflated within the data (`_folded`).
Knows nothing of what the tensors mean.

Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.packed import Packed
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats._folded import SUM, Sealed, fold
from steelyard.formats._lost import check_named, check_there
from steelyard.formats._safetensors_header import CODES, HEADER_LIMIT, Header, spec_of
from steelyard.formats.base import (
    COPY,
    Resumable,
    Sink,
    announced,
    check_text,
    empty,
    flat_bytes,
    replacing,
    spooling,
)
from steelyard.formats.layout import compact_json
from steelyard.formats.manifest import KEY, Draft, Manifest
from steelyard.formats.resuming import resuming
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer

UNREADABLE = frozenset({"float6_e2m3fn", "float6_e3m2fn"})  # how their bits lie is specified nowhere
BLOCK = 1 << 20  # bytes of a tensor that are read at a time where it need not be read whole


@dataclass(frozen=True)
class Safetensors(Resumable):
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
        header = Header.read(source)
        if header.sealed is not None:
            source = Sealed(source, header.sealed)
        arrays, meta = Tensors(header, source), dict(header.meta)
        own = meta.pop(KEY, None)
        if own is None:
            check_named(meta, arrays, source.path)
            check_there(arrays, source, header.start)
            return Weights.over(arrays, {}, meta, arrays.specs)
        return Manifest.parse(own, source.path).collect(arrays, meta, source.path)

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, plain tensors block by block where they can be read so; the bytes of the finished file."""
        with replacing(path) as sink:
            return self.stream(weights, path, sink)

    def resume(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, going on from where an attempt before was; the bytes of the finished file."""
        if path.exists():
            return path.stat().st_size
        with resuming(path) as sink:
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


class Tensors(Mapping[str, Weight]):
    """The tensors of a file by name, each made when it is asked for."""

    def __init__(self, header: Header, source: Source):
        self._header, self._source = header, source
        self._origin = source.origin(0).removesuffix("0")

    def __getitem__(self, name: str) -> Weight:
        header, i = self._header, self._header.names[name]
        return next(self._made([name], header.kind[i : i + 1], header.begin[i : i + 1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.names)

    def __len__(self) -> int:
        return len(self._header.names)

    def values(self) -> ValuesView[Weight]:
        """The tensors, in order."""
        return _Values(self)

    def items(self) -> ItemsView[str, Weight]:
        """The names and the tensors, in order."""
        return _Items(self)

    def specs(self) -> Iterator[Spec]:
        """What each tensor is, in order."""
        header = self._header
        return map(spec_of, map(header.kinds.__getitem__, header.kind))

    def all(self) -> Iterator[Weight]:
        """Every tensor; quicker than asking for each by its name."""
        header = self._header
        return self._made(header.names, header.kind, header.begin)

    def _made(self, names: Iterable[str], kinds: Iterable[int], begins: Iterable[int]) -> Iterator[Weight]:
        """The tensors of some kinds of the header that begin at some bytes of the data."""
        texts, sizes, start = self._header.kinds, self._header.sizes, self._header.start
        source, origin = self._source, self._origin
        for name, kind, begin in zip(names, kinds, begins, strict=True):
            spec = spec_of(texts[kind])
            at = start + begin
            weight = object.__new__(Weight)
            weight.__dict__.update(  # what Weight(...) does, in a third of the time: there may be a hundred thousand
                name=name,
                spec=spec,
                read=partial(_read, name, spec, at, source),
                stored=sizes[kind],
                origin=f"{origin}{at}",
                scheme=None,
                fill=partial(_fill, at, source) if spec.dtype.bits >= 8 else None,
            )
            yield weight


class _Values(ValuesView[Weight]):
    _mapping: Tensors

    def __iter__(self) -> Iterator[Weight]:
        return self._mapping.all()


class _Items(ItemsView[str, Weight]):
    _mapping: Tensors

    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        return zip(self._mapping, self._mapping.all(), strict=True)


def _read(name: str, spec: Spec, begin: int, source: Source) -> np.ndarray:
    import numpy as np

    if spec.dtype.name in UNREADABLE:
        text = f"tensor {quoted(name)}: no standard says how {spec.dtype} lies; convert it where it was made"
        raise FormatError(text, path=source.path, offset=begin)
    array = empty(spec, source, begin, name)
    if spec.dtype.bits < 8:
        with source.reading() as file:
            raw = np.empty(spec.nbytes, np.uint8)
            source.fill(file, begin, raw.data)
            nibbles = np.stack((raw & 15, raw >> 4), axis=-1)  # (bytes, 2): the low half comes first
            array.reshape(-1).view(np.uint8)[:] = nibbles.reshape(-1)
        return array
    _fill(begin, source, 0, array.reshape(-1))
    return array


def _fill(begin: int, source: Source, first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on into `flat`; the tensor begins at a byte of the file."""
    import numpy as np

    with source.reading() as file:
        source.fill(file, begin + first * flat.itemsize, flat.view(np.uint8).data)
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
    at: tuple[tuple[int, int], ...] = ()  # where its bytes are in the spool: places and lengths


def _write(weights: Weights, path: Path, sink: Sink, encoded: set[str]) -> bool:
    """Write everything; False if a weight outside `encoded` turned out to be packed."""
    draft = Draft(weights)
    with spooling(path) as spool:
        pieces = [piece for item in weights.values() for piece in _plan(item, draft, spool, path, item.name in encoded)]
        pieces = _joined(pieces, draft.join())
        ordered = sorted(pieces, key=lambda piece: -piece.spec.dtype.bits)
        own, size = draft.text(), sum(piece.spec.nbytes for piece in pieces)
        head, folded = _head(pieces, ordered, {**weights.meta}, own, path), None
        if draft.packed or draft.joined:  # otherwise there are tensors that any reader can take from the file
            folded = fold(head[8:], size)
        if folded is None:  # each part has a sum of its own
            keys = draft.marked()
            pieces, ordered = ([replace(p, key=keys.get(p.key, p.key)) for p in some] for some in (pieces, ordered))
            own = draft.text((piece.key, piece.spec) for piece in pieces)
            sink.write(_head(pieces, ordered, {**weights.meta}, own, path))
            return all(_put(piece, sink, spool) for piece in ordered)
        sink.write(folded[0])
        summed = _Summed(sink)
        summed.write(folded[1])
        if not all(_put(piece, summed, spool) for piece in ordered):
            return False
        sink.write(summed.sum.to_bytes(SUM, "little"))
    return True


class _Summed:
    """A sink, and the CRC-32 of what goes into it."""

    def __init__(self, sink: Sink):
        self._sink, self.sum = sink, 0

    def write(self, data: ReadableBuffer) -> int:
        """Append `data`."""
        self.sum = zlib.crc32(data, self.sum)
        return self._sink.write(data)

    def skip(self, _count: int, _unit: int = 1) -> int:
        """Nothing: what is there from an attempt before counts, too, and is seen to be the same."""
        return 0


def _put(piece: _Piece, sink: Sink | _Summed, spool: io.FileIO) -> bool:
    """Write the bytes of one array; False if it turned out to be packed."""
    spec, weight = piece.spec, piece.weight
    lazily = weight is not None and weight.fill is not None
    there = sink.skip(spec.nbytes, spec.dtype.numpy.itemsize if lazily else max(spec.nbytes, 1))
    if there and there == spec.nbytes:
        return True
    if weight is None:
        for begin, length in piece.at:
            spool.seek(begin)
            _copy(spool, sink, length)
    elif weight.fill is not None:
        size = spec.dtype.numpy.itemsize
        for block in weight.blocks(BLOCK // size, there // size):
            sink.write(_data(block))
    else:
        value = weight.read()
        if isinstance(value, Packed):
            return False
        sink.write(_data(announced(weight, value)))
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
        piece = _Piece(key, Spec.like(array), None, ((spool.tell(), Spec.like(array).nbytes),))
        _check_spec(key, piece.spec, path)
        Sink(spool, path).write(_data(array))
        pieces.append(piece)
    return pieces


def _joined(pieces: list[_Piece], joined: Mapping[str, list[str]]) -> list[_Piece]:
    """Pieces of the spool put together where the manifest says so; they stand where the first of them stood."""
    key_of = {old: key for key, olds in joined.items() for old in olds}
    found: dict[str, _Piece] = {}
    for piece in pieces:
        key = key_of.get(piece.key, piece.key)
        before = found.get(key)
        if before is None:
            found[key] = _Piece(key, piece.spec, piece.weight, piece.at)
        else:
            size = before.spec.size + piece.spec.size
            found[key] = _Piece(key, Spec((size,), piece.spec.dtype), None, before.at + piece.at)
    return list(found.values())


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


def _copy(spool: io.FileIO, sink: Sink | _Summed, count: int) -> None:
    while count:
        block = spool.read(min(count, COPY))
        count -= sink.write(block)

"""GGUF, the container of llama.cpp: typed metadata, the descriptions of the tensors, and their bytes, aligned.

Decides how weights become tensors of GGML and back: the axes are turned round, block types are codecs, a dtype
that GGML lacks lies in whole numbers of its width with a note in the manifest. What a valid header is,
`_gguf_header` decides, and how metadata becomes text, `_gguf_meta`. Of a set that was split, all files are read
as one. Knows nothing of what the tensors mean; a chat template is text.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from steelyard.codecs import CODECS
from steelyard.core.packed import Codec, Packed, Scheme
from steelyard.core.spec import DTYPES, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import CodecError, FormatError, quoted
from steelyard.formats._gguf_header import (
    ALIGNMENTS,
    DEFAULT_ALIGNMENT,
    KEY_LENGTH,
    KINDS,
    MAGIC,
    RANK,
    Entry,
    Header,
    Kind,
)
from steelyard.formats._gguf_meta import TYPES, packed_value, texts, types_of
from steelyard.formats._gguf_split import HIDDEN, parts_of
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
from steelyard.formats.manifest import KEY, Draft, Manifest
from steelyard.formats.resuming import resuming
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

VERSION = 3
NAME_LENGTH = 64  # bytes of the name of a tensor that is written
ARCHITECTURE = "general.architecture"
UNKNOWN = "unknown"  # the architecture where none is said; as the first entry it is not shown when read
NOT_HELD = frozenset({"complex128"})
BLOCK = 1 << 20  # bytes of a tensor that are read at a time where it need not be read whole
_CODES = {kind.dtype or kind.name: kind for kind in KINDS.values()}
_STANDS_FOR = {1: _CODES["int8"], 2: _CODES["int16"], 4: _CODES["int32"], 8: _CODES["int64"]}


@dataclass(frozen=True)
class Gguf(Resumable):
    """The container of llama.cpp, versions 2 and 3 when read, 3 when written.

    Metadata is typed in the file: texts stay texts, other values are JSON, and the text under ``gguf.types`` says
    their types. Where ``general.architecture`` is missing, "unknown" is written in its place.
    """

    name: ClassVar[str] = "gguf"
    suffixes: ClassVar[tuple[str, ...]] = (".gguf",)
    entries: ClassVar[tuple[str, ...]] = ("*-00001-of-*.gguf", "*.gguf")
    dtypes: ClassVar[frozenset[str]] = frozenset(DTYPES) - NOT_HELD

    def claims(self, head: bytes, _source: Source, /) -> bool:
        """The magic bytes."""
        return head.startswith(MAGIC)

    def open(self, source: Source, /) -> Weights:
        """The weights in a file, or in the set of files that it is the first of: reads their headers."""
        parts = parts_of(source, Header.read(source))
        header = parts[0][1]
        hidden = {KEY, *(HIDDEN if len(parts) > 1 else ())}
        first = next(iter(header.values), None)
        if first == ARCHITECTURE and texts(header)[ARCHITECTURE] == UNKNOWN:
            hidden.add(ARCHITECTURE)
        meta, manifest, dtypes = texts(header, frozenset(hidden)), Manifest(), dict[str, str]()
        if KEY in header.values:
            manifest = Manifest.parse(texts(header)[KEY], source.path, extra=("dtypes",))
            dtypes = _dtypes(manifest.extra.get("dtypes", {}), source)
        arrays: dict[str, Weight] = {}
        for part, one in parts:
            for entry in one.tensors:
                if entry.name in arrays:
                    raise FormatError(f"tensor {quoted(entry.name)} is in another part already", path=part.path)
                arrays[entry.name] = _weight(part, entry, dtypes.pop(entry.name, None))
        for key in dtypes:
            raise FormatError(f"metadata {KEY!r}: the dtype of {quoted(key)}, which is not there", path=source.path)
        return manifest.collect(arrays, meta, source.path)

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, one at a time; the bytes of the finished file. Raises FormatError."""
        with replacing(path) as sink:
            return self._stream(weights, path, sink)

    def resume(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, going on from where an attempt before was; the bytes of the finished file."""
        if path.exists():
            return path.stat().st_size
        with resuming(path) as sink:
            return self._stream(weights, path, sink)

    def _stream(self, weights: Weights, path: Path, sink: Sink) -> int:
        head = _Head.of(weights, path)
        _check(weights, path)
        encoded = {name for name, item in weights.items() if item.scheme is not None and _native(item) is None}
        if not _write(weights, path, sink, encoded, head):
            # a tensor turned out to be held in another way than announced, so that no size is known beforehand
            sink.seek(0)
            sink.truncate()
            _write(weights, path, sink, set(weights), head)
        return sink.tell()


def codec_of(kind: Kind) -> Codec:
    """The codec of a block type."""
    return CODECS[kind.name]() if kind.name in CODECS else CODECS["ggml"](kind.name)  # type: ignore[call-arg]


def _dtypes(data: object, source: Source) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(name, str) and name in DTYPES for name in data.values()):
        raise FormatError(f"metadata {KEY!r}: expected names of dtypes by key", path=source.path)
    return dict(data)


def _weight(source: Source, entry: Entry, noted: str | None) -> Weight:
    """A tensor of the file; `noted` is the dtype that the manifest gives it."""
    kind, origin = entry.kind, source.origin(entry.begin)
    name = noted or kind.dtype or "float32"
    spec = Spec(entry.shape, DTYPES[name])
    if kind.dtype is not None:
        if noted is not None and (
            not kind.dtype.startswith("int") or name in NOT_HELD or _stands_for(name) is not kind
        ):
            text = f"tensor {quoted(entry.name)}: {kind.dtype} cannot stand for {noted}"
            raise FormatError(text, path=source.path, offset=entry.begin)
        read = partial(_read, source, entry, spec)
        return Weight(entry.name, spec, read, entry.nbytes, origin, None, partial(_fill, source, entry.begin))
    codec = codec_of(kind)
    if spec.dtype.kind != "float" or spec.dtype.bits < 16:
        text = f"tensor {quoted(entry.name)}: {kind.name} cannot stand for {noted}"
        raise FormatError(text, path=source.path, offset=entry.begin)
    held, fill = partial(_read_blocks, source, entry, spec, codec), partial(_fill_blocks, source, entry, spec, codec)
    return Weight(entry.name, spec, held, entry.nbytes, origin, Scheme(codec, {"blocks": None}), fill)


def _read(source: Source, entry: Entry, spec: Spec) -> np.ndarray:
    array = empty(spec, source, entry.begin, entry.name)
    _fill(source, entry.begin, 0, array.reshape(-1))
    return array


def _fill(source: Source, begin: int, first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on into `flat`; the tensor begins at a byte of the file."""
    import numpy as np

    with source.reading() as file:
        source.fill(file, begin + first * flat.itemsize, flat.view(np.uint8).data)
    if sys.byteorder == "big":
        flat.byteswap(inplace=True)


def _read_blocks(source: Source, entry: Entry, spec: Spec, codec: Codec) -> Packed:
    width = entry.kind.width
    raw = empty(Spec((entry.nbytes // width, width), DTYPES["uint8"]), source, entry.begin, entry.name)
    _fill(source, entry.begin, 0, raw.reshape(-1))
    return Packed(spec, codec, {"blocks": raw})


def _fill_blocks(source: Source, entry: Entry, spec: Spec, codec: Codec, first: int, flat: np.ndarray) -> None:
    """Decode the elements from `first` on into `flat`, and no more blocks than they lie in."""
    block, width = entry.kind.block, entry.kind.width
    start, end = first // block, -(-(first + flat.size) // block)
    shorter = Entry(entry.name, entry.kind, entry.shape, entry.begin + start * width, (end - start) * width)
    part = _read_blocks(source, shorter, Spec(((end - start) * block,), spec.dtype), codec)
    try:
        flat[:] = part.array()[first - start * block :][: flat.size]
    except CodecError as error:
        raise CodecError(f"{source.origin(entry.begin)}: {quoted(entry.name)}: {error}") from error


@dataclass(frozen=True)
class _Head:
    """The metadata of a file that is written, but for the manifest."""

    entries: tuple[bytes, ...]
    alignment: int

    @staticmethod
    def of(weights: Weights, path: Path) -> _Head:
        """The entries of `weights`, in order; raises FormatError naming the key."""
        meta, types = weights.meta, types_of(weights.meta, path)
        if KEY in meta:
            raise FormatError(f"the metadata key {KEY!r} is reserved; rename it", path=path)
        alignment = DEFAULT_ALIGNMENT
        entries = [] if ARCHITECTURE in meta else [_entry(ARCHITECTURE, UNKNOWN, None, path)]
        for key, text in meta.items():
            if key == TYPES:
                continue
            check_text(text if key not in types else key, "metadata", path)
            entries.append(_entry(key, text, types.get(key), path))
            if key == "general.alignment":
                alignment = _alignment(text, types.get(key), path)
        return _Head(tuple(entries), alignment)

    def text(self, own: str | None, tensors: Iterable[bytes], count: int, path: Path) -> bytes:
        """The whole header, padded; `own` is the manifest."""
        entries = [*self.entries, *([] if own is None else [_entry(KEY, own, None, path)])]
        numbers = b"".join(number.to_bytes(8, "little") for number in (count, len(entries)))
        head = b"".join([MAGIC, VERSION.to_bytes(4, "little"), numbers, *entries, *tensors])
        return head + bytes(-len(head) % self.alignment)


def _entry(key: str, text: str, label: str | None, path: Path) -> bytes:
    check_text(key, "metadata", path)
    raw = key.encode()
    if len(raw) > KEY_LENGTH:
        raise FormatError(f"the metadata key {quoted(key)} has more than {KEY_LENGTH} bytes; shorten it", path=path)
    return len(raw).to_bytes(8, "little") + raw + packed_value(key, text, label, path)


def _alignment(text: str, label: str | None, path: Path) -> int:
    if label != "uint32" or not text.isdecimal() or int(text) not in ALIGNMENTS:
        found = f"found {quoted(text)} of type {quoted(label or 'string')}; remove it"
        raise FormatError(f"metadata 'general.alignment': expected a power of two as uint32, {found}", path=path)
    return int(text)


def _stands_for(dtype: str) -> Kind:
    """The type in which a dtype that is held lies: its own, or the whole numbers of its width."""
    return _CODES.get(dtype) or _STANDS_FOR[max(1, DTYPES[dtype].bits // 8)]


def _native(item: Weight) -> Kind | None:
    """The block type as which a packed weight is written, known from its scheme; None for another codec."""
    scheme = item.scheme
    codec = scheme.codec if isinstance(scheme, Scheme) else scheme
    if isinstance(scheme, Scheme) and any(plan is not None for plan in scheme.parts.values()):
        return None
    from steelyard.codecs._blocks import Blocks

    return _CODES.get(codec.kind) if isinstance(codec, Blocks) else None


def _check(weights: Weights, path: Path) -> None:
    for alias in weights.ties:
        check_text(alias, "name", path)
    for name, item in weights.items():
        check_text(name, "tensor name", path)
        if item.scheme is None or _native(item) is not None:
            _check_tensor(name, item.spec, path)


def _check_tensor(name: str, spec: Spec, path: Path) -> None:
    where = f"tensor {quoted(name)}"
    if len(name.encode()) > NAME_LENGTH:
        raise FormatError(f"{where}: GGUF names have at most {NAME_LENGTH} bytes; rename it", path=path)
    if len(spec.shape) > RANK:
        text = f"GGUF tensors have at most {RANK} dimensions, this one {len(spec.shape)}; reshape or leave it out"
        raise FormatError(f"{where}: {text}", path=path)
    if spec.dtype.name in NOT_HELD:
        raise FormatError(f"{where}: GGUF holds no {spec.dtype}; cast it, or write .npz", path=path)


@dataclass(frozen=True)
class _Piece:
    """One tensor to write: a weight to be read when its turn comes, or bytes of the spool."""

    key: str
    kind: Kind
    spec: Spec
    weight: Weight | None
    at: int = 0  # where it starts in the spool

    @property
    def nbytes(self) -> int:
        return self.spec.size // self.kind.block * self.kind.width


def _write(weights: Weights, path: Path, sink: Sink, encoded: set[str], head: _Head) -> bool:
    """Write everything; False if a weight outside `encoded` turned out to be held in another way."""
    draft, dtypes = Draft(weights), dict[str, str]()
    with spooling(path) as spool:
        pieces: list[_Piece] = []
        for item in weights.values():
            pieces += _spooled(item, draft, spool, path) if item.name in encoded else [_planned(item, draft)]
        for piece in pieces:
            if piece.spec.dtype.name != (piece.kind.dtype or "float32"):
                dtypes[piece.key] = piece.spec.dtype.name
        tensors, at = [], 0
        for piece in pieces:
            tensors.append(_described(piece, at))
            at += piece.nbytes + -piece.nbytes % head.alignment
        sink.write(head.text(draft.text(dtypes=dtypes), tensors, len(pieces), path))
        for piece in pieces:
            if sink.skip(piece.nbytes, max(piece.nbytes, 1)):  # an attempt before has written it
                pass
            elif piece.weight is None:
                spool.seek(piece.at)
                _copy(spool, sink, piece.nbytes)
            elif not _put(piece, piece.weight, sink):
                return False
            sink.write(bytes(-piece.nbytes % head.alignment))
    return True


def _planned(item: Weight, draft: Draft) -> _Piece:
    """What a weight adds to the file that is read when its turn comes."""
    return _Piece(draft.plain(item.name), _native(item) or _stands_for(item.spec.dtype.name), item.spec, item)


def _spooled(item: Weight, draft: Draft, spool: io.FileIO, path: Path) -> list[_Piece]:
    """What a weight adds to the file that must be read now, since its sizes are not known before."""
    value = item.read()
    if isinstance(value, Packed) and (kind := _native(Weight.of(item.name, value))) is not None:
        _check_tensor(item.name, value.spec, path)
        piece = _Piece(draft.plain(item.name), kind, value.spec, None, spool.tell())
        Sink(spool, path).write(flat_bytes(_blocks(piece, value)))
        return [piece]
    if isinstance(value, Packed):
        leaves: Mapping[str, np.ndarray] = draft.dismantle(item.name, value)
    else:
        leaves = {draft.plain(item.name): announced(item, value)}
    pieces = []
    for key, array in leaves.items():
        spec = Spec.like(array)
        _check_tensor(key, spec, path)
        pieces.append(_Piece(key, _stands_for(spec.dtype.name), spec, None, spool.tell()))
        Sink(spool, path).write(flat_bytes(array))
    return pieces


def _blocks(piece: _Piece, value: Packed) -> np.ndarray:
    """The bytes of a packed tensor; raises CodecError where they are not those of its shape."""
    blocks = value.parts["blocks"]
    shape = (piece.spec.size // piece.kind.block, piece.kind.width)
    if isinstance(blocks, Packed) or blocks.shape != shape or blocks.dtype.str != "|u1":
        raise CodecError(f"{quoted(piece.key)}: expected blocks of the shape {list(shape)} for {piece.spec}")
    return blocks


def _put(piece: _Piece, item: Weight, sink: Sink) -> bool:
    """Write one weight; False if it is held in another way than announced."""
    if item.scheme is None and item.fill is not None:
        for block in item.blocks(max(1, BLOCK // item.spec.dtype.numpy.itemsize)):
            sink.write(flat_bytes(block))
        return True
    value = item.read()
    if item.scheme is None:
        if isinstance(value, Packed):
            return False
        sink.write(flat_bytes(announced(item, value)))
        return True
    if not isinstance(value, Packed) or value.spec != item.spec or _native(Weight.of(item.name, value)) != piece.kind:
        return False
    sink.write(flat_bytes(_blocks(piece, value)))
    return True


def _described(piece: _Piece, offset: int) -> bytes:
    """A tensor as the header describes it: the fastest axis comes first."""
    name = piece.key.encode()
    numbers = [len(name).to_bytes(8, "little"), name, len(piece.spec.shape).to_bytes(4, "little")]
    numbers += [n.to_bytes(8, "little") for n in reversed(piece.spec.shape)]
    return b"".join([*numbers, piece.kind.code.to_bytes(4, "little"), offset.to_bytes(8, "little")])


def _copy(spool: io.FileIO, sink: Sink, count: int) -> None:
    while count:
        block = spool.read(min(count, COPY))
        count -= sink.write(block)

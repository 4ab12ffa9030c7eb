"""npz and npy: the arrays of numpy. A zip of .npy members, or one .npy file.

Decides that nothing is ever unpickled, and that dtypes which numpy lacks (bfloat16, float8, int4, ...) are
members of opaque bytes ('V2', 'V1') whose names for them stand in the reserved member ``steelyard.json``,
beside metadata, ties and packed tensors. numpy.load opens every file that is written here. Knows nothing
of what the tensors mean.

Specification: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import sys
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

from steelyard.core.packed import Packed
from steelyard.core.spec import DTYPES, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats._npy import MAGIC, NATIVE, Header, header_of
from steelyard.formats._zip import STORED, Archive, Inflating, Member
from steelyard.formats.base import COPY, Writable, announced, check_text, empty, flat_bytes, replacing
from steelyard.formats.manifest import Draft, Manifest
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "steelyard.json"
MANIFEST_LIMIT = 100_000_000  # bytes
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member, so that the same weights give the same bytes
PLACES = 4  # passes over one deflated member that are kept, to go on from
DESCRIPTIONS = {name: code for code, name in NATIVE.items()}


@dataclass(frozen=True)
class Npz(Writable):
    """A zip archive of .npy members, stored or deflated."""

    name: ClassVar[str] = "npz"
    suffixes: ClassVar[tuple[str, ...]] = (".npz",)
    dtypes: ClassVar[frozenset[str]] = frozenset(DTYPES)

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A zip archive whose members are all arrays."""
        if head[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
            return False
        try:
            return all(name.endswith(".npy") or name == MANIFEST for name in Archive.of(source).members)
        except FormatError:
            return False

    def open(self, source: Source, /) -> Weights:
        """The weights in an archive: reads its directory and the header of each member."""
        path, archive = source.path, Archive.of(source)
        found: dict[str, tuple[_Array, Header]] = {}
        with source.reading() as file:
            for member in archive.members.values():
                if member.name == MANIFEST:
                    continue
                key = _key(member, path)
                array = _Array(archive, member, archive.data(file, member), key)
                found[key] = array, header_of(partial(array.peek, file), path, f"member {quoted(member.name)}")
        manifest, meta, dtypes = _manifest(archive, path)
        for key in dtypes:
            if key not in found:
                raise FormatError(f"{MANIFEST}: the dtype of {quoted(key)}, which is not there", path=path)
        arrays = {key: item.weight(header, dtypes.get(key)) for key, (item, header) in found.items()}
        return manifest.collect(arrays, meta, path)

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`, one at a time; the bytes of the finished file."""
        for text in (*weights, *weights.ties, *weights.ties.values(), *weights.meta, *weights.meta.values()):
            check_text(text, "the text", path)
        for name in weights:
            if zipfile.ZipInfo(f"{name}.npy").filename != f"{name}.npy":
                raise FormatError(f"tensor {quoted(name)}: no zip holds this name; rename it", path=path)
        draft, dtypes = Draft(weights), dict[str, str]()
        with replacing(path) as sink:
            with zipfile.ZipFile(cast("IO[bytes]", sink), "w", zipfile.ZIP_STORED) as archive:
                for item in weights.values():
                    for key, array in _leaves(item, draft).items():
                        _write_member(archive, key, array, dtypes)
                manifest = draft.text(dtypes=dtypes, meta=dict(weights.meta))
                if manifest is not None:
                    archive.writestr(_info(MANIFEST), manifest)
            return sink.tell()


@dataclass(frozen=True)
class Npy(Writable):
    """One array in one .npy file; its name is the stem of the file."""

    name: ClassVar[str] = "npy"
    suffixes: ClassVar[tuple[str, ...]] = (".npy",)
    dtypes: ClassVar[frozenset[str]] = frozenset(DESCRIPTIONS)

    def claims(self, head: bytes, _source: Source, /) -> bool:
        """The magic bytes."""
        return head.startswith(MAGIC)

    def open(self, source: Source, /) -> Weights:
        """The one tensor of a file: reads its header."""
        path, stem = source.path, PurePosixPath(source.name).stem
        header = header_of(lambda count: source.bytes(0, min(count, source.size)), path, "array")
        spec = header.spec(None, "array", path)
        if header.length + spec.nbytes != source.size:
            text = f"{spec} takes {spec.nbytes} bytes, {source.size - header.length} follow the header; fetch it again"
            raise FormatError(text, path=path, offset=header.length)
        read = partial(_read_file, source, header, spec)
        fill = partial(_fill, source, header.length) if header.direct else None
        return Weights([Weight(stem, spec, read, spec.nbytes, source.origin(header.length), fill=fill)])

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write the one tensor of `weights`; raises FormatError for more than the file can say."""
        items = list(weights.values())
        if len(items) != 1 or weights.ties or weights.meta or items[0].scheme is not None:
            text = "npy holds one plain tensor without metadata or ties; write .npz or .safetensors"
            raise FormatError(text, path=path)
        if items[0].name != path.stem:
            text = f"npy names its tensor by the file: expected {quoted(items[0].name)} before .npy; rename either"
            raise FormatError(text, path=path)
        if items[0].spec.dtype.name not in self.dtypes:
            raise FormatError(f"npy holds no {items[0].spec.dtype}; cast it, or write .npz or .safetensors", path=path)
        array = items[0].array()
        with replacing(path) as sink:
            sink.write(_head(array, DESCRIPTIONS[items[0].spec.dtype.name]))
            sink.write(flat_bytes(array))
            return sink.tell()


def _values(fill: Any, source: Source, header: Header, spec: Spec, name: str) -> np.ndarray:
    """The array whose bytes `fill(buffer)` delivers, in C order and in the byte order of this machine."""
    import numpy as np

    turned = replace(spec, shape=spec.shape[::-1]) if header.fortran else spec
    array = empty(turned, source, header.length, name)
    fill(array.reshape(-1).view(np.uint8).data)
    if header.code[0] in "<>" and (header.code[0] == ">") != (sys.byteorder == "big"):
        array = array.byteswap()
    return np.ascontiguousarray(array.T) if header.fortran else array


def _read_file(source: Source, header: Header, spec: Spec) -> np.ndarray:
    with source.reading() as file:
        return _values(partial(source.fill, file, header.length), source, header, spec, PurePosixPath(source.name).stem)


def _fill(source: Source, begin: int, first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on of the array whose values begin at byte `begin` into `flat`."""
    import numpy as np

    with source.reading() as file:
        source.fill(file, begin + first * flat.itemsize, flat.view(np.uint8).data)


@dataclass(frozen=True)
class _Array:
    """One member of an archive; its bytes begin at `begin`."""

    archive: Archive
    member: Member
    begin: int
    key: str

    def peek(self, file: IO[bytes], count: int) -> bytes:
        """The first `count` bytes, or all."""
        raw = bytearray(min(count, self.member.size))
        self.archive.fill(file, self.member, self.begin, 0, memoryview(raw))
        return bytes(raw)

    def weight(self, header: Header, dtype: str | None) -> Weight:
        """The weight; `dtype` is the type of opaque bytes. Raises FormatError where the sizes cannot be."""
        source, member = self.archive.source, self.member
        spec = header.spec(dtype, f"tensor {quoted(self.key)}", source.path)
        expected = header.length + header.count * header.itemsize
        if member.size != expected:
            text = f"tensor {quoted(self.key)} takes {str(expected)[:30]} bytes, its member has {member.size}"
            raise FormatError(text, path=source.path, offset=member.header)
        way = _Filler if member.method == STORED else _Unpacker
        fill = way(self, header.length, spec.nbytes) if header.direct and spec.dtype.bits >= 8 else None
        read = partial(self._read, header, spec)
        return Weight(self.key, spec, read, member.packed, source.origin(member.header), fill=fill)

    def wrong(self, text: str) -> FormatError:
        return FormatError(f"tensor {quoted(self.key)} {text}", path=self.archive.source.path, offset=self.begin)

    def check(self, crc: int) -> None:
        """Raise FormatError where `crc`, that of all bytes, is not the one in the directory."""
        if crc != self.member.crc:
            text = f"tensor {quoted(self.key)}: the checksum (CRC) is another; fetch the file again"
            raise FormatError(text, path=self.archive.source.path, offset=self.begin)

    def _read(self, header: Header, spec: Spec) -> np.ndarray:
        """All values, with the checksum compared."""
        archive, source = self.archive, self.archive.source
        with source.reading() as file:

            def fill(buffer: memoryview) -> None:
                archive.fill(file, self.member, self.begin, header.length, buffer)
                self.check(zlib.crc32(buffer, zlib.crc32(self.peek(file, header.length))))

            return _values(fill, source, header, spec, self.key)


class _Filler:
    """Reads parts of a stored member, and compares its checksum where they follow each other up to its end."""

    def __init__(self, array: _Array, head: int, nbytes: int):
        self._array, self._head, self._nbytes = array, head, nbytes
        self._lock, self._at, self._crc = threading.Lock(), 0, 0

    def __call__(self, first: int, flat: np.ndarray) -> None:
        """Read the elements from `first` on into `flat`; raises FormatError for another checksum."""
        import numpy as np

        source, at, raw = self._array.archive.source, first * flat.itemsize, flat.view(np.uint8).data
        with source.reading() as file:
            source.fill(file, self._array.begin + self._head + at, raw)
            start = zlib.crc32(self._array.peek(file, self._head)) if at == 0 else 0
        with self._lock:
            if at == 0:
                self._at, self._crc = 0, start
            if at == self._at:
                self._at, self._crc = at + len(raw), zlib.crc32(raw, self._crc)
                if self._at == self._nbytes:
                    self._array.check(self._crc)


@dataclass
class _Place:
    """How far one pass over a deflated member has come."""

    at: int  # among the values; the header lies before 0
    inflating: Inflating
    crc: int = 0


class _Unpacker:
    """Reads parts of a deflated member, each from the place that lies nearest before it.

    So a tensor that is read in blocks, by several threads too, is never in memory as a whole.
    """

    def __init__(self, array: _Array, head: int, nbytes: int):
        self._array, self._head, self._nbytes = array, head, nbytes
        self._lock, self._places = threading.Lock(), list[_Place]()

    def __call__(self, first: int, flat: np.ndarray) -> None:
        """Read the elements from `first` on into `flat`; raises FormatError for another checksum."""
        import numpy as np

        at, raw = first * flat.itemsize, flat.view(np.uint8).data
        with self._lock:
            before = [place for place in self._places if place.at <= at]
            start = Inflating(self._array.archive.source, self._array.member, self._array.begin)
            place = max(before, key=lambda found: found.at, default=_Place(-self._head, start))
            self._places = [other for other in self._places if other is not place]
        with self._array.archive.source.reading() as file:
            while place.at < at + len(raw):
                wanted = at + len(raw) if place.at >= at else at  # what lies before the part is let go
                block = self._next(file, place, min(COPY, wanted - place.at))
                if place.at >= at:
                    raw[place.at - at : place.at - at + len(block)] = block
                place.at, place.crc = place.at + len(block), zlib.crc32(block, place.crc)
        if place.at == self._nbytes:
            self._array.check(place.crc)
            return
        with self._lock:
            self._places = sorted([*self._places, place], key=lambda found: found.at)[-PLACES:]

    def _next(self, file: IO[bytes], place: _Place, most: int) -> bytes:
        """The next unpacked bytes, at least one; raises FormatError where the packed ones end or are damaged."""
        try:
            block = place.inflating.next(file, most)
        except zlib.error as error:
            raise self._array.wrong(f"does not unpack ({error})") from error
        if not block:
            raise self._array.wrong("unpacks to less than it announces")
        return block


def _key(member: Member, path: Path | str) -> str:
    """The name of the tensor in a member; raises FormatError for one that is no array."""
    if not member.name.endswith(".npy"):
        text = f"member {quoted(member.name)} is no array; expected names that end in .npy"
        raise FormatError(text, path=path, offset=member.header)
    return member.name.removesuffix(".npy")


def _manifest(archive: Archive, path: Path | str) -> tuple[Manifest, Mapping[str, str], Mapping[str, str]]:
    """The manifest of an archive, its metadata, and its dtypes by key."""
    if MANIFEST not in archive.members:
        return Manifest(), {}, {}
    raw, at = archive.read(MANIFEST, MANIFEST_LIMIT)
    if zlib.crc32(raw) != archive.members[MANIFEST].crc:
        raise FormatError(f"{MANIFEST}: the checksum (CRC) is another; fetch the file again", path=path, offset=at)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{MANIFEST} is not UTF-8", path=path, offset=at) from error
    manifest = Manifest.parse(text, path, extra=("dtypes", "meta"))
    meta, dtypes = manifest.extra.get("meta", {}), manifest.extra.get("dtypes", {})
    for found in (meta, dtypes):
        if not isinstance(found, dict) or any(not isinstance(text, str) for text in found.values()):
            raise FormatError(f"{MANIFEST}: expected text under text in meta and dtypes", path=path)
    for name in dtypes.values():
        if name not in DTYPES:
            raise FormatError(f"{MANIFEST}: there is no dtype {quoted(name)}", path=path)
    return manifest, meta, dtypes


def _leaves(item: Weight, draft: Draft) -> dict[str, np.ndarray]:
    """The arrays of one weight by their keys."""
    value = item.read()
    if isinstance(value, Packed):
        return draft.dismantle(item.name, value)
    return {draft.plain(item.name): announced(item, value)}


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = 0o644 << 16
    return info


def _write_member(archive: zipfile.ZipFile, key: str, array: np.ndarray, dtypes: dict[str, str]) -> None:
    dtype = Spec.like(array).dtype
    code = DESCRIPTIONS.get(dtype.name)
    if code is None:
        dtypes[key], code = dtype.name, f"V{array.dtype.itemsize}"
    data, head = flat_bytes(array), _head(array, code)
    info = _info(f"{key}.npy")
    info.file_size = len(head) + len(data)
    with archive.open(info, "w") as file:
        file.write(head)
        file.write(data)


def _head(array: np.ndarray, code: str) -> bytes:
    """A .npy header of version 1 as numpy writes it, padded so that the data starts at a multiple of 64."""
    order = "|" if array.dtype.itemsize == 1 or code[0] == "V" else "<"
    text = f"{{'descr': '{order}{code}', 'fortran_order': False, 'shape': {array.shape!r}, }}".encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text

"""npz and npy: the arrays of numpy. A zip of .npy members, or one .npy file.

Decides that nothing is ever unpickled, and that dtypes which numpy lacks (bfloat16, float8, int4, ...) are
members of opaque bytes ('V2', 'V1') whose names for them stand in the reserved member ``steelyard.json``,
beside metadata, ties and packed tensors. numpy.load opens every file that is written here. Knows nothing
of what the tensors mean.

Specification: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

from steelyard.core.packed import Packed
from steelyard.core.spec import DTYPES, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, SteelyardError, printable, quoted
from steelyard.formats.base import COPY, Writable, announced, check_text, empty, flat_bytes, replacing
from steelyard.formats.manifest import Draft, Manifest
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 10_000  # bytes, as in numpy.load
MANIFEST = "steelyard.json"
MANIFEST_LIMIT = 100_000_000  # bytes
DEFLATE_LIMIT = 1032  # no deflated byte stands for more
LARGEST = 2**63 - 1  # of a dimension
RANK_LIMIT = 64  # of numpy
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member, so that the same weights give the same bytes
NATIVE: dict[str, str] = {  # the type of an element in a .npy header, without its byte order
    "b1": "bool",
    **{"f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"},  # noqa: PIE800
    **{f"{kind}{size}": f"{word}{8 * size}" for kind, word in (("i", "int"), ("u", "uint")) for size in (1, 2, 4, 8)},
}
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
            with source.reading() as file, zipfile.ZipFile(file) as archive:
                return all(name.endswith(".npy") or name == MANIFEST for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return False

    def open(self, source: Source, /) -> Weights:
        """The weights in an archive: reads its directory and the header of each member."""
        path = source.path
        with _archive(source) as archive:
            members = _members(archive, path)
            headers = {key: _member_header(archive, info, path) for key, info in members.items()}
            manifest, meta, dtypes = _manifest(archive, path)
        for key in dtypes:
            if key not in headers:
                raise FormatError(f"{MANIFEST}: the dtype of {quoted(key)}, which is not there", path=path)
        arrays = {}
        for key, header in headers.items():
            spec = header.spec(dtypes.get(key), f"tensor {quoted(key)}", path)
            info = members[key]
            _check_size(key, info, header.length + header.count * header.itemsize, path)
            read = partial(_read_member, source, info, header, spec, key)
            arrays[key] = Weight(key, spec, read, info.compress_size, source.origin(info.header_offset))
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
        with source.reading() as file:
            header = _header(partial(_exactly, file, path), path, "array")
        spec = header.spec(None, "array", path)
        if header.length + spec.nbytes != source.size:
            text = f"{spec} takes {spec.nbytes} bytes, {source.size - header.length} follow the header; fetch it again"
            raise FormatError(text, path=path, offset=header.length)
        read = partial(_read_file, source, header, spec)
        return Weights([Weight(stem, spec, read, spec.nbytes, source.origin(header.length))])

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


@dataclass(frozen=True)
class _Header:
    """What a .npy header says; `length` is its own in bytes, `code` the type with its byte order."""

    shape: tuple[int, ...]
    fortran: bool
    code: str
    length: int

    @property
    def itemsize(self) -> int:
        return int(self.code[2:])

    @property
    def count(self) -> int:
        return Spec(self.shape, DTYPES["uint8"]).size

    def spec(self, dtype: str | None, what: str, path: Path | str) -> Spec:
        """The spec; `dtype` is the name of the type where the header has opaque bytes."""
        if (dtype is None) == (self.code[1] == "V"):
            found = f"opaque bytes ({self.code})" if dtype is None else f"{self.code} and the dtype {dtype!r} beside it"
            raise FormatError(f"{what}: expected numbers, found {found}; cast it where it was made", path=path)
        row = DTYPES[dtype if dtype is not None else NATIVE[self.code[1:]]]
        if self.itemsize != max(row.bits // 8, 1):
            raise FormatError(f"{what}: elements of {self.itemsize} bytes cannot be {row}", path=path)
        return Spec(self.shape, row)


def _header(take: Any, path: Path | str, what: str) -> _Header:
    """Parse the header that `take(count)` returns piece by piece; raises FormatError."""

    def wrong(text: str, offset: int = 10) -> FormatError:
        return FormatError(f"{what}: {text}", path=path, offset=offset)

    start = take(8)
    if start[:6] != MAGIC or start[6] not in (1, 2, 3):
        raise wrong(f"expected the beginning of a .npy file of version 1 to 3, found {start!r}", 0)
    width = 2 if start[6] == 1 else 4
    count = int.from_bytes(take(width), "little")
    if count > HEADER_LIMIT:
        raise wrong(f"the header takes {count} bytes, the limit is {HEADER_LIMIT}", 8)
    try:
        data = ast.literal_eval(take(count).decode("utf-8" if start[6] == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise wrong(f"the header is no Python literal: {str(error)[:100]}") from error
    if not isinstance(data, dict) or set(data) != {"descr", "fortran_order", "shape"}:
        raise wrong("expected descr, fortran_order and shape in the header")
    code, fortran, shape = data["descr"], data["fortran_order"], data["shape"]
    if (
        not isinstance(shape, tuple)
        or len(shape) > RANK_LIMIT
        or not all(type(n) is int and 0 <= n <= LARGEST for n in shape)
    ):
        raise wrong(f"expected up to {RANK_LIMIT} dimensions from 0 to 2^63-1, found {str(shape)[:100]}")
    if not isinstance(fortran, bool):
        raise wrong("expected True or False as fortran_order")
    opaque = isinstance(code, str) and code[1:] in ("V1", "V2")
    if not isinstance(code, str) or code[:1] not in ("<", ">", "|", "=") or not (opaque or code[1:] in NATIVE):
        pickled = "; nothing is ever unpickled here" if isinstance(code, str) and "O" in code else ""
        raise wrong(f"expected numbers, found elements of {quoted(str(code))}{pickled}")
    return _Header(shape, fortran, "<" + code[1:] if code[0] == "=" else code, 8 + width + count)


def _exactly(file: IO[bytes], path: Path | str, count: int) -> bytes:
    """`count` bytes of `file`; raises FormatError if it ends before."""
    found = b""
    while len(found) < count:
        more = file.read(count - len(found))
        if not more:
            raise FormatError(f"expected {count} bytes, the file ends after {len(found)}; fetch it again", path=path)
        found += more
    return found


def _values(fill: Any, source: Source, header: _Header, spec: Spec, name: str) -> np.ndarray:
    """The array whose bytes `fill(buffer)` delivers, in C order and in the byte order of this machine."""
    import numpy as np

    turned = replace(spec, shape=spec.shape[::-1]) if header.fortran else spec
    array = empty(turned, source, header.length, name)
    fill(array.reshape(-1).view(np.uint8).data)
    if header.code[0] in "<>" and (header.code[0] == ">") != (sys.byteorder == "big"):
        array = array.byteswap()
    return np.ascontiguousarray(array.T) if header.fortran else array


def _read_file(source: Source, header: _Header, spec: Spec) -> np.ndarray:
    with source.reading() as file:
        return _values(partial(source.fill, file, header.length), source, header, spec, PurePosixPath(source.name).stem)


def _read_member(source: Source, info: zipfile.ZipInfo, header: _Header, spec: Spec, key: str) -> np.ndarray:
    with _archive(source) as archive, archive.open(info) as file:
        _exactly(file, source.path, header.length)

        def fill(buffer: memoryview) -> None:
            while len(buffer):
                block = file.read(min(len(buffer), COPY))
                if not block:
                    raise FormatError(f"tensor {quoted(key)} ends too early", path=source.path)
                buffer[: len(block)] = block
                buffer = buffer[len(block) :]

        return _values(fill, source, header, spec, key)


@contextmanager
def _archive(source: Source) -> Iterator[zipfile.ZipFile]:
    """The archive; what zipfile and zlib raise for a damaged one becomes a FormatError."""
    try:
        with source.reading() as file, zipfile.ZipFile(file) as archive:
            yield archive
    except SteelyardError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        text = f"a damaged or encrypted zip archive ({printable(str(error))[:200]}); fetch it again"
        raise FormatError(text, path=source.path) from error


def _members(archive: zipfile.ZipFile, path: Path | str) -> dict[str, zipfile.ZipInfo]:
    """The members that are arrays, by the name of the tensor."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        where = f"member {quoted(info.filename)}"
        if info.filename == MANIFEST:
            continue
        if not info.filename.endswith(".npy"):
            raise FormatError(f"{where} is no array; expected names that end in .npy", path=path)
        key = info.filename.removesuffix(".npy")
        if key in found:
            raise FormatError(f"{where} is there twice", path=path, offset=info.header_offset)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{where} is neither stored nor deflated; save it again with numpy", path=path)
        found[key] = info
    return found


def _check_size(key: str, info: zipfile.ZipInfo, expected: int, path: Path | str) -> None:
    """The sizes in the directory must be possible, before memory is asked for."""
    stored = info.compress_type == zipfile.ZIP_STORED
    possible = info.compress_size == info.file_size if stored else info.file_size <= DEFLATE_LIMIT * info.compress_size
    if info.file_size != expected or not possible:
        text = f"tensor {quoted(key)} takes {str(expected)[:30]} bytes, its member has {info.file_size}"
        raise FormatError(text, path=path, offset=info.header_offset)


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path | str) -> _Header:
    with archive.open(info) as file:
        return _header(partial(_exactly, file, path), path, f"member {quoted(info.filename)}")


def _manifest(archive: zipfile.ZipFile, path: Path | str) -> tuple[Manifest, Mapping[str, str], Mapping[str, str]]:
    """The manifest of an archive, its metadata, and its dtypes by key."""
    if MANIFEST not in archive.namelist():
        return Manifest(), {}, {}
    if archive.getinfo(MANIFEST).file_size > MANIFEST_LIMIT:
        raise FormatError(f"{MANIFEST} takes more than {MANIFEST_LIMIT} bytes", path=path)
    manifest = Manifest.parse(archive.read(MANIFEST).decode("utf-8"), path, extra=("dtypes", "meta"))
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

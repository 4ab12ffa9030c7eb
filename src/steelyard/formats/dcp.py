"""Folders of torch.distributed.checkpoint: ``.metadata`` says which piece of which tensor lies where in which file.

Decides that the pieces of a tensor cover it, each element once, and that each is the tensor it is announced to be
when it is read. ``.metadata`` is a pickle, read by ``_pickle``: its classes are inert records, and what else it names
is listed. Each piece is a file of its own at a range of bytes of a shard. Numbers and texts of the checkpoint are
pieces, too; their names are listed under ``dcp.objects``, and they are not opened.

Source: https://github.com/pytorch/pytorch/tree/main/torch/distributed/checkpoint (metadata.py, filesystem.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import IO, TYPE_CHECKING, ClassVar

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats._inert import Dict, Foreign, Global
from steelyard.formats._pickle import Machine
from steelyard.formats._rebuild import BUILDERS, TORCH, named
from steelyard.formats._tensors import dimensions, listed
from steelyard.formats.base import Format, empty
from steelyard.formats.source import Folder, Source

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import WriteableBuffer

Wrong = Callable[[str], FormatError]
LIMIT = 100_000_000  # bytes of the metadata
HOLDERS = ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.checkpoint.metadata")
RECORDS = {
    *(
        f"{holder}.{name}"
        for holder in HOLDERS
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed._shard.checkpoint.filesystem._StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
}  # fmt: skip


@dataclass(frozen=True)
class Dcp(Format):
    """What ``torch.distributed.checkpoint.save`` writes; read only."""

    name: ClassVar[str] = "dcp"
    suffixes: ClassVar[tuple[str, ...]] = (".metadata",)
    entries: ClassVar[tuple[str, ...]] = (".metadata",)
    several: ClassVar[bool] = True

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A pickle that begins with the class of the metadata."""
        if head[:1] != b"\x80":
            return False
        start = source.bytes(0, min(80, source.size))
        return any(holder.encode() in start for holder in HOLDERS)

    def open(self, source: Source, /) -> Weights:
        """The weights of a checkpoint: reads the metadata and the sizes of the shards; raises FormatError."""
        if source.size > LIMIT:
            text = f"the metadata takes {source.size} bytes, the limit is {LIMIT}"
            raise FormatError(text, path=source.path, offset=0)
        builders = {**BUILDERS, **{name: named(name) for name in RECORDS}}
        machine = Machine(source.bytes(0, source.size), where=source.path, builders=builders)
        root = machine.load()
        tensors, places = _attribute(root, "state_dict_metadata"), _attribute(root, "storage_data")
        if not isinstance(tensors, Dict) or not isinstance(places, Dict):
            raise FormatError("expected the metadata of a checkpoint, found something else", path=source.path, offset=0)
        index = _Index(source, _places(places, source))
        items, objects = [], []
        for name, found in {name: found for name, found in tensors.pairs if isinstance(name, str)}.items():
            if _class(found) == "TensorStorageMetadata":
                items.append(index.weight(name, found))
            else:
                objects.append(name)
        meta = {"dcp.objects": json.dumps(objects)} if objects else {}
        wanted = listed(machine.wanted, machine.more)
        return Weights(items, meta=meta | ({"pickle.globals": json.dumps(wanted)} if wanted else {}))


@dataclass(frozen=True)
class _Place:
    """Where one piece lies."""

    file: str
    offset: int
    length: int
    changed: bool  # whether its bytes were transformed, such as compressed


@dataclass(frozen=True)
class _Span(Source):
    """A range of the bytes of a file, as a file."""

    whole: Source
    start: int
    size: int

    @property
    def path(self) -> str:  # type: ignore[override]
        """The file, and where the range begins in it."""
        return f"{self.whole.path}, from byte {self.start} on"

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.whole.name

    @property
    def folder(self) -> Folder:
        """The folder of the file."""
        return self.whole.folder

    def reading(self) -> AbstractContextManager[IO[bytes]]:
        """The whole file, open; `fill` knows where the range begins."""
        return self.whole.reading()

    def fill(self, file: IO[bytes], offset: int, buffer: WriteableBuffer) -> None:
        """Fill `buffer` from byte `offset` of the range on; raises FormatError if that leads out of it."""
        if offset < 0 or offset + memoryview(buffer).nbytes > self.size:
            raise FormatError("ends too early", path=self.path, offset=offset)
        self.whole.fill(file, self.start + offset, buffer)

    def origin(self, offset: int) -> str:
        """What an error says of a tensor whose bytes begin at `offset`."""
        return self.whole.origin(self.start + offset)


@dataclass(frozen=True)
class _Piece:
    """A box of a tensor, and the file that holds it."""

    at: tuple[int, ...]
    spec: Spec
    source: _Span
    tensor: str

    @cached_property
    def weight(self) -> Weight:
        """The tensor in the file, opened when it is needed; raises FormatError if it is not as announced."""
        from steelyard.formats import part

        found = part(self.source)
        items = list(found.values())
        if len(items) != 1 or items[0].spec != self.spec:
            other = str(items[0].spec) if len(items) == 1 else f"{len(items)} tensors"
            text = f"tensor {quoted(self.tensor)}: expected a piece of {self.spec}, found {other}"
            raise FormatError(text, path=self.source.path, offset=0)
        return items[0]


@dataclass
class _Index:
    """Where the pieces of a checkpoint lie."""

    source: Source
    places: dict[tuple[str, tuple[int, ...] | None], _Place]
    files: dict[str, Source] = field(default_factory=dict)

    def weight(self, name: str, found: object) -> Weight:
        """One tensor of the metadata as a weight."""

        def wrong(text: str) -> FormatError:
            return FormatError(f"tensor {quoted(name)}: {text}", path=self.source.path)

        dtype = _dtype(_attribute(found, "properties"))
        if dtype not in TORCH:
            raise wrong(f"no dtype {quoted(dtype)} is held here")
        shape = dimensions(_attribute(found, "size"), wrong)
        if math.prod(n or 1 for n in shape) >= 2**63:
            raise wrong("more than 2^63 elements")
        spec, chunks = Spec(shape, TORCH[dtype]), _attribute(found, "chunks")
        if not isinstance(chunks, list):
            raise wrong("expected a list of its pieces")
        pieces = []
        for chunk in chunks:
            at, size = (dimensions(_attribute(chunk, key), wrong) for key in ("offsets", "sizes"))
            if (
                len(at) != len(shape)
                or len(size) != len(shape)
                or any(a + n > m for a, n, m in zip(at, size, shape, strict=True))
            ):
                raise wrong(f"a piece of {size} from {at} on lies outside of {shape}")
            if math.prod(size):
                pieces.append(_Piece(at, Spec(size, spec.dtype), self._span(name, at, wrong), name))
        _check_cover(pieces, spec, wrong)
        origin = pieces[0].source.origin(0) if pieces else self.source.origin(0)
        fill = partial(_fill, tuple(sorted(pieces, key=lambda p: p.at))) if _stacked(pieces, spec) else None
        read = partial(_read, tuple(pieces), spec, self.source, name)
        return Weight(name, spec, read, sum(piece.source.size for piece in pieces), origin, fill=fill)

    def _span(self, name: str, at: tuple[int, ...], wrong: Wrong) -> _Span:
        place = self.places.get((name, at)) or self.places.get((name, None))
        if place is None:
            raise wrong(f"no file has the piece at {at}")
        if place.changed:
            raise wrong(f"the piece at {at} is compressed; save it again without")
        file = self.files.get(place.file)
        if file is None:
            file = self.files[place.file] = self.source.folder.source(place.file)
        if place.offset + place.length > file.size:
            text = (
                f"tensor {quoted(name)}: its piece ends at byte {place.offset + place.length}, the file has {file.size}"
            )
            raise FormatError(f"{text}; fetch it again", path=file.path, offset=place.offset)
        return _Span(file, place.offset, place.length)


def _attribute(record: object, name: str) -> object:
    """What a record was given under a name, or None."""
    if isinstance(record, Foreign):
        for state in reversed(record.state):
            if isinstance(state, Dict):
                return state.get(name)
    return None


def _class(record: object) -> str:
    return record.name.rpartition(".")[2] if isinstance(record, Foreign) else ""


def _dtype(properties: object) -> str:
    """The name of the dtype, which stands in a tuple or, in older files, under its name."""
    found = _attribute(properties, "dtype")
    if isinstance(properties, Foreign) and properties.state and isinstance(properties.state[-1], tuple):
        found = properties.state[-1][0] if properties.state[-1] else None
    return found.name.removeprefix("torch.") if isinstance(found, Global) else "?"


def _places(data: Dict, source: Source) -> dict[tuple[str, tuple[int, ...] | None], _Place]:
    """The places of the pieces by tensor and offset; raises FormatError."""

    def wrong(text: str) -> FormatError:
        return FormatError(f"storage_data: {text}", path=source.path)

    found: dict[tuple[str, tuple[int, ...] | None], _Place] = {}
    for key, info in data.pairs:
        name, offset = _attribute(key, "fqn"), _attribute(key, "offset")
        file, start, length = (_attribute(info, text) for text in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(file, str):
            raise wrong("expected the name of a tensor, and a file")
        first, count = dimensions((start, length), wrong)
        changed = _attribute(info, "transform_descriptors")
        place = _Place(file, first, count, bool(changed))
        found[name, None if offset is None else dimensions(offset, wrong)] = place
    return found


def _check_cover(pieces: list[_Piece], spec: Spec, wrong: Wrong) -> None:
    """Each element must lie in one piece: they have as many elements as the tensor, and none shares any."""
    found = sum(piece.spec.size for piece in pieces)
    if found != spec.size:
        raise wrong(f"its pieces have {found} elements, it has {spec.size}")
    if len(pieces) < 2:
        return
    axis = max(range(len(spec.shape)), key=lambda axis: len({piece.at[axis] for piece in pieces}))
    active: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.at[axis]):
        active = [other for other in active if other.at[axis] + other.spec.shape[axis] > piece.at[axis]]
        for other in active:
            pairs = zip(piece.at, piece.spec.shape, other.at, other.spec.shape, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in pairs):
                raise wrong(f"its pieces at {piece.at} and {other.at} overlap")
        active.append(piece)


def _stacked(pieces: list[_Piece], spec: Spec) -> bool:
    """Whether each piece is a run of the elements in C order: pieces along the first axis that has several."""
    return all(piece.spec.shape[1:] == spec.shape[1:] for piece in pieces) and len(pieces) > 0


def _fill(pieces: tuple[_Piece, ...], first: int, flat: np.ndarray) -> None:
    """Read the elements from `first` on of pieces that follow each other."""
    for piece in pieces:
        size = piece.spec.size
        if first < size and flat.size:
            count = min(size - first, flat.size)
            weight = piece.weight
            if weight.fill is not None:
                weight.fill(first, flat[:count])
            else:
                flat[:count] = weight.array().reshape(-1)[first : first + count]
            flat, first = flat[count:], 0
        else:
            first -= size


def _read(pieces: tuple[_Piece, ...], spec: Spec, source: Source, name: str) -> np.ndarray:
    array = empty(spec, source, 0, name)
    for piece in pieces:
        box = tuple(slice(at, at + n) for at, n in zip(piece.at, piece.spec.shape, strict=True))
        array[box] = piece.weight.array()
    return array

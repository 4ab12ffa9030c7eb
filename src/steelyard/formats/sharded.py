"""Weights in several files, and the index that says which tensor lies in which: ``model.safetensors.index.json``.

Decides what is written: safetensors files of a bounded size. Packed tensors are written as their parts, and the
text that says how they belong together stands in the index. What an index may say is in ``_index``, how a set
replaces another in ``fileset``.

An index is what the libraries of Hugging Face write: {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}.
Description: https://huggingface.co/docs/transformers/big_models
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.packed import Packed
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, RecipeError
from steelyard.formats._index import SHARD_LIMIT, TOTAL, Index, check_total, gather
from steelyard.formats._lost import check_named
from steelyard.formats.base import Resumable, Sink, announced, check_text, flat_bytes, spooling, writing
from steelyard.formats.fileset import resume_set, stream, write_set
from steelyard.formats.manifest import KEY, Draft, Manifest, load_json
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.source import LocalFile, Source

if TYPE_CHECKING:
    import io

    import numpy as np

LOOK = 1 << 16  # bytes in which an index must name its map to be known by its content


@dataclass(frozen=True)
class Sharded(Resumable):
    """An index, and files of at most `shard_size` bytes of tensors; a larger tensor has a file of its own."""

    shard_size: int = 5_000_000_000

    name: ClassVar[str] = "sharded"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors.index.json", ".index.json")
    entries: ClassVar[tuple[str, ...]] = (
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "*.safetensors.index.json",
        "*.index.json",
    )
    several: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = Safetensors.dtypes

    def __post_init__(self) -> None:
        if isinstance(self.shard_size, bool) or not isinstance(self.shard_size, int) or self.shard_size < 1:
            raise RecipeError(f"a shard size is a number of bytes, at least 1, not {self.shard_size!r}")

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A JSON object that names its map of weights near the beginning."""
        if head.lstrip()[:1] != b"{" or b"\0" in head:
            return False
        return source.name.endswith(".index.json") or b'"weight_map"' in source.bytes(0, min(LOOK, source.size))

    def open(self, source: Source, /) -> Weights:
        """The weights of all files that an index names: reads the index and the header of each file."""
        index = Index.read(source)
        arrays, ties, meta = gather(index, source.folder, source)
        meta = {**meta, **index.meta}
        if index.own is None:
            check_named({**index.strays, **index.meta}, arrays, source.path)
            found = Weights.over(arrays, ties, meta, arrays.specs)
        else:
            found = Manifest.parse(index.own, source.path).collect(arrays, meta, source.path)
            found = Weights.over(dict(found.items()), {**ties, **found.ties}, found.meta)
        check_total(index, found, arrays.nbytes, source)
        return found

    def write(self, weights: Weights, path: Path, /) -> int:
        """Write `weights` as files beside the index `path`, plain tensors one at a time; the bytes of all files."""
        return self._attempt(weights, path, resumed=False)

    def resume(self, weights: Weights, path: Path, /) -> int:
        """Write `weights`; files that an attempt before has finished are kept, and one that it began goes on."""
        return self._attempt(weights, path, resumed=True)

    def _attempt(self, weights: Weights, path: Path, resumed: bool) -> int:
        _check(weights, path)
        packed = {name for name, item in weights.items() if item.scheme is not None}
        try:
            return _write(weights, path, packed, self.shard_size, resumed)
        except _PackedAfterAllError:
            return _write(weights, path, set(weights), self.shard_size, resumed)

    def move(self, draft: Path, path: Path, /) -> None:
        """Give the set whose index is `draft` the names that belong to the index `path`."""
        _check_name(path)
        _move(draft, path)


class _PackedAfterAllError(Exception):
    """A tensor that was announced as plain is packed, so that no size is known beforehand."""


def _check_name(path: Path) -> None:
    if path.name.endswith(".bin.index.json"):
        text = "files are written as safetensors; name the index after them: model.safetensors.index.json"
        raise FormatError(text, path=path)


def _check(weights: Weights, path: Path) -> None:
    _check_name(path)
    for key in (KEY, TOTAL):
        if key in weights.meta:
            raise FormatError(f"the metadata key {key!r} is reserved; rename it", path=path)
    for text in (*weights, *weights.meta, *weights.meta.values(), *weights.ties):
        check_text(text, "the text", path)


def _write(weights: Weights, path: Path, encoded: set[str], shard_size: int, resumed: bool) -> int:
    """Write everything; raises _PackedAfterAllError if a weight outside `encoded` turned out to be packed."""
    draft = Draft(weights)
    with spooling(path) as spool:
        pieces = [p for item in weights.values() for p in _pieces(item, draft, spool, path, item.name in encoded)]
        shards = list(_split(pieces, shard_size))
        if len(shards) > SHARD_LIMIT:
            text = f"{len(shards)} files would be needed, the limit is {SHARD_LIMIT}; choose a larger shard size"
            raise FormatError(text, path=path)
        common = {key: weights.meta[key] for key in ("format",) if key in weights.meta}  # other readers want it there
        stem = _stem(path)

        def called(mark: str) -> list[str]:
            return [f"{stem}{mark}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

        def put(i: int, place: Path, final: Path) -> int:
            return stream(place, final, partial(Safetensors().stream, Weights(shards[i], meta=common), final))

        def index(names: Sequence[str]) -> bytes:
            return _text(weights, draft, shards, names)

        if resumed:
            return resume_set(path, called(""), lambda i, place: _go_on(Weights(shards[i], meta=common), place), index)
        return write_set(path, called, put, index, partial(_named, path, stem))


def _go_on(shard: Weights, place: Path) -> int:
    """Write one file, or keep it where an attempt before has finished it; its bytes."""
    if place.exists():
        found = Safetensors().open(LocalFile.of(place))
        if {name: item.spec for name, item in found.items()} != {name: item.spec for name, item in shard.items()}:
            place.unlink()  # it took tensors for plain that are not, and so holds others
    return Safetensors().resume(shard, place)


def _pieces(item: Weight, draft: Draft, spool: io.FileIO, path: Path, encoded: bool) -> Iterator[Weight]:
    """What one weight adds to the files; one of `encoded` is read now, since its sizes are not known before."""
    if not encoded:
        yield replace(item, name=draft.plain(item.name), read=partial(_plain, item))
        return
    value = item.read()
    leaves = draft.dismantle(item.name, value) if isinstance(value, Packed) else {draft.plain(item.name): value}
    for key, array in leaves.items():
        checked = array if isinstance(value, Packed) else announced(item, array)
        spec, at = Spec.like(checked), spool.tell()
        Sink(spool, path).write(flat_bytes(checked))
        yield Weight(key, spec, partial(_spooled, spool, at, spec), origin=item.origin)


def _plain(item: Weight) -> np.ndarray:
    value = item.read()
    if isinstance(value, Packed):
        raise _PackedAfterAllError
    return value


def _spooled(spool: io.FileIO, at: int, spec: Spec) -> np.ndarray:
    """The array that was put into the spool at `at`."""
    import numpy as np

    array = np.empty(spec.shape, spec.dtype.numpy)
    spool.seek(at)
    rest = array.reshape(-1).view(np.uint8).data
    while len(rest):
        count = spool.readinto(rest)
        if not count:
            raise FormatError("the file of what waits to be written ends too early", offset=at)
        rest = rest[count:]
    return array if sys.byteorder == "little" else array.byteswap()


def _split(pieces: Iterable[Weight], shard_size: int) -> Iterator[list[Weight]]:
    """The tensors in order, as many in one list as `shard_size` bytes hold; at least one."""
    shard: list[Weight] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.spec.nbytes > shard_size:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.spec.nbytes
    if shard:
        yield shard


def _text(weights: Weights, draft: Draft, shards: Sequence[Sequence[Weight]], names: Sequence[str]) -> bytes:
    """The index of `shards` in files called `names`."""
    total = sum(piece.spec.nbytes for shard in shards for piece in shard)
    metadata: dict[str, Any] = {TOTAL: total, **weights.meta}
    own = draft.text((piece.name, piece.spec) for shard in shards for piece in shard)
    if own is not None:
        metadata[KEY] = own
    files = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
    return _json({"metadata": metadata, "weight_map": files})


def _move(draft: Path, path: Path) -> None:
    """Move the set of the index `draft` to that of `path`."""
    data = load_json(draft.read_text(encoding="utf-8"))
    old = list(dict.fromkeys(data["weight_map"].values()))
    before, stem = _stem(draft), _stem(path)

    def called(mark: str) -> list[str]:
        return [f"{stem}{mark}{name.removeprefix(before)}" for name in old]

    def put(i: int, place: Path, final: Path) -> int:
        with writing(final):
            (draft.parent / old[i]).replace(place)
            return place.stat().st_size

    def index(names: Sequence[str]) -> bytes:
        new = dict(zip(old, names, strict=True))
        return _json({**data, "weight_map": {name: new[file] for name, file in data["weight_map"].items()}})

    write_set(path, called, put, index, partial(_named, path, stem))
    draft.unlink()


def _stem(path: Path) -> str:
    return path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")


def _json(data: Any) -> bytes:
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _named(path: Path, stem: str) -> set[str]:
    """The files that the index `path` names and that are called as they are here; none where there is no index."""
    pattern = re.compile(rf"{re.escape(stem)}(-[0-9a-f]{{8}})?-\d{{5,}}-of-\d{{5,}}\.safetensors")
    if not path.exists():
        return set()
    try:
        index = Index.read(LocalFile.of(path))
    except FormatError:  # what is no index names no files
        return set()
    return {file for file in index.files if pattern.fullmatch(file)}

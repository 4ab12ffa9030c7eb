"""What an index says of several files, and whether they agree with it.

Decides that every tensor is where the index places it, that no file has one that the index lacks, and that the
total size is the true one. Each file is opened by its own content, its header only.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from typing import TypeVar

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, quoted
from steelyard.formats.base import check_text
from steelyard.formats.config import document, embedding, texts
from steelyard.formats.manifest import KEY
from steelyard.formats.source import Folder, Source

INDEX_LIMIT = 30_000_000  # bytes; some 300,000 tensors
SHARD_LIMIT = 10_000  # files that one index may name
TOTAL = "total_size"
T = TypeVar("T")


@dataclass(frozen=True)
class Index:
    """What an index says."""

    files: Mapping[str, list[str]]  # file -> the tensors in it, in order
    map: Mapping[str, str]  # tensor -> file
    total: int | float | None  # bytes of all tensors
    meta: Mapping[str, str]
    own: str | None  # the text of ours
    strays: Mapping[str, str]  # texts in other objects than the metadata, whose name may be misspelled

    @staticmethod
    def read(source: Source) -> Index:
        """The index in a file; raises FormatError."""

        def wrong(text: str) -> FormatError:
            return FormatError(f"index: {text}", path=source.path, offset=0)

        data = document(source, INDEX_LIMIT, "index")
        names = data.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise wrong("expected an object with a 'weight_map' from names of tensors to names of files")
        metadata = data.get("metadata", {})
        if not isinstance(metadata, dict):
            raise wrong("expected an object as 'metadata'")
        total = metadata.pop(TOTAL, None)
        if total is not None and (type(total) not in (int, float) or not 0 <= total < 2**63):
            raise wrong(f"expected a number of bytes as {TOTAL!r}, found {str(total)[:100]}")
        own = metadata.pop(KEY, None)
        if own is not None and not isinstance(own, str):
            raise wrong(f"expected text as {KEY!r}")
        check_text("\n".join(names), "the names of tensors", source.path)
        others = {key: found for key, found in data.items() if key != "weight_map" and isinstance(found, dict)}
        strays = {f"{a}.{b}": text for a, found in others.items() for b, text in found.items() if isinstance(text, str)}
        return Index(_by_file(names, source), names, total, texts(metadata, "", source), own, strays)


def _by_file(names: Mapping[str, str], source: Source) -> dict[str, list[str]]:
    """The tensors of each file, in order; raises FormatError for too many files, or names that clash."""
    files: dict[str, list[str]] = {}
    for name, file in names.items():
        files.setdefault(file, []).append(name)
    if len(files) > SHARD_LIMIT:
        raise FormatError(f"index: it names {len(files)} files, the limit is {SHARD_LIMIT}", path=source.path, offset=0)
    folded: dict[str, str] = {}
    for file in files:
        other = folded.setdefault(file.casefold(), file)
        if other != file:
            text = f"index: the files {quoted(other)} and {quoted(file)} differ by case only; rename one"
            raise FormatError(text, path=source.path, offset=0)
    return files


class Joined(Mapping[str, Weight]):
    """The tensors of several files by name, in an order of its own, each made when it is asked for."""

    def __init__(self, files: Mapping[str, str], shards: Mapping[str, Weights]):
        """`files` is tensor -> file, and has no further name of a tied tensor; `shards` is file -> its tensors."""
        self._files, self._shards = files, shards

    def __getitem__(self, name: str) -> Weight:
        return self._shards[self._files[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def values(self) -> ValuesView[Weight]:
        """The tensors, in order."""
        return _Values(self)

    def items(self) -> ItemsView[str, Weight]:
        """The names and the tensors, in order."""
        return _Items(self)

    @property
    def nbytes(self) -> int:
        """The bytes of all plain values; quicker than to add up those of each tensor."""
        return sum(shard.nbytes for shard in self._shards.values())

    def all(self) -> Iterator[Weight]:
        """Every tensor; quicker than asking for each by its name."""
        return self._each(lambda shard: shard.values())

    def specs(self) -> Iterator[Spec]:
        """What each tensor is, in order."""
        return self._each(Weights.specs)

    def _each(self, what: Callable[[Weights], Iterable[T]]) -> Iterator[T]:
        """What there is of each tensor, where ``what`` gives it for all of a file; kept until it was passed on."""
        ready: dict[str, dict[str, T]] = {}
        for name, file in self._files.items():
            if file not in ready:
                shard = self._shards[file]
                ready[file] = dict(zip(shard, what(shard), strict=True))
            yield ready[file].pop(name)


class _Values(ValuesView[Weight]):
    _mapping: Joined

    def __iter__(self) -> Iterator[Weight]:
        return self._mapping.all()


class _Items(ItemsView[str, Weight]):
    _mapping: Joined

    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        return zip(self._mapping, self._mapping.all(), strict=True)


def gather(index: Index, folder: Folder, source: Source) -> tuple[Joined, dict[str, str], dict[str, str]]:
    """The tensors of all files in the order of the index, their ties, and the metadata on which the files agree."""
    from steelyard.formats import part

    shards: dict[str, Weights] = {}
    ties: dict[str, str] = {}
    metas: list[Mapping[str, str]] = []
    for file, names in index.files.items():
        try:
            shard_source = folder.source(file)
        except FormatError as error:
            raise FormatError(f"index: the file {quoted(file)}: {error}", path=source.path) from error
        shard = part(shard_source)
        _check_names(index, file, names, shard, source)
        shards[file] = shard
        ties.update(shard.ties)
        metas.append(shard.meta)
    agreed = {key: text for meta in metas[:1] for key, text in meta.items() if all(m.get(key) == text for m in metas)}
    files = index.map if not ties else {name: file for name, file in index.map.items() if name not in ties}
    return Joined(files, shards), ties, agreed


def _check_names(index: Index, file: str, names: list[str], shard: Weights, source: Source) -> None:
    """The index and a file must name the same tensors; raises FormatError for the first that one of them lacks."""
    there = {*shard, *shard.ties}
    if len(names) == len(there) and there.issuperset(names):
        return
    lost = [name for name in names if name not in there]
    more = [name for name in there if index.map.get(name) != file]
    if lost:
        text = f"tensor {quoted(lost[0])} is said to lie in {quoted(file)}, which does not have it"
    elif more[0] in index.map:
        text = f"tensor {quoted(more[0])} lies in {quoted(file)} and is said to lie in {quoted(index.map[more[0]])}"
    else:
        text = f"tensor {quoted(more[0])} lies in {quoted(file)}, and the index does not name it"
    raise FormatError(f"index: {text}; fetch the index and its files again", path=source.path)


def check_total(index: Index, weights: Weights, nbytes: int, source: Source) -> None:
    """The total must be the true one; raises FormatError naming both. `nbytes` are the plain bytes of `weights`.

    Writers differ in two ways: a tied tensor counts once or with each of its names, and a bool counts as a
    byte or as an eighth of one.
    """
    if index.total is None or index.total == nbytes:
        return
    once = sum(_nbytes(item) for item in weights.values())
    again = sum(_nbytes(weights[name]) for name in weights.ties)
    bools = sum(item.spec.size for item in weights.values() if item.spec.dtype.kind == "bool")
    head = embedding(weights)  # shared with a head that is not stored, and yet may have been counted
    totals = (once, once + again, once + (0 if head is None else _nbytes(head)))
    if any(abs(index.total - total + less) < 1 for total in totals for less in (0, bools * 7 / 8)):
        return
    text = f"{TOTAL} is {str(index.total)[:30]}, the tensors take {once} bytes"
    raise FormatError(f"index: {text}; fetch the index and its files again", path=source.path)


def _nbytes(item: Weight) -> int:
    return item.spec.nbytes if item.scheme is None or item.stored is None else item.stored

"""HDF5 and Keras: the datasets of a file by their paths. The HDF5 library reads the headers; the values are read here.

Decides that nothing outside the file is touched (external links, external storage and virtual datasets are refused,
soft links are named and left out), that no filter but deflate, shuffle and fletcher32 is undone (a
dataset with another is listed and cannot be read), that no memory is asked for which the bytes in the file cannot fill,
and that the lists ``layer_names`` and ``weight_names`` of Keras
give the order. Texts and records are named in the metadata and left out; a configuration is text and never run.
Knows nothing of what the datasets mean.

Specification: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, MissingExtraError, SteelyardError, printable, quoted
from steelyard.formats._chunks import DEFLATE_LIMIT, Chunked, Dataset
from steelyard.formats._guard import Guard
from steelyard.formats.base import Format
from steelyard.formats.source import Source

if TYPE_CHECKING:
    import h5py

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DEPTH = 64  # of groups in groups
OBJECTS = 100_000  # groups and datasets of a file
ATTRIBUTE_LIMIT = 1 << 24  # bytes of one attribute
SMALL = 1 << 20  # bytes of a dataset that has none in the file: all of it is the fill value
RANK_LIMIT = 64  # of numpy
SKIPPED = 100  # of what is left out, that the metadata name
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}
FLOATS = {  # bytes, then places and sizes of sign, exponent and mantissa, then the bias of the exponent
    (2, 15, 10, 5, 0, 10, 15): "float16",
    (2, 15, 7, 8, 0, 7, 127): "bfloat16",
    (4, 31, 23, 8, 0, 23, 127): "float32",
    (8, 63, 52, 11, 0, 52, 1023): "float64",
}


@dataclass(frozen=True)
class Hdf5(Format):
    """A file of https://www.hdfgroup.org, of Keras or of anything else."""

    name: ClassVar[str] = "hdf5"
    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5", ".keras.h5", ".weights.h5")
    entries: ClassVar[tuple[str, ...]] = ("model.weights.h5", "*.weights.h5", "*.h5", "*.hdf5")

    def claims(self, head: bytes, _source: Source, /) -> bool:
        """The signature."""
        return head.startswith(SIGNATURE)

    def open(self, source: Source, /) -> Weights:
        """The datasets of a file: reads what describes them."""
        with _guarded(source) as (file, guard):
            return _Walk(source, file, guard).weights()


@contextmanager
def _library(source: Source) -> Iterator[h5py.File]:
    """The file as the HDF5 library sees it."""
    with _guarded(source) as (file, _):
        yield file


@contextmanager
def _guarded(source: Source) -> Iterator[tuple[h5py.File, Guard]]:
    """The file as the HDF5 library sees it; what it raises for a damaged one becomes a FormatError."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingExtraError("the format 'hdf5'", "h5py", "formats") from error
    try:
        with source.reading() as raw, Guard(raw, source) as guard, h5py.File(guard, "r") as file:
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise FormatError("expected offsets and lengths of 8 bytes", path=source.path, offset=0)
            if file.userblock_size:
                text = f"{file.userblock_size} bytes lie before the file; cut them off"
                raise FormatError(text, path=source.path, offset=0)
            yield file, guard
    except SteelyardError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError, OverflowError, LookupError) as error:
        text = f"a damaged HDF5 file ({printable(str(error))[:200]}); fetch it again"
        raise FormatError(text, path=source.path, offset=0) from error


class _Walk:
    """What is found on the way through one open file."""

    def __init__(self, source: Source, file: h5py.File, guard: Guard):
        self._source, self._file, self._guard = source, file, guard
        self._left = OBJECTS
        self._groups: set[object] = set()
        self._found: dict[str, tuple[object, Weight]] = {}  # path -> identity in the file, dataset
        self._skipped: list[str] = []

    def weights(self) -> Weights:
        """All datasets of numbers, those of Keras in its order; one with two names is tied."""
        self._group(self._file.id, "", 0)
        order = [name for name in dict.fromkeys(self._listed()) if name in self._found]
        items: dict[str, Weight] = {}
        ties: dict[str, str] = {}
        first: dict[object, str] = {}
        for name in dict.fromkeys([*order, *self._found]):
            identity, weight = self._found[name]
            if identity in first:
                ties[name] = first[identity]
            else:
                first[identity] = name
                items[name] = weight
        meta = dict(self._meta())
        if self._skipped:
            more = len(self._skipped) - SKIPPED
            meta["skipped"] = "; ".join(self._skipped[:SKIPPED]) + (f"; and {more} more" if more > 0 else "")
        return Weights(items.values(), ties, meta)

    def _wrong(self, name: str, text: str) -> FormatError:
        return FormatError(f"{quoted(name)}: {text}", path=self._source.path)

    def _group(self, group: Any, prefix: str, depth: int) -> None:
        """Go through a group; a group that was seen before, by another name or from below, is not entered again."""
        from h5py import h5g, h5o

        if depth > DEPTH:
            raise self._wrong(prefix[:200], f"groups lie more than {DEPTH} deep in each other")
        info = h5o.get_info(group)
        if (info.fileno, info.addr) in self._groups:
            return
        self._groups.add((info.fileno, info.addr))
        for raw in _natural(group):
            self._left -= 1
            if self._left < 0:
                raise self._wrong(prefix, f"more than {OBJECTS} groups and datasets")
            name = prefix + self._text(raw, prefix)
            if not self._hard(group, raw, name):
                continue
            below = h5o.open(group, raw)
            if isinstance(below, h5g.GroupID):
                self._group(below, f"{name}/", depth + 1)
            else:
                self._object(below, name)

    def _text(self, raw: bytes, prefix: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(prefix, f"the name {raw[:100]!r} in it is not UTF-8") from error

    def _hard(self, group: Any, raw: bytes, name: str) -> bool:
        """Whether a name stands for an object of this file; raises FormatError if it leads out."""
        from h5py import h5l

        kind = group.links.get_info(raw).type
        if kind == h5l.TYPE_HARD:
            return True
        if kind == h5l.TYPE_SOFT:
            self._skipped.append(f"{quoted(name)}: a soft link")
            return False
        raise self._wrong(name, "a link that leads out of the file; only what lies in it is read")

    def _object(self, found: Any, name: str) -> None:
        from h5py import h5d, h5o, h5s

        if not isinstance(found, h5d.DatasetID):
            self._skipped.append(f"{quoted(name)}: a named type")
            return
        dtype, swapped = _dtype(found.get_type())
        space = found.get_space()
        if dtype is None or not space.is_simple() or space.get_simple_extent_type() == h5s.NULL:
            self._skipped.append(f"{quoted(name)}: no numbers")
            return
        spec = Spec(tuple(int(n) for n in space.shape), dtype)
        info = h5o.get_info(found)
        self._found[name] = (info.fileno, info.addr), self._dataset(found, name, spec, swapped).weight(name)

    def _dataset(self, found: Any, name: str, spec: Spec, swapped: bool) -> Dataset:
        """Where the values of a dataset lie; raises FormatError where that is another file, or cannot be."""
        from h5py import h5d

        plist, stored = found.get_create_plist(), int(found.get_storage_size())
        if plist.get_layout() == h5d.VIRTUAL:
            raise self._wrong(name, "a virtual dataset, whose values lie in other files; copy them into one")
        if plist.get_external_count():
            raise self._wrong(name, "its values lie in another file; copy them into this one")
        if stored > self._source.size:
            raise self._wrong(name, f"takes {stored} bytes, the file has {self._source.size}; fetch it again")
        dataset = Dataset(self._source, name, spec, swapped, stored, _library)
        filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
        unknown = next((each for each in filters if each[0] not in FILTERS), None)
        if unknown is not None:
            return dataset.unreadable(f"{unknown[0]} ({unknown[3].decode(errors='replace')})")
        factor = DEFLATE_LIMIT if any(each[0] == 1 for each in filters) else 1
        if spec.nbytes > max(SMALL, stored * factor) or (not filters and stored and stored < spec.nbytes):
            text = f"{str(spec)[:200]} takes {str(spec.nbytes)[:30]} bytes, {stored} lie in the file"
            raise self._wrong(name, text)
        if plist.get_layout() == h5d.CHUNKED and stored:
            chunk = tuple(int(n) for n in plist.get_chunk())
            if math.prod(chunk) * spec.dtype.numpy.itemsize > max(SMALL, stored * factor):
                text = f"chunks of {str(chunk)[:100]} take more than the {stored} bytes in the file can fill"
                raise self._wrong(name, text)
            return dataset.chunked(Chunked(chunk, tuple(FILTERS[each[0]] for each in filters)))
        offset = found.get_offset() if stored else None
        if offset is not None and offset + stored > self._source.size:
            text = f"bytes {offset} to {offset + stored}, the file has {self._source.size}; fetch it again"
            raise self._wrong(name, text)
        return dataset if offset is None else dataset.contiguous(int(offset))

    def _listed(self) -> Iterator[str]:
        """The paths of the weights in the order of Keras 2, where the file has it."""
        for base in ("", "model_weights/"):
            if base and self._child(base) is None:
                continue
            for layer in self._names(base, "layer_names"):
                for weight in self._names(f"{base}{layer}/", "weight_names"):
                    yield f"{base}{layer}/{weight}"

    def _child(self, path: str) -> Any | None:
        """The group at `path`, reached by hard links only, or None."""
        from h5py import h5g, h5l, h5o

        group = self._file.id
        for part in path.strip("/").split("/") if path else ():
            raw = part.encode()
            if not raw or raw == b"." or not isinstance(group, h5g.GroupID) or raw not in group:
                return None
            if group.links.get_info(raw).type != h5l.TYPE_HARD:
                return None
            group = h5o.open(group, raw)
        return group if isinstance(group, h5g.GroupID) else None

    def _names(self, path: str, attribute: str) -> list[str]:
        """A list of names in an attribute; Keras cuts long ones into attribute0, attribute1, ..."""
        group = self._child(path)
        if group is None:
            return []
        found = self._texts(group, attribute)
        if found is not None:
            return found
        names: list[str] = []
        for number in range(OBJECTS):
            more = self._texts(group, f"{attribute}{number}")
            if more is None:
                break
            names += more
        return names

    def _meta(self) -> Iterator[tuple[str, str]]:
        """The attributes of the file, and of the group of weights, that are one text or one number."""
        from h5py import h5a

        for base in ("", "model_weights/"):
            group = self._child(base)
            if group is None:
                continue
            for number in range(min(h5a.get_num_attrs(group), 1000)):
                raw = h5a.open(group, index=number).name
                name = raw.decode(errors="replace")
                found = self._texts(group, name)
                if found is not None and len(found) == 1:
                    yield f"{base}{name}", found[0]

    def _texts(self, group: Any, name: str) -> list[str] | None:
        """The texts of an attribute; None where there is none, or one of something else."""
        from h5py import h5a, h5t

        raw = name.encode("utf-8", "replace")
        if not h5a.exists(group, raw):
            return None
        attribute = h5a.open(group, raw)
        kind, limit = attribute.get_type(), ATTRIBUTE_LIMIT
        if not isinstance(kind, h5t.TypeStringID) or attribute.get_storage_size() > limit:
            return None
        import numpy as np

        if math.prod(attribute.shape) * kind.get_size() > limit:
            return None
        if kind.is_variable_str() and not self._guard.check_texts(raw):
            return None
        found = np.empty(attribute.shape, attribute.dtype)
        if found.size:
            attribute.read(found)
        values = found.reshape(-1).tolist()
        return [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in values]


def _natural(group: Any) -> Iterable[bytes]:
    """The names in a group; numbers, as Keras 3 names variables, in their order."""
    names = [raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape") for raw in group]
    return sorted(names, key=int) if all(name.isdigit() and len(name) < 10 for name in names) else names


def _dtype(kind: Any) -> tuple[DType | None, bool]:
    """The dtype of a type of HDF5, and whether its bytes are swapped; None for what is no number that is known."""
    from h5py import h5t

    if isinstance(kind, h5t.TypeEnumID):
        members = {kind.get_member_name(n): kind.get_member_value(n) for n in range(min(kind.get_nmembers(), 3))}
        return (DTYPES["bool"] if members == {b"FALSE": 0, b"TRUE": 1} and kind.get_size() == 1 else None), False
    swapped = isinstance(kind, (h5t.TypeFloatID, h5t.TypeIntegerID)) and kind.get_order() == h5t.ORDER_BE
    if isinstance(kind, h5t.TypeIntegerID):
        size = kind.get_size()
        plain = size in (1, 2, 4, 8) and kind.get_precision() == 8 * size and kind.get_offset() == 0
        sign = "" if kind.get_sign() == h5t.SGN_2 else "u"
        return (DTYPES[f"{sign}int{8 * size}"] if plain else None), swapped
    if isinstance(kind, h5t.TypeFloatID):
        said = (kind.get_size(), *kind.get_fields(), kind.get_ebias())
        plain = kind.get_order() in (h5t.ORDER_LE, h5t.ORDER_BE)
        return (DTYPES[FLOATS[said]] if plain and said in FLOATS else None), swapped
    return None, False

"""The header of a safetensors file: which tensors there are, and where their bytes lie.

Decides what is a valid header, stricter than the reference library where the specification is. There are two
ways through it with one verdict: a pattern for the one spelling that nearly every writer uses, many entries at a
time, and a walk through any JSON, one entry at a time. Whatever the pattern does not take as a whole is walked,
so that every error comes from the walk. Neither keeps an object for each tensor: a header of 100 MB may hold
two million. Knows nothing of what the tensors mean.

Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from json.decoder import scanstring  # type: ignore[attr-defined]
from operator import sub
from typing import Any

from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.errors import FormatError, quoted
from steelyard.formats._folded import ARRAY, SUM, folded, unfold
from steelyard.formats.manifest import KEY, strict_scanner
from steelyard.formats.source import Source

HEADER_LIMIT = 100_000_000  # bytes, as in the reference library
LARGEST = 2**64 - 1  # of a dimension or an offset
RANK_LIMIT = 10_000  # axes; numpy and torch hold 64, and a header could have 45 million
CODES: dict[str, DType] = {row.safetensors: row for row in DTYPES.values() if row.safetensors}
METADATA = "__metadata__"

CHUNK = 1 << 16  # bytes of the header that are matched at a time: what they become stays in the processor's cache
KINDS = 50_000  # kinds of tensor that are told apart while reading; more than this many is no model

# `"name":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},` and nothing else: no space, no sign. The groups take
# anything up to the next delimiter, which is quick; `_match` looks at what they took.
_ENTRY = re.compile(
    r'"([^"]*+)":\{"dtype":"([^\]]*+)\],"data_offsets":\[(0|[1-9][0-9]{0,18}+),(0|[1-9][0-9]{0,18}+)\]\},'
)
_DIMENSION = re.compile("0|[1-9][0-9]{0,19}")
_SPACE = re.compile(r"[ \t\n\r]*+")
_BETWEEN = '","shape":['  # a kind is the text of an entry from its dtype to the last dimension


@dataclass
class Header:
    """What the header says, in columns: the i-th name has the kind ``kinds[kind[i]]`` and begins at ``begin[i]``."""

    meta: dict[str, str]
    names: dict[str, int]  # name -> i
    kind: array
    begin: array  # bytes from the start of the data
    kinds: list[str]  # such as 'F32","shape":[2,3'; `spec_of` reads it
    sizes: list[int]  # bytes of a tensor of each kind
    start: int  # where the data starts in the file
    sealed: int | None = None  # where the array starts in which all lies, folded, with a checksum at its end

    @staticmethod
    def read(source: Source) -> Header:
        """Read and check the header, folded or not, and not one byte more; raises FormatError with the place."""
        raw = _bytes(source)
        start = 8 + len(raw)
        header = _parsed(raw, source, start, source.size)
        count = folded(header.meta.get(KEY), source.path)
        return header if count is None else _unfolded(header, count, source)


def _parsed(raw: bytearray, source: Source, start: int, end: int) -> Header:
    """A header whose tensors lie from the byte `start` of the file to `end`."""
    draft = _canonical(raw)
    if draft is None:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("the header is not UTF-8", path=source.path, offset=8 + error.start) from error
        del raw
        draft = _walk(text, source)
    _check_cover(draft, source, start, end)
    return Header(draft.meta, draft.names, draft.kind, draft.begin, draft.kinds.texts, draft.kinds.sizes, start)


def _unfolded(outer: Header, count: int, source: Source) -> Header:
    """The header that lies deflated in the first `count` bytes of the only array of a file."""
    if len(outer.meta) != 1 or list(outer.names) != [ARRAY] or count > source.size - outer.start - SUM:
        text = f"a folded header of {count} bytes needs one array, {ARRAY!r}, that begins with it; fetch the file again"
        raise FormatError(text, path=source.path)
    inner = bytearray(count)
    with source.reading() as file:
        source.fill(file, outer.start, inner)
    try:
        found = _parsed(unfold(bytes(inner)), source, outer.start + count, source.size - SUM)
        return replace(found, sealed=outer.start)
    except FormatError as error:  # a place in that text is none in the file
        raise FormatError(f"in the folded header: {error.message}", path=source.path, offset=outer.start) from error


@lru_cache(512)
def spec_of(kind: str) -> Spec:
    """The Spec of a kind of the header; the same object for the same text, as long as it is in use."""
    code, _, shape = kind.partition(_BETWEEN)
    return Spec(tuple(map(int, shape.split(","))) if shape else (), CODES[code])


def _bytes(source: Source) -> bytearray:
    """The header as it lies in the file."""
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
        text = f"expected a header that begins with '{{', found {bytes(raw[:1])!r}"
        raise FormatError(text, path=source.path, offset=8)
    return raw


class _Kinds(dict[str, int]):
    """The kinds met so far by their text: kind -> its place in `texts` and `sizes`; -1 for one that is no kind."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sizes: list[int] = []

    def __missing__(self, kind: str) -> int:
        code, _, shape = kind.partition(_BETWEEN)
        dtype, dims = CODES.get(code), shape.split(",", RANK_LIMIT) if shape else []
        if dtype is None or len(dims) > RANK_LIMIT or not all(map(_is_dimension, dims)):
            return -1
        bits = _elements(list(map(int, dims))) * dtype.bits
        return -1 if bits % 8 else self.add(kind, bits // 8)

    def add(self, kind: str, size: int) -> int:
        """Enter a kind of which a tensor has `size` bytes; its place."""
        if len(self) >= KINDS:
            self.clear()
        self[kind] = len(self.texts)
        self.texts.append(kind)
        self.sizes.append(size)
        return len(self.texts) - 1


def _is_dimension(text: str) -> bool:
    return _DIMENSION.fullmatch(text) is not None and int(text) <= LARGEST


def _elements(shape: list[int]) -> int:
    """The product of the dimensions; one that no file can hold is not multiplied to its end."""
    if 0 in shape:
        return 0
    product = 1
    for n in shape:
        product *= n
        if product > LARGEST:
            return 2**200
    return product


class _Draft:
    """The columns of a header that is being read."""

    def __init__(self, meta: dict[str, str]):
        self.meta = meta
        self.names: dict[str, int] = {}
        self.kind, self.begin, self.end = array("I"), array("Q"), array("Q")
        self.kinds = _Kinds()


def _canonical(raw: bytearray) -> _Draft | None:
    """All of a header in the usual spelling; None where anything at all is otherwise."""
    opening = _metadata_ahead(raw)
    end = raw.rfind(b"}")  # the closing brace of the whole; spaces may follow it, for alignment
    if opening is None or bytes(raw[end - 2 : end]) != b"]}" or raw.count(b" ", end) != len(raw) - end - 1:
        return None
    meta, at = opening
    draft = _Draft(meta)
    try:
        while at < end:
            cut = raw.find(b']},"', at + CHUNK, end)
            stop = end if cut < 0 else cut + 3
            text = raw[at:stop].decode()
            if not _match(text + "," if cut < 0 else text, draft):
                return None
            at = stop
    except (UnicodeDecodeError, OverflowError):  # no text, or an offset that no machine can count to
        return None
    return draft


def _metadata_ahead(raw: bytearray) -> tuple[dict[str, str], int] | None:
    """The metadata at the beginning of the header, which may be none, and where the first tensor stands."""
    opening = b'{"%b":' % METADATA.encode()
    if not raw.startswith(opening):
        return {}, 1
    end = raw.find(b"},", len(opening))
    while end >= 0 and raw[end - 1] not in b'"{':
        end = raw.find(b"},", end + 1)
    try:
        text = raw[len(opening) : end + 1].decode()
        data, stop = strict_scanner()(text, 0)
        if stop == len(text) and end > 0:
            return _metadata(data), end + 2
    except (ValueError, StopIteration, FormatError):
        pass  # the walk says what is wrong
    return None


def _match(text: str, draft: _Draft) -> bool:
    """Take in a piece of the header that consists of whole entries; False if anything in it is otherwise."""
    found = _ENTRY.split(text)  # what lies between two matches, and the four groups of a match, by turns
    names, kinds = found[1::5], found[2::5]
    text_of_names = "".join(names)
    if not names or any(found[::5]) or "\\" in text_of_names or not text_of_names.isprintable():
        return False  # the matches do not cover the text, or a name has to be read as JSON
    numbers = list(map(draft.kinds.__getitem__, kinds))
    begin, end = list(map(int, found[3::5])), list(map(int, found[4::5]))
    if min(numbers) < 0 or list(map(draft.kinds.sizes.__getitem__, numbers)) != list(map(sub, end, begin)):
        return False
    first = len(draft.begin)
    draft.names.update(zip(names, range(first, first + len(names)), strict=True))
    draft.kind.extend(numbers)
    draft.begin.extend(begin)
    draft.end.extend(end)
    return len(draft.names) == len(draft.begin) and METADATA not in draft.names


def _walk(text: str, source: Source) -> _Draft:
    """A header in any spelling that JSON allows; raises FormatError with the place of what is wrong."""
    draft = _Draft({})
    seen_metadata = False
    for name, data, at in _members(text, source):
        where = "header" if name == METADATA else f"tensor {quoted(name)}"
        try:
            if name in draft.names or (name == METADATA and seen_metadata):
                raise FormatError(f"the key {quoted(name)} is given twice")
            if name == METADATA:
                draft.meta, seen_metadata = _metadata(data), True
            else:
                _add(name, data, draft)
        except FormatError as error:
            raise _wrong(f"{where}: {error}", text, at, source) from error
    return draft


def _members(text: str, source: Source) -> Iterator[tuple[str, Any, int]]:
    """The members of the outermost object one by one: the name, the value, and where the name stands."""
    scan = strict_scanner()
    at = 1
    try:
        at = _space(text, at)
        if text[at : at + 1] == "}":
            _end(text, at + 1)
            return
        while True:
            place = at
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
            name, at = scanstring(text, at + 1, True)
            at = _space(text, at)
            if text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
            at = _space(text, at + 1)
            try:
                value, at = scan(text, at)
            except StopIteration as error:
                raise json.JSONDecodeError("Expecting value", text, error.value) from error
            yield name, value, place
            at = _space(text, at)
            if text[at : at + 1] == "}":
                _end(text, at + 1)
                return
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _space(text, at + 1)
    except json.JSONDecodeError as error:
        raise _wrong(f"header: expected JSON, found otherwise: {error.msg}", text, error.pos, source) from error
    except FormatError as error:
        raise _wrong(f"header: {error}", text, at, source) from error
    except RecursionError as error:
        raise _wrong("header: the JSON is nested too deep", text, at, source) from error
    except ValueError as error:  # a number of more digits than Python reads
        message = f"header: expected JSON, found otherwise: {str(error)[:100]}"
        raise _wrong(message, text, at, source) from error


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _end(text: str, at: int) -> None:
    at = _space(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _wrong(message: str, text: str, at: int, source: Source) -> FormatError:
    offset = 8 + len(text[:at].encode("utf-8", "surrogatepass"))
    return FormatError(message, path=source.path, offset=offset)


def _metadata(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or any(not isinstance(value, str) for value in data.values()):
        raise FormatError(f"expected text under text in {METADATA!r}")
    for text in (*data, *data.values()):
        _check_text(text, "metadata")
    return dict(data)


def _check_text(text: str, what: str) -> None:
    """Raise FormatError for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{what} {quoted(text)} is not Unicode text; rename it") from error


def _add(name: str, data: Any, draft: _Draft) -> None:
    """Take in one entry; raises FormatError without the place."""
    _check_text(name, "the name")
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("expected an object of dtype, shape and data_offsets")
    code, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise FormatError(f"unknown dtype {quoted(str(code))}; known are {', '.join(CODES)}")
    if not _counts(shape):
        raise FormatError(f"expected dimensions from 0 to 2^64-1, found {_cut(shape)}")
    if len(shape) > RANK_LIMIT:
        raise FormatError(f"{len(shape)} dimensions are more than any program holds; the limit is {RANK_LIMIT}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"expected data_offsets [begin, end] with begin <= end, found {_cut(offsets)}")
    number = draft.kinds[f"{code}{_BETWEEN}{','.join(map(str, shape))}"]
    begin, end = offsets
    if number < 0 or draft.kinds.sizes[number] != end - begin:
        bits = _elements(shape) * CODES[code].bits
        found = f"{bits / 8:.10g}" if bits < 2**50 else "over 2^47"
        raise FormatError(f"{code} of shape {_cut(shape)} takes {found} bytes, data_offsets have {end - begin}")
    draft.names[name] = len(draft.begin)
    draft.kind.append(number)
    draft.begin.append(begin)
    draft.end.append(end)


def _counts(data: Any) -> bool:
    return isinstance(data, list) and all(type(n) is int and 0 <= n <= LARGEST for n in data)


def _cut(data: Any) -> str:
    """What is said of a value out of a file: its beginning."""
    shown = data[:50] if isinstance(data, (list, str)) else data
    return quoted(str(shown)).strip("'")


def _check_cover(draft: _Draft, source: Source, start: int, stop: int) -> None:
    """The tensors must cover the data from the byte `start` of the file to `stop`, each byte once."""
    begin, end, size = draft.begin, draft.end, stop - start
    if begin and begin[0] == 0 and end[-1] == size and begin[1:] == end[:-1]:
        return  # in the order of the header, as nearly every writer has them
    order = sorted(range(len(begin)), key=end.__getitem__)
    order.sort(key=begin.__getitem__)
    at = 0
    for i in order:
        if begin[i] != at or end[i] > size:
            raise _uncovered(next(islice(draft.names, i, None)), begin[i], end[i], at, source, start, stop)
        at = end[i]
    if at != size:
        text = f"{size - at} bytes follow after the last tensor; fetch the file again, or cut them off"
        raise FormatError(text, path=source.path, offset=start + at)


def _uncovered(name: str, begin: int, end: int, at: int, source: Source, start: int, stop: int) -> FormatError:
    if begin < at:
        what = "overlaps the one before"
    elif begin > at:
        what = f"leaves a hole of {begin - at} bytes"
    else:
        whole = "the file" if stop == source.size else "the data before the checksum"
        what = f"ends at byte {start + end}, {whole} at {stop}; fetch it again"
    remedy = "" if begin == at else "; fetch the file again, or write it anew where it was made"
    return FormatError(f"tensor {quoted(name)} {what}{remedy}", path=source.path, offset=start + begin)

"""The header of a .npy array: its shape, order and type, and where the values begin.

Decides what a header may say; nothing in it is ever evaluated. Knows no files and no archives.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import FormatError, quoted

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 10_000  # bytes, as in numpy.load
LARGEST = 2**63 - 1  # of a dimension
RANK_LIMIT = 64  # of numpy
NATIVE: dict[str, str] = {  # the type of an element in a .npy header, without its byte order
    "b1": "bool",
    **{"f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"},  # noqa: PIE800
    **{f"{kind}{size}": f"{word}{8 * size}" for kind, word in (("i", "int"), ("u", "uint")) for size in (1, 2, 4, 8)},
}
PEEK = 128  # bytes in which nearly every header lies
PAIR = re.compile(
    r"""\s* (?P<mark>['"]) (?P<key>descr|fortran_order|shape) (?P=mark) \s* : \s*
    (?: (?P<flag>True|False) | (?P<quote>['"]) (?P<text>[^'"\\]*) (?P=quote) | \( (?P<shape>[-\d\s,]*) \) )
    \s* (?P<end>,\s*\}?|\}) \s*""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Header:
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

    @property
    def direct(self) -> bool:
        """Whether the values lie as they are in memory, so that a part of them can be read."""
        return not self.fortran and (self.code[0] == "|" or (self.code[0] == "<") == (sys.byteorder == "little"))

    def spec(self, dtype: str | None, what: str, path: Path | str) -> Spec:
        """The spec; `dtype` is the name of the type where the header has opaque bytes."""
        if (dtype is None) == (self.code[1] == "V"):
            found = f"opaque bytes ({self.code})" if dtype is None else f"{self.code} and the dtype {dtype!r} beside it"
            raise FormatError(f"{what}: expected numbers, found {found}; cast it where it was made", path=path)
        row = DTYPES[dtype if dtype is not None else NATIVE[self.code[1:]]]
        if self.itemsize != max(row.bits // 8, 1):
            raise FormatError(f"{what}: elements of {self.itemsize} bytes cannot be {row}", path=path)
        return Spec(self.shape, row)


def header_of(peek: Callable[[int], bytes], path: Path | str, what: str) -> Header:
    """Parse the header of the array whose first bytes, or all, `peek(count)` returns; raises FormatError."""

    def wrong(text: str, offset: int = 10) -> FormatError:
        return FormatError(f"{what}: {text}", path=path, offset=offset)

    start = peek(PEEK)
    if start[:6] != MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise wrong(f"expected the beginning of a .npy file of version 1 to 3, found {start[:8]!r}", 0)
    width = 2 if start[6] == 1 else 4
    count = int.from_bytes(start[8 : 8 + width], "little")
    if count > HEADER_LIMIT:
        raise wrong(f"the header takes {count} bytes, the limit is {HEADER_LIMIT}", 8)
    length = 8 + width + count
    if length > len(start):
        start = peek(length)
    if length > len(start):
        raise wrong(f"the header takes {count} bytes, the file ends before", len(start))
    data = _literal(start[8 + width : length], wrong)
    code, fortran, text = data["descr"], data["fortran_order"], data["shape"]
    words = [word.strip() for word in text.split(",")]
    words = words if words[-1] else words[:-1]
    if len(words) > RANK_LIMIT or not all(word.isdigit() and len(word) < 20 for word in words):
        raise wrong(f"expected up to {RANK_LIMIT} dimensions from 0 to 2^63-1, found {quoted(text)}")
    shape = tuple(int(word) for word in words)
    if any(n > LARGEST for n in shape) or (len(shape) == 1 and "," not in text):
        raise wrong(f"expected up to {RANK_LIMIT} dimensions from 0 to 2^63-1, found {quoted(text)}")
    if code[:1] not in ("<", ">", "|", "=") or not (code[1:] in ("V1", "V2") or code[1:] in NATIVE):
        pickled = "; nothing is ever unpickled here" if "O" in code else ""
        raise wrong(f"expected numbers, found elements of {quoted(code)}{pickled}")
    return Header(shape, fortran == "True", "<" + code[1:] if code[0] == "=" else code, length)


def _literal(raw: bytes, wrong: Callable[[str], FormatError]) -> dict[str, str]:
    """The three values of a header as they are spelled; nothing else that Python could mean is looked at."""
    text, found = raw.decode("latin-1").strip(), dict[str, str]()
    at = 1 if text.startswith("{") else len(text)
    while (pair := PAIR.match(text, at)) is not None:
        key, at = pair["key"], pair.end()
        value = pair[{"descr": "text", "fortran_order": "flag", "shape": "shape"}[key]]
        if value is None or key in found:
            raise wrong(f"{key} is given twice, or is not what it should be: {quoted(pair[0].strip())}")
        found[key] = value
        if pair["end"].endswith("}"):
            break
    if len(found) != 3 or at != len(text):
        raise wrong(f"expected descr, fortran_order and shape as numpy writes them, found {quoted(text[at:] or text)}")
    return found

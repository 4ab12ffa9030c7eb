"""A GGUF model in several files, ``model-00001-of-00003.gguf`` and so on: which they are, and that they are whole.

Decides that the first file opens all of them, and that each is there once and says so itself. Knows no tensor.
"""

from __future__ import annotations

import re

from steelyard.errors import FormatError, quoted
from steelyard.formats._gguf_header import Header
from steelyard.formats.source import Source

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
HIDDEN = frozenset({NUMBER, COUNT, TENSORS})  # what is no longer true of the weights of all files together
_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def parts_of(source: Source, header: Header) -> list[tuple[Source, Header]]:
    """The files of the set that a file begins, itself first; only itself where it is whole. Raises FormatError."""
    count, found = header.number(COUNT) or 1, _NAME.fullmatch(source.name)
    named = (int(found[2]), int(found[3])) if found else (1, 1)
    if count <= 1:
        if named[1] > 1:
            text = f"the name says part {named[0]} of {named[1]}, the header says nothing of parts; rename the file"
            raise FormatError(text, path=source.path)
        return [(source, header)]
    number = header.number(NUMBER)
    if found is None or named[1] != count:
        text = f"the header says {count} parts; name them NAME-00001-of-{count:05}.gguf and so on"
        raise FormatError(text, path=source.path)
    _check_number(source, header, named[0] - 1, count)
    if number != 0:
        text = f"is part {named[0]} of {count}; open the first, {quoted(f'{found[1]}-00001-of-{count:05}.gguf')}"
        raise FormatError(text, path=source.path)
    parts, folder = [(source, header)], source.folder
    for i in range(1, count):
        name = f"{found[1]}-{i + 1:05}-of-{count:05}.gguf"
        other = folder.find(name)
        if other is None:
            raise FormatError(f"part {i + 1} of {count}, {quoted(name)}, is missing; fetch it", path=source.path)
        parts.append((other, Header.read(other)))
        _check_number(*parts[-1], i, count)
    total, expected = sum(len(one.tensors) for _, one in parts), header.number(TENSORS)
    if total != expected:
        text = f"metadata {TENSORS!r}: expected {expected} tensors in all parts, found {total}; fetch them again"
        raise FormatError(text, path=source.path)
    return parts


def _check_number(source: Source, header: Header, number: int, count: int) -> None:
    """Raise FormatError unless the header says that it is the part that the name says."""
    found = header.number(NUMBER), header.number(COUNT)
    if found != (number, count):
        said = f"the header says part {'?' if found[0] is None else found[0] + 1} of {found[1]}"
        text = f"the name says part {number + 1} of {count}, {said}; the parts are mixed up: fetch them again"
        raise FormatError(text, path=source.path)

"""GGUF files made by hand, right and wrong, and where in one each number stands: for the hostile cases and the fuzz.

Knows nothing of the reader under test, so that the two cannot be wrong together.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def text(content: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` lies about it."""
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: int, content: object) -> bytes:
    """A value with its type before it; of an array, `content` is the type of its elements and the elements."""
    return struct.pack("<I", kind) + _bare(kind, content)


def _bare(kind: int, content: object) -> bytes:
    if kind == STRING:
        return text(content)  # type: ignore[arg-type]
    if kind == ARRAY:
        inner, elements = content  # type: ignore[misc]
        return struct.pack("<IQ", inner, len(elements)) + b"".join(_bare(inner, one) for one in elements)
    return struct.pack(f"<{CODES[kind]}", content)


def entry(key: str | bytes, kind: int, content: object) -> bytes:
    """One entry of metadata."""
    return text(key) + value(kind, content)


def tensor(
    name: str | bytes, dims: Sequence[int] = (2,), code: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    """The description of one tensor; `dims` in the order of the file, `rank` lies about their number."""
    shape = struct.pack("<I", len(dims) if rank is None else rank) + b"".join(struct.pack("<Q", n) for n in dims)
    return text(name) + shape + struct.pack("<IQ", code, offset)


def gguf(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
    magic: bytes = b"GGUF",
) -> bytes:
    """A whole file; `counts` lies about the numbers of tensors and of entries."""
    numbers = [len(found) if said is None else said for found, said in zip((tensors, entries), counts, strict=True)]
    head = magic + version + struct.pack("<QQ", *numbers) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def padded(data: bytes, alignment: int = 32) -> bytes:
    """The bytes of a tensor, filled up."""
    return data + bytes(-len(data) % alignment)


@dataclass
class Fields:
    """Where the parts of a whole file are."""

    numbers: list[tuple[int, int]] = field(default_factory=list)  # place and width of every count, length, type, ...
    entries: list[tuple[int, int]] = field(default_factory=list)  # where each begins and ends
    tensors: list[tuple[int, int]] = field(default_factory=list)

    @staticmethod
    def of(content: bytes) -> Fields:
        """The parts of a file that is right."""
        found, at = Fields([(0, 4), (4, 4), (8, 8), (16, 8)]), 24
        tensors, entries = struct.unpack_from("<QQ", content, 8)
        for _ in range(entries):
            begin = at
            at = found._text(content, at)
            (kind,) = struct.unpack_from("<I", content, at)
            found.numbers.append((at, 4))
            at = found._value(content, kind, at + 4)
            found.entries.append((begin, at))
        for _ in range(tensors):
            begin = at
            at = found._text(content, at)
            (rank,) = struct.unpack_from("<I", content, at)
            if rank > 8:
                raise struct.error("no such rank")
            found.numbers += [(at, 4), *((at + 4 + 8 * i, 8) for i in range(rank))]
            at += 4 + 8 * rank
            found.numbers += [(at, 4), (at + 4, 8)]
            at += 12
            found.tensors.append((begin, at))
        return found

    def _text(self, content: bytes, at: int) -> int:
        self.numbers.append((at, 8))
        return at + 8 + int(struct.unpack_from("<Q", content, at)[0])

    def _value(self, content: bytes, kind: int, at: int) -> int:
        if kind == STRING:
            return self._text(content, at)
        if kind != ARRAY:
            if at >= len(content):
                raise struct.error("beyond the end")
            self.numbers.append((at, WIDTHS[kind]))
            return at + WIDTHS[kind]
        inner, count = struct.unpack_from("<IQ", content, at)
        self.numbers += [(at, 4), (at + 4, 8)]
        at += 12
        for _ in range(count):
            at = self._value(content, inner, at)
        return at


def seeds() -> list[bytes]:
    """Whole files: of every type of value, of several types of tensor, of none at all."""
    everything = [
        entry("general.architecture", STRING, "llama"),
        *(entry(f"n.{kind}", kind, 1) for kind in CODES),
        entry("tokens", ARRAY, (STRING, ["a", "bc", ""])),
        entry("scores", ARRAY, (6, [0.5, -1.0])),
        entry("flags", ARRAY, (7, [True, False])),
        entry("nested", ARRAY, (ARRAY, [(0, [1, 2]), (STRING, ["x"])])),
    ]
    aligned = [entry("general.architecture", STRING, "unknown"), entry("general.alignment", 4, 64)]
    tensors = [
        tensor("a", (2, 3), 0, 0),
        tensor("q", (32, 2), 8, 32),
        tensor("k", (256,), 12, 128),
        tensor("s", (), 30, 288),
    ]
    data = padded(bytes(range(24))) + padded(bytes(68)) + padded(bytes(144)) + padded(b"\x80\x3f")
    return [
        gguf(everything, tensors, data),
        gguf(aligned, [tensor("x", (3,), 24, 0), tensor("y", (0, 2), 0, 64)], padded(b"abc", 64), alignment=64),
        gguf(everything[:1], [tensor("i", (256,), 16, 0)], padded(bytes(66))),
        gguf([entry("k", STRING, "v")]),
    ]


NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    33,
    64,
    255,
    256,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**63,
    2**64 - 1,
)


def spoil(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes: a number of the header, an entry doubled, dropped, moved or of another file, any bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            fields = Fields.of(content)
        except (struct.error, KeyError, RecursionError, OverflowError):
            fields = Fields()
        if len(content) > 1 << 16 or (not fields.numbers and rng.random() < 0.7):
            continue
        change = rng.randrange(4) if fields.numbers else 3
        if change < 2:
            content = _number(rng, content, fields)
        elif change == 2:
            content = _piece(rng, content, fields, others)
        else:
            at = rng.randrange(len(content) + 1)
            content = rng.choice((content[:at], content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]))
    return content


def _number(rng: random.Random, content: bytes, fields: Fields) -> bytes:
    at, width = rng.choice(fields.numbers)
    old = int.from_bytes(content[at : at + width], "little")
    new = rng.choice((old + rng.choice((-32, -1, 1, 32)), rng.choice(NUMBERS))) % (1 << 8 * width)
    return content[:at] + new.to_bytes(width, "little") + content[at + width :]


def _piece(rng: random.Random, content: bytes, fields: Fields, others: Sequence[bytes]) -> bytes:
    """An entry or a tensor doubled, dropped or taken from another file, and the count with it or not."""
    at, pieces = rng.choice(((16, fields.entries), (8, fields.tensors)))
    if not pieces:
        return content
    begin, end = rng.choice(pieces)
    (count,) = struct.unpack_from("<Q", content, at)
    other = rng.choice(others)
    found = Fields.of(other)
    donors = found.entries if at == 16 else found.tensors
    new, piece = rng.choice(
        (
            (count + 1, content[begin:end] * 2),
            (count - 1, b""),
            (count + 1, content[begin:end] + (other[slice(*rng.choice(donors))] if donors else b"")),
        )
    )
    said = struct.pack("<Q", new if rng.random() < 0.8 else count)
    return content[:at] + said + content[at + 8 : begin] + piece + content[end:]

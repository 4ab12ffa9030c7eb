"""The directory of a zip archive, read strictly: where each member lies, and nothing that two readers could see apart.

Decides that the members cover the file from its first byte to the directory without a gap or an overlap, and that
the header in front of each member says what the directory says. Names of members are only names: nothing is ever
unpacked to a path, and archives in archives are bytes. Checksums are not compared: torch can be told to write
others. Knows nothing of what the members hold.

Specification: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from steelyard.errors import FormatError, quoted
from steelyard.formats.base import COPY
from steelyard.formats.source import Source

LOCAL, CENTRAL, END, END64, LOCATOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
STORED, DEFLATED = 0, 8
DIRECTORY_LIMIT = 100_000_000  # bytes
MEMBER_LIMIT = 100_000
FIRST = 1 << 12  # packed bytes that are read first: often only the beginning of a member is wanted
DEFLATE_LIMIT = 1032  # the largest factor by which deflate can shrink anything
MASKED = (0xFFFF, 0xFFFFFFFF)  # "see the zip64 record"
DESCRIPTORS = (0, 12, 16, 20, 24)  # bytes that may follow a member whose sizes were not known before


@dataclass(frozen=True)
class Member:
    """One member, as the directory has it."""

    name: str
    raw: bytes  # the name as it stands in the file
    flags: int
    method: int
    size: int  # unpacked
    packed: int  # in the file
    header: int  # where its local header lies
    crc: int = 0  # of the unpacked bytes, as the directory has it

    @property
    def described(self) -> bool:
        """Whether its sizes may stand behind it instead of in its header."""
        return bool(self.flags & 8)


@dataclass(frozen=True)
class Archive:
    """The members of a zip archive by name, in the order of the directory."""

    source: Source
    members: dict[str, Member] = field(repr=False)
    start: int  # where the directory begins

    @staticmethod
    def of(source: Source) -> Archive:
        """Read the directory; raises FormatError for one that is damaged, ambiguous, or of an encrypted archive."""
        with source.reading() as file:
            start, size, count = _end(source, file)
            raw = bytearray(size)
            source.fill(file, start, raw)
        members: dict[str, Member] = {}
        for member in _entries(bytes(raw), start, source):
            if member.name in members:
                raise _wrong(source, member, "is there twice")
            if len(members) >= count:
                raise _wrong(source, member, f"is one more than the {count} that the end record announces")
            members[member.name] = member
        if len(members) != count:
            text = f"zip: the end record announces {count} members, the directory has {len(members)}"
            raise FormatError(text, path=source.path, offset=start)
        _check_order(source, members, start)
        return Archive(source, members, start)

    def check(self) -> None:
        """Compare every local header with the directory; raises FormatError where they differ or leave a gap."""
        ordered = sorted(self.members.values(), key=lambda member: member.header)
        with self.source.reading() as file:
            for member, after in _spans(ordered, self.start):
                gap = after - self.data(file, member) - member.packed
                if gap not in (DESCRIPTORS if member.described else (0,)):
                    raise _wrong(self.source, member, f"is followed by {gap} bytes that belong to nothing")

    def data(self, file: IO[bytes], member: Member) -> int:
        """Where the bytes of a member begin; raises FormatError where its header differs from the directory."""
        head = bytearray(30)
        self.source.fill(file, member.header, head)
        sig, _, flags, method, _, _, _, packed, size, names, extras = struct.unpack("<4s5H3L2H", head)
        rest = bytearray(names + extras)
        self.source.fill(file, member.header + 30, rest)
        if sig != LOCAL:
            raise _wrong(self.source, member, f"begins with {sig!r} instead of a local header")
        if packed in MASKED or size in MASKED:
            found = _zip64(bytes(rest[names:]), [size, packed])
            size, packed = found if found is not None else (size, packed)
        sizes = (size, packed) == (member.size, member.packed) or (member.described and not size and not packed)
        if (bytes(rest[:names]), flags, method) != (member.raw, member.flags, member.method) or not sizes:
            raise _wrong(self.source, member, "has another name, size, method or flag in its own header")
        at: int = member.header + 30 + names + extras
        if at + member.packed > self.start:
            raise _wrong(self.source, member, "reaches into the directory")
        return at

    def read(self, name: str, limit: int) -> tuple[bytes, int]:
        """All bytes of a member and where they lie in the file; raises FormatError for more than `limit`."""
        member = self.members[name]
        if member.size > limit:
            raise _wrong(self.source, member, f"takes {member.size} bytes, the limit is {limit}")
        raw = bytearray(member.size)
        with self.source.reading() as file:
            at = self.data(file, member)
            self.fill(file, member, at, 0, memoryview(raw))
        return bytes(raw), at

    def fill(self, file: IO[bytes], member: Member, at: int, first: int, buffer: memoryview) -> None:
        """Fill `buffer` with the unpacked bytes of a member from byte `first` on; `at` is where its bytes begin."""
        if member.method == STORED:
            self.source.fill(file, at + first, buffer)
            return
        for block in self.unpacked(file, member, at):
            if first >= len(block):
                first -= len(block)
                continue
            count = min(len(block) - first, len(buffer))
            buffer[:count] = block[first : first + count]
            buffer, first = buffer[count:], 0
            if not len(buffer):
                return
        if len(buffer):
            raise _wrong(self.source, member, f"unpacks to {len(buffer)} bytes less than it announces")

    def unpacked(self, file: IO[bytes], member: Member, at: int) -> Iterator[bytes]:
        """The unpacked bytes in blocks, never more than the member announces."""
        inflating, left = Inflating(self.source, member, at), member.size
        while left:
            try:
                block = inflating.next(file, min(COPY, left))
            except zlib.error as error:
                raise _wrong(self.source, member, f"does not unpack ({error})") from error
            if not block:
                return
            left -= len(block)
            yield block


class Inflating:
    """One pass over a deflated member, whose packed bytes begin at `at`; it can stop and go on."""

    def __init__(self, source: Source, member: Member, at: int):
        self._source, self._at, self._end = source, at, at + member.packed
        self._unpack, self._pending, self._step = zlib.decompressobj(-15), b"", FIRST

    def next(self, file: IO[bytes], most: int) -> bytes:
        """The next unpacked bytes, up to `most`; none at the end. Raises zlib.error where they are damaged."""
        block = b""
        while not block and not self._unpack.eof:
            if not self._pending and self._at < self._end:
                raw = bytearray(min(self._step, self._end - self._at))
                self._step = min(2 * self._step, COPY)
                self._source.fill(file, self._at, raw)
                self._at, self._pending = self._at + len(raw), bytes(raw)
            given = len(self._pending)
            block = self._unpack.decompress(self._pending, most)
            self._pending = self._unpack.unconsumed_tail
            if not block and not given:
                break
        return block


def _spans(ordered: list[Member], end: int) -> Iterator[tuple[Member, int]]:
    """Each member, and where the next one begins."""
    return zip(ordered, [*(member.header for member in ordered[1:]), end], strict=False)  # of nothing: nothing


def _wrong(source: Source, member: Member, text: str) -> FormatError:
    return FormatError(f"zip: member {quoted(member.name)} {text}", path=source.path, offset=member.header)


def _end(source: Source, file: IO[bytes]) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its members, from the records at the end of the file."""

    def wrong(text: str, offset: int) -> FormatError:
        return FormatError(f"zip: {text}", path=source.path, offset=offset)

    for reach in (22 + 76, 22 + 76 + 0xFFFF):  # most archives have no comment
        tail = bytearray(min(source.size, reach))
        base = source.size - len(tail)
        source.fill(file, base, tail)
        at = tail.rfind(END)
        if at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            break
    if at < 0 or len(tail) - at < 22:
        raise wrong("there is no end record; the archive is cut off: fetch it again", source.size)
    _, disk, first, here, count, size, start, comment = struct.unpack("<4s4H2LH", tail[at : at + 22])
    if at + 22 + comment != len(tail):
        raise wrong(f"{len(tail) - at - 22 - comment} bytes follow after the archive", base + at + 22 + comment)
    end = base + at
    if tail[max(at - 20, 0) : at].startswith(LOCATOR):
        end, (disk, first, here, count, size, start) = _end64(
            source, file, end - 20, (disk, first, here, count, size, start)
        )
    if disk or first or here != count:
        raise wrong("an archive of several disks; join it", base + at)
    if start + size != end:
        text = f"the directory ends at byte {start + size}, its end record begins at {end}; bytes lie before or between"
        raise wrong(text, base + at)
    if size > DIRECTORY_LIMIT:
        raise wrong(f"the directory takes {size} bytes, the limit is {DIRECTORY_LIMIT}", start)
    if count > MEMBER_LIMIT:
        raise wrong(f"{count} members, the limit is {MEMBER_LIMIT}", base + at)
    return start, size, count


def _end64(source: Source, file: IO[bytes], at: int, small: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The end record of zip64 whose locator lies at `at`; it must agree with what the small one says."""
    raw, record = bytearray(20), bytearray(56)
    source.fill(file, at, raw)
    _, disk, where, disks = struct.unpack("<4sLQL", raw)
    wrong = FormatError(
        "zip: the zip64 end record does not lie where or say what the others do", path=source.path, offset=at
    )
    if where + 56 > at or disk or disks > 1:
        raise wrong
    source.fill(file, where, record)
    sig, length, _, _, *fields = struct.unpack("<4sQ2H2L4Q", record)
    if sig != END64 or where + 12 + length != at:
        raise wrong
    if any(old not in (new, *MASKED) for old, new in zip(small, fields, strict=True)):
        raise wrong
    return where, tuple(fields)


def _zip64(extra: bytes, values: list[int]) -> list[int] | None:
    """`values` with those that are masked taken from the zip64 field of `extra`; None where it lacks them."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            data, out = extra[at + 4 : at + 4 + length], []
            for value in values:
                if value == 0xFFFFFFFF:
                    if len(data) < 8:
                        return None
                    value, data = int.from_bytes(data[:8], "little"), data[8:]
                out.append(value)
            return out
        at += 4 + length
    return None


def _entries(raw: bytes, start: int, source: Source) -> Iterator[Member]:
    at = 0
    while at < len(raw):
        if len(raw) - at < 46 or raw[at : at + 4] != CENTRAL:
            raise FormatError("zip: the directory is damaged; fetch it again", path=source.path, offset=start + at)
        fields = struct.unpack_from("<4s6H3L5H2L", raw, at)
        _, _, _, flags, method, _, _, crc, packed, size, names, extras, comment, disk, _, _, header = fields
        name = raw[at + 46 : at + 46 + names]
        extra = raw[at + 46 + names : at + 46 + names + extras]
        values = [size, packed, header]
        if 0xFFFFFFFF in values:
            found = _zip64(extra, values)
            if found is None:
                text = f"zip: member {quoted(_text(name))} lacks its zip64 sizes"
                raise FormatError(text, path=source.path, offset=start + at)
            values = found
        member = Member(_text(name), name, flags, method, values[0], values[1], values[2], crc)
        _check(source, member, disk, start)
        yield member
        at += 46 + names + extras + comment


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


def _check(source: Source, member: Member, disk: int, start: int) -> None:
    """One entry of the directory by itself."""
    if member.flags & 0x2041:
        raise _wrong(source, member, "is encrypted; save it again without a password")
    if member.method not in (STORED, DEFLATED):
        raise _wrong(source, member, f"is packed by method {member.method}; only stored and deflated members are read")
    if disk not in (0, 0xFFFF) or member.header + 30 + len(member.raw) + member.packed > start:
        raise _wrong(source, member, "does not lie in front of the directory")
    stored = member.method == STORED
    if (member.size != member.packed) if stored else (member.size > DEFLATE_LIMIT * member.packed):
        raise _wrong(source, member, f"cannot unpack from {member.packed} bytes to {member.size}")


def _check_order(source: Source, members: dict[str, Member], start: int) -> None:
    """The members must begin with the file, and none may begin within another."""
    ordered = sorted(members.values(), key=lambda member: member.header)
    if ordered and ordered[0].header:
        text = f"zip: {ordered[0].header} bytes lie before the first member; the file is of two kinds at once"
        raise FormatError(text, path=source.path, offset=0)
    for member, after in _spans(ordered, start):
        if member.header + 30 + len(member.raw) + member.packed > after:
            raise _wrong(source, member, "overlaps the next one")

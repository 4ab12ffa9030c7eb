"""A safetensors header that lies deflated within the data: for files so small that it is a good part of them.

Such a file has one array of bytes, which begins with the deflated header of what follows it there::

    {"__metadata__":{"steelyard":"folded 90"},"all":{"dtype":"U8","shape":[1162],"data_offsets":[0,1162]}}

The last four bytes of the array are the CRC-32 of all before them in it. Any reader of safetensors opens such a file.
Deflate is primed with texts that headers often have; these are part of the format and must never change. Knows nothing
of what a header says.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from steelyard.errors import FormatError
from steelyard.formats.source import Folder, Source

MARK = "folded "  # in the metadata of the file, before the number of deflated bytes
ARRAY = "all"
LIMIT = 1 << 20  # bytes of a header: more than this is not worth it, and is not inflated
WORTH = 0.01  # of the file: what is saved must be more
SUM = 4  # bytes of the checksum at the end of the array
BLOCK = 1 << 20  # bytes that are summed at a time
LOOK = 1 << 16  # bytes of an array in which a header is looked for that nothing tells of
USUAL = (
    rb'"bitmask","palette","affine","lowrank","scaled","vectors","floatgrid","entropy","trellis","int8","bfloat16",'
    rb'"float16","codes","values","scale","zero","centres","factor","running_mean\":["running_var\":["embedding.weight'
    rb"encoder.layer.0.attention.decoder.layers.0.downsample.classifier.features.10.weight\":[self_attn.q_proj."
    rb"self_attn.in_proj_weight\":[out_proj.mlp.down_proj.norm1.weight\":[norm1.bias\":[linear1.weight\":[linear1.bias"
    rb"\":[linear2.weight\":[bn1.weight\":[bn1.bias\":[weight_ih_l0\":[weight_hh_l0\":[bias_ih_l0\":[bias_hh_l0\":["
    rb"0.weight\":[0.bias\":[2.weight\":[2.bias\":[4.weight\":[4.bias\":[conv1.weight\":[conv1.bias\":[conv2.weight\":["
    rb'conv2.bias\":[0,fc1.weight\":[fc1.bias\":[0,fc2.weight\":[fc2.bias\":[0,head.weight\":[head.bias\":[0,10]}]}}"},'
    rb'"joined":{"dtype":"U8","shape":[],"data_offsets":[0,]}}{"__metadata__":{"format":"pt","steelyard":"{'
    rb"\"version\":1,\"packed\":{\"joined\":{\"joined\":[\"multiples\",\"float32\",\"stream\",{\""
)


def fold(header: bytes, size: int) -> tuple[bytes, bytes] | None:
    """What stands before `size` bytes of data in place of this header; None if it is not worth it.

    The header of the file, length first, and the beginning of its array; after the data follows the checksum.
    """
    if len(header) > LIMIT:
        return None
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, USUAL)
    inner = deflate.compress(header.rstrip(b" ")) + deflate.flush()
    whole = len(inner) + size + SUM
    entries = {
        "__metadata__": {"steelyard": f"{MARK}{len(inner)}"},
        ARRAY: {"dtype": "U8", "shape": [whole], "data_offsets": [0, whole]},
    }
    outer = json.dumps(entries, separators=(",", ":")).encode()
    outer += b" " * (-len(outer) % 8)
    outer = len(outer).to_bytes(8, "little") + outer
    length = len(outer) + len(inner) + SUM
    return (outer, inner) if len(header) + 8 - length > WORTH * (size + length) else None


@dataclass(frozen=True)
class Sealed(Source):
    """A file whose array is summed when it is first read from: then nothing of one that is damaged is ever seen."""

    inner: Source
    begin: int  # where the array begins, which ends with the file
    known: list[bool] = field(default_factory=list, compare=False)  # not empty: the sum was found right

    @property
    def path(self) -> Path | str:  # type: ignore[override]
        """What errors call the file."""
        return self.inner.path

    @property
    def size(self) -> int:  # type: ignore[override]
        """The bytes of the file."""
        return self.inner.size

    @property
    def folder(self) -> Folder:
        """Where the file lies."""
        return self.inner.folder

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The open file; raises FormatError where its bytes are not those that were written."""
        with self.inner.reading() as file:
            if not self.known:
                self._check(file)
                self.known.append(True)
            yield file

    def _check(self, file: IO[bytes]) -> None:
        end, found = self.size - SUM, 0
        for at in range(self.begin, end, BLOCK):
            block = bytearray(min(BLOCK, end - at))
            self.fill(file, at, block)
            found = zlib.crc32(block, found)
        told = bytearray(SUM)
        self.fill(file, end, told)
        expected = int.from_bytes(told, "little")
        if found != expected:
            text = f"the bytes are not those that were written: their CRC-32 is {found:08x}, expected {expected:08x}"
            raise FormatError(f"{text}; fetch the file again", path=self.path)


def lost(source: Source, begin: int) -> int | None:
    """The deflated bytes of a header with which the bytes of a file begin, though nothing tells of it; None: of none.

    Only what deflate's dictionary and the shape of a header make sure is taken for one.
    """
    head = source.bytes(begin, min(LOOK, source.size - begin))
    inflate = zlib.decompressobj(-15, USUAL)
    try:
        text = inflate.decompress(head, LIMIT)
    except zlib.error:
        return None
    header = text.startswith(b'{"__metadata__":{') and text.endswith(b"}}") and b'"data_offsets":[0,' in text
    return len(head) - len(inflate.unused_data) if inflate.eof and header else None


def folded(told: str | None, path: object) -> int | None:
    """The deflated bytes of which the metadata of a file tells; None where it tells of none. Raises FormatError."""
    if told is None or not told.startswith(MARK):
        return None
    count = told.removeprefix(MARK)
    if not count.isascii() or not count.isdigit() or len(count) > 7 or not 0 < int(count) <= LIMIT:
        text = f"metadata 'steelyard': expected the bytes of a folded header, found {told[:40]!r}"
        raise FormatError(text, path=path)
    return int(count)


def unfold(inner: bytes) -> bytearray:
    """The header; raises FormatError for bytes that are not all of one deflated text of at most 1 MiB."""
    inflate = zlib.decompressobj(-15, USUAL)
    try:
        text = bytearray(inflate.decompress(inner, LIMIT))
    except zlib.error as error:
        raise FormatError(f"the folded header is damaged ({error}); fetch the file again") from error
    if not inflate.eof or inflate.unused_data:
        raise FormatError(
            "the folded header does not end where it should, or is longer than 1 MiB; fetch the file again"
        )
    return text

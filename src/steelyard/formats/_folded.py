"""A safetensors header that lies deflated within the data: for files so small that it is a good part of them.

Such a file has one array of bytes, which begins with the deflated header of what follows it there::

    {"__metadata__":{"steelyard":"folded 90"},"all":{"dtype":"U8","shape":[1158],"data_offsets":[0,1158]}}

Any reader of safetensors opens it. Deflate is primed with texts that headers often have; these are part of the format
and must never change. Knows nothing of what a header says.
"""

from __future__ import annotations

import json
import zlib

from steelyard.errors import FormatError

MARK = "folded "  # in the metadata of the file, before the number of deflated bytes
ARRAY = "all"
LIMIT = 1 << 20  # bytes of a header: more than this is not worth it, and is not inflated
WORTH = 0.01  # of the file: what is saved must be more
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


def fold(header: bytes, size: int) -> bytes | None:
    """What stands before `size` bytes of data in place of this header, length first; None if it is not worth it."""
    if len(header) > LIMIT:
        return None
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, USUAL)
    inner = deflate.compress(header.rstrip(b" ")) + deflate.flush()
    whole = len(inner) + size
    entries = {
        "__metadata__": {"steelyard": f"{MARK}{len(inner)}"},
        ARRAY: {"dtype": "U8", "shape": [whole], "data_offsets": [0, whole]},
    }
    outer = json.dumps(entries, separators=(",", ":")).encode()
    outer += b" " * (-len(outer) % 8)
    found = len(outer).to_bytes(8, "little") + outer + inner
    return found if len(header) + 8 - len(found) > WORTH * (size + len(found)) else None


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

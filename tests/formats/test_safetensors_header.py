"""The header of safetensors files: the quick way and the walk give one verdict; tensors are made when asked for."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.errors import FormatError
from steelyard.formats import _safetensors_header as header_module
from steelyard.formats import open, write
from steelyard.formats._safetensors_header import CODES, Header
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.source import InMemory

ALPHABET = b'0123456789-+.eE[]{}",: abFIU8\\\x00\x1f\x7f\xff\xc3\xa9\n'


def blob(header: Any, size: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


def entries(count: int, name: str = "layers.{}.weight") -> tuple[dict[str, Any], int]:
    """A header of `count` tensors of several kinds, and the bytes of their data."""
    found: dict[str, Any] = {}
    at = 0
    for i in range(count):
        code, shape = [("F32", [i % 7, 2]), ("BF16", []), ("F4", [2, i % 3]), ("U8", [0, 5])][i % 4]
        size = int(np.prod(shape)) * CODES[code].bits // 8
        found[name.format(i)] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return found, at


def verdict(content: bytes) -> Any:
    """All that is read from a header, or what is said of it."""
    try:
        found = Header.read(InMemory(content, "x"))
    except FormatError as error:
        return str(error)
    kinds = [(found.kinds[kind], found.sizes[kind]) for kind in found.kind]
    return found.meta, list(found.names.items()), kinds, list(found.begin), found.start


def both(content: bytes) -> Any:
    """The verdict, which must be the same when everything is walked."""
    quick = verdict(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header_module, "_canonical", lambda raw: None)
        assert verdict(content) == quick
    return quick


@pytest.mark.parametrize("meta", [{}, {"format": "pt"}, {"a": '"},"', "b": "{},", "c": "é\n\\"}, {"": ""}], ids=str)
@pytest.mark.parametrize("count", [1, 5, 3000])
def test_the_usual_spelling_is_read_quickly_and_alike(meta: dict[str, str], count: int) -> None:
    found, size = entries(count)
    content = blob({"__metadata__": meta, **found} if meta else found, size)
    raw = bytearray(content[8 : len(content) - size])
    quick = header_module._canonical(raw)
    assert quick is not None or '"},"' in meta.values()
    said = both(content)
    assert said[0] == meta
    assert [name for name, _ in said[1]] == list(found)
    assert said[3] == [row["data_offsets"][0] for row in found.values()]
    both(content[:8] + raw + content[8 + len(raw) :])
    spaced = json.dumps({"__metadata__": meta, **found}, indent=1).encode()
    assert both(blob(spaced, size))[1:4] == said[1:4]


def test_what_others_write_is_read_quickly() -> None:
    values = {f"näme {i}": np.zeros((i, 2), np.float16) for i in range(50)}
    for content in (save(values), save(values, {"format": "np"})):
        count = int.from_bytes(content[:8], "little")
        assert header_module._canonical(bytearray(content[8 : 8 + count])) is not None
        both(content)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_mutated_header_has_one_verdict(data: st.DataObject) -> None:
    found, size = entries(data.draw(st.integers(1, 6)), data.draw(st.sampled_from(["a.{}", "é{}", "}},{}", "\\n{}"])))
    content = blob({"__metadata__": {"k": "v"}, **found} if data.draw(st.booleans()) else found, size)
    for _ in range(data.draw(st.integers(1, 3))):
        count = len(content) - size
        at, span = data.draw(st.integers(8, max(9, count - 1))), data.draw(st.integers(0, 4))
        content = content[:at] + data.draw(st.sampled_from(SPLICES)) + content[at + span :]
    count = max(0, len(content) - 8 - size)
    both(struct.pack("<Q", count) + content[8:])


SPLICES = [bytes([c]) for c in ALPHABET] + [
    b"", b"00", b"9" * 19, b"9223372036854775808", b"18446744073709551616", b"__metadata__", b"\\u0041", b'","shape":[',
    b'"a.0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"\xe2\x80\xae", b"]},", b"[1,", b"null", b"NaN",
]  # fmt: skip


def test_single_bytes_changed_have_one_verdict_and_the_reference_library_agrees() -> None:
    found, size = entries(4)
    whole = blob({"__metadata__": {"k": "v"}, **found}, size)
    rng = random.Random(7)
    accepted = 0
    for _ in range(1500):
        at = rng.randrange(8, len(whole) - size)
        content = whole[:at] + bytes([rng.choice(ALPHABET)]) + whole[at + 1 :]
        if isinstance(both(content), str):
            continue
        accepted += 1
        safetensors.deserialize(content)
    assert accepted > 50


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (b'"data_offsets":[00,4]', "expected JSON"),
        (b'"data_offsets":[+0,4]', "expected JSON"),
        (b'"data_offsets":[9223372036854775808,9223372036854775812]', "leaves a hole"),
        ('"data_offsets":[０,4]'.encode(), "expected JSON"),
        (b'"data_offsets":[0,4],"more":1', "expected an object"),
        (b'"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]', "byte 62: tensor 'a': the key"),
        (b'"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]', "byte 117: tensor 'b' overlaps"),
    ],
)
def test_errors_name_the_place(changed: bytes, message: str) -> None:
    content = blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.replace(b'"data_offsets":[0,4]', changed))
    said = both(content + bytes(8))
    assert isinstance(said, str)
    assert message in said


def test_an_error_deep_in_the_header_names_its_byte() -> None:
    found, size = entries(200, "é{}")
    found["é150"]["shape"] = [-1]
    content = blob(found, size)
    said = both(content)
    place = content.index('"é150"'.encode())
    assert said.startswith(f"x, byte {place}: tensor 'é150': expected dimensions")


def test_a_rank_beyond_reason_is_refused_and_a_great_product_is_not_multiplied_out() -> None:
    shape = [2**62] * 9_999
    for dims, message in (
        (shape, "over 2^47"),
        ([1] * 10_001, "the limit is 10000"),
        ([1] * 2_000_000, "the limit is"),
    ):
        said = both(blob({"a": {"dtype": "U8", "shape": dims, "data_offsets": [0, 1]}}, 1))
        assert message in said
    assert both(blob({"a": {"dtype": "U8", "shape": [*shape, 0], "data_offsets": [0, 0]}}))[2][0][1] == 0


def test_more_kinds_than_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "KINDS", 3)
    found, size = entries(60)
    both(blob(found, size))
    assert open_bytes(blob(found, size)).nbytes == size


def open_bytes(content: bytes) -> Weights:
    return Safetensors().open(InMemory(content))


def test_tensors_are_made_when_asked_for_and_stay_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {f"l.{i}.{kind}": np.full((i + 1,), i, np.float32) for i in range(5) for kind in ("weight", "bias")}
    write(Weights.of(values, meta={"k": "v"}), path)
    found = open(path)
    assert (list(found), len(found), "l.1.bias" in found, "l.9.bias" in found) == (list(values), 10, True, False)
    assert [w.name for w in found.values()] == [name for name, _ in found.items()] == list(values)
    assert [w.spec for w in found.values()] == list(found.specs()) == [found[name].spec for name in found]
    assert [w.origin for w in found.values()] == [found[name].origin for name in found]
    assert found.size == sum(v.size for v in values.values()) == found.nbytes // 4
    assert list(found.select(where("*.bias"))) == [name for name in values if name.endswith("bias")]
    assert list(found.with_meta(more="1")) == list(values)
    assert dict(found.with_meta(more="1").meta) == {"k": "v", "more": "1"}
    assert list(found.with_items(reversed(list(found.values())))) == list(reversed(values))
    assert found.settle()["l.3.bias"].array().tolist() == [3.0] * 4
    with pytest.raises(KeyError):
        found["nothing"]

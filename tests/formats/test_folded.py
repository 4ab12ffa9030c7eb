"""A header that lies deflated within the data: only where it pays, read as any other, and refused when damaged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from steelyard.codecs.entropy import Entropy
from steelyard.codecs.trellis import Trellis
from steelyard.core.packed import Packed, pack
from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats import open, write
from steelyard.formats._folded import LIMIT, USUAL, fold, unfold

RNG = np.random.default_rng(3)


def small(scale: int = 1) -> dict[str, Any]:
    x = RNG.normal(size=(16 * scale, 16)).astype(np.float32)
    return {
        "layer.weight": pack(x, Trellis(0.25)),
        "layer.bias": np.ones(16, np.float32),
        "count": pack(np.arange(40, dtype=np.int8), Entropy()),
        "empty": pack(np.zeros((0, 3), np.float32), Trellis()),
    }


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    at = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:at]), raw[at:]


def put(path: Path, outer: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(outer).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_small_file_has_its_header_within_the_data(tmp_path: Path) -> None:
    path, values = tmp_path / "x.safetensors", small()
    size = write(Weights.of(values, ties={"tied": "layer.weight"}, meta={"told": "by the user"}), path)
    outer, data = split(path)
    assert list(outer) == ["__metadata__", "all"]
    assert outer["all"]["shape"] == [len(data)]
    assert load_file(path)["all"].tobytes() == data, "any reader opens it"
    count = int(outer["__metadata__"]["steelyard"].removeprefix("folded "))
    inner = json.loads(unfold(data[:count]))
    assert size < len(json.dumps(inner, separators=(",", ":"))) + len(data) - count - 100
    again = open(path)
    assert list(again) == list(values)
    assert dict(again.meta) == {"told": "by the user"}
    assert again["tied"].name == "layer.weight"
    for name, x in values.items():
        assert np.array_equal(again[name].array(), x.array() if isinstance(x, Packed) else x), name
    write(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_only_where_something_is_packed_and_it_pays(tmp_path: Path) -> None:
    plain, large = tmp_path / "plain.safetensors", tmp_path / "large.safetensors"
    write(Weights.of({"a": np.ones(3, np.float32)}), plain)
    assert list(split(plain)[0]) == ["a"]
    write(Weights.of(small(1 << 12)), large)
    assert {"layer.bias", "layer.weight/stream"} <= set(split(large)[0])
    assert fold(b"{" + b" " * LIMIT + b"}", 0) is None
    assert fold(b"{}", 10) is None


def test_a_user_may_have_an_array_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = small() | {"all": np.arange(5, dtype=np.uint8)}
    write(Weights.of(values), path)
    assert open(path)["all"].array().tolist() == [0, 1, 2, 3, 4]


def test_cut_off_anywhere_it_is_refused(tmp_path: Path) -> None:
    path, cut = tmp_path / "x.safetensors", tmp_path / "cut.safetensors"
    write(Weights.of(small()), path)
    whole = path.read_bytes()
    for end in range(8, len(whole)):
        cut.write_bytes(whole[:end])
        with pytest.raises(FormatError, match="cut"):
            open(cut)


def deflated(text: bytes) -> bytes:
    found = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, USUAL)
    return found.compress(text) + found.flush()


def replaced(text: bytes) -> Callable[[dict[str, Any], bytes], bytes]:
    """The deflated header is that of `text`."""

    def change(outer: dict[str, Any], data: bytes) -> bytes:
        count = int(outer["__metadata__"]["steelyard"].removeprefix("folded "))
        inner = deflated(text)
        outer["__metadata__"]["steelyard"] = f"folded {len(inner)}"
        return inner + data[count:]

    return change


def told(text: str) -> Callable[[dict[str, Any], bytes], bytes]:
    def change(outer: dict[str, Any], data: bytes) -> bytes:
        outer["__metadata__"]["steelyard"] = text
        return data

    return change


def renamed(outer: dict[str, Any], data: bytes) -> bytes:
    outer["other"] = outer.pop("all")
    return data


def more(outer: dict[str, Any], data: bytes) -> bytes:
    outer["__metadata__"]["mine"] = "x"
    return data


def flipped(_outer: dict[str, Any], data: bytes) -> bytes:
    return bytes([data[0] ^ 7]) + data[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (told("folded"), "expected JSON"),
        (told("folded x"), "expected the bytes of a folded header"),
        (told("folded 0"), "expected the bytes of a folded header"),
        (told("folded -4"), "expected the bytes of a folded header"),
        (told("folded 9999999"), "expected the bytes of a folded header"),
        (told("folded 1000000"), "needs one array"),
        (told("folded 20"), "damaged|does not end"),
        (renamed, "needs one array"),
        (more, "needs one array"),
        (flipped, "damaged|does not end|in the folded header"),
        (replaced(b"{"), "in the folded header"),
        (replaced(b""), "in the folded header"),
        (replaced(b"\xff{}"), "in the folded header"),
        (replaced(b"{}" + b" " * LIMIT), "longer than 1 MiB"),
        (replaced(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "follow after the last"),
        (
            replaced(b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}'),
            "ends at byte \\d+, the data before the checksum at",
        ),
        (replaced(b'{"__metadata__":{"steelyard":"folded 9"}}'), "follow after|expected JSON"),
    ],
)
def test_what_is_damaged_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], bytes], bytes], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    write(Weights.of(small()), path)
    outer, data = split(path)
    data = change(outer, data)
    for name in ("all", "other"):
        if name in outer:
            outer[name] |= {"shape": [len(data)], "data_offsets": [0, len(data)]}
    with pytest.raises(FormatError, match=message) as caught:
        open(put(path, outer, data))
    assert str(caught.value).startswith(str(path))

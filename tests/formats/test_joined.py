"""Small packed tensors laid into one array: as they were, in few bytes, and checked when they are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from steelyard.codecs.entropy import Entropy
from steelyard.codecs.multiples import Multiples
from steelyard.core.packed import Packed, nest, pack
from steelyard.core.weights import Weights
from steelyard.edit.pack import Pack
from steelyard.errors import FormatError
from steelyard.formats import open, write
from steelyard.formats._folded import SUM, folded, unfold

RNG = np.random.default_rng(2)
ARRAYS = {
    name: (RNG.integers(-2, 3, shape) * (RNG.random(shape) < 0.3)).astype(np.float32) / 4
    for name, shape in {"a.weight": (30, 20), "a.bias": (30,), "b.weight": (5, 30), "b.bias": (5,)}.items()
}


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    count = folded(found.get("__metadata__", {}).get("steelyard"), path)
    return (found, data) if count is None else (json.loads(unfold(data[:count])), data[count:-SUM])


def test_small_parts_lie_in_one_array(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = write(Pack(Multiples())(Weights.of(ARRAYS)), path)
    found, data = header(path)
    assert list(found) == ["__metadata__", "joined"]
    told = json.loads(found["__metadata__"]["steelyard"])
    assert told["joined"]["joined"][:3] == ["multiples", "float32", "stream"]
    assert list(told) == ["version", "joined"], "the order is that of the weights: nothing to say"
    assert size == path.stat().st_size < 200 + len(data)
    again = open(path)
    assert list(again) == list(ARRAYS)
    for name, x in ARRAYS.items():
        assert np.array_equal(again[name].array(), x)
        assert isinstance(again[name].read(), Packed)
    assert sum(w.stored or 0 for w in again.values()) == len(data)
    write(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert load_file(path)["all"].tobytes()[:-SUM].endswith(data)


def test_beside_other_tensors_and_other_codecs(tmp_path: Path) -> None:
    large = np.arange(1 << 17, dtype=np.uint32)
    values = {
        "joined": large,
        "a.weight": pack(ARRAYS["a.weight"], Multiples()),
        "plain": np.ones(3),
        "codes": pack(np.arange(9, dtype=np.int8), Entropy()),
        "a.bias": pack(ARRAYS["a.bias"], Multiples()),
        "nested": pack(ARRAYS["b.weight"], nest(Multiples(), stream=Entropy())),
        "more codes": pack(np.arange(5, dtype=np.int8), Entropy()),
        "one": pack(np.arange(5, dtype=np.uint8), Entropy()),
    }
    path = tmp_path / "x.safetensors"
    write(Weights.of(values, ties={"tied": "a.bias"}), path)
    again = open(path)
    assert list(again) == list(values)
    assert again["tied"].name == "a.bias"
    for name, x in values.items():
        assert np.array_equal(again[name].array(), x.array() if isinstance(x, Packed) else x), name
    found, _ = header(path)
    assert [k for k in found if k.startswith("joined")] == ["joined", "joined by steelyard", "joined by steelyard~"]
    assert "one/stream" in found
    assert "nested/stream/stream" in found


def damaged(path: Path, change: Any) -> Path:
    found, data = header(path)
    told = json.loads(found["__metadata__"]["steelyard"])
    change(told["joined"], found)
    found["__metadata__"]["steelyard"] = json.dumps(told)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j, f: j["joined"][3]["a.bias"].__setitem__(0, 999), "expected .* bytes, found"),
        (lambda j, f: j["joined"][3]["a.bias"].__setitem__(0, -1), "expected the bytes and the shape"),
        (lambda j, f: j["joined"][3].__setitem__("a.bias", []), "expected the bytes and the shape"),
        (lambda j, f: j.__setitem__("there", j.pop("joined")), "'there' is missing"),
        (lambda j, f: j.__setitem__("again", j["joined"]), "joined twice"),
        (lambda j, f: j.__setitem__("joined", [1]), r"expected \[codec, dtype, part, tensors\]"),
        (lambda j, f: j["joined"].__setitem__(0, "bitmask"), "has no part 'stream'"),
        (lambda j, f: j["joined"].__setitem__(2, 7), "expected .codec, dtype, part"),
        (lambda j, f: j["joined"][3]["a.bias"].__setitem__(1, -4), "shape|negative|size"),
    ],
)
def test_what_is_told_is_checked(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write(Pack(Multiples())(Weights.of(ARRAYS)), path)
    with pytest.raises(FormatError, match=message) as caught:
        open(damaged(path, change))
    assert str(caught.value).startswith(str(path))

"""safetensors: hostile headers, the reference library as oracle, and how the bytes lie."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from steelyard.codecs import CODECS
from steelyard.core.packed import nest, pack
from steelyard.core.spec import DTYPES
from steelyard.core.weights import Weights
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open, source, write

from hostile_safetensors import HOSTILE, LAXER, VALID, blob, entry


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_error_that_names_file_and_place(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content, message = HOSTILE[case]
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.offset is not None or case == "reserved key" or "surrogate" in case
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_the_reference_library_refuses_them_as_well_unless_it_is_laxer(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case][0])
    if case in LAXER:
        safetensors.safe_open(path, "np")
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, "np")


@pytest.mark.parametrize("case", VALID)
def test_what_is_odd_and_in_order_opens_as_in_the_reference_library(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID[case])
    found = open(path)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(found)
        assert (file.metadata() or {}) == dict(found.meta)
        for name, item in found.items():
            assert tuple(file.get_slice(name).get_shape()) == item.spec.shape


def test_valid_but_extreme_files_open_at_once_and_fail_on_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for shape in ([0, 2**62, 2**62], [1] * 1000 + [0]):
        path.write_bytes(blob(entry(shape=shape, data_offsets=[0, 0])))
        assert open(path)["a"].spec.shape == tuple(shape)
        with pytest.raises(FormatError, match="does not fit into memory"):
            open(path)["a"].array()
    size = 2**40
    path.write_bytes(blob(entry(dtype="U8", shape=[size], data_offsets=[0, size])))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert open(path).size == size


def test_opening_reads_the_length_and_the_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write(Weights.of({"a": np.zeros(1000)}), path)
    reads: list[tuple[int, int]] = []

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            reads.append((self.tell(), len(buffer)))
            return super().readinto(buffer)

    monkeypatch.setattr(source.io, "FileIO", Counting)
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    from steelyard.formats.safetensors import Safetensors

    Safetensors().open(source.LocalFile.of(path))
    assert reads == [(0, 8), (8, header)]


def test_what_we_write_the_reference_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    values = {
        "u8": rng.integers(0, 256, (3, 5), np.uint8),
        "f64": rng.normal(size=7),
        "scalar": np.array(2, np.int16),
        "empty": np.zeros((0, 4), np.float32),
        "bool": np.array([True, False, True]),
        "c64": np.complex64([1 + 2j]),
        "u64": np.uint64([2**64 - 1]),
    }
    write(Weights.of(values, meta={"k": "v"}), path)
    found = load_file(path)
    assert set(found) == set(values)
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"k": "v"}


# the reference library writes float8_e8m0fnu and does not read it
TORCH = [n for n, row in DTYPES.items() if row.safetensors and row.torch and n != "float8_e8m0fnu"]


@pytest.mark.parametrize("name", TORCH)
def test_torch_types_lie_as_the_reference_library_expects(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    array = np.arange(5).astype(DTYPES[name].numpy)
    write(Weights.of({"odd": np.zeros(3, np.int8), "x": array}), path)
    found = load_torch(path)["x"]
    assert str(found.dtype) == f"torch.{name}"
    assert found.data_ptr() % found.element_size() == 0
    assert found.to(torch.complex128).tolist() == [complex(v) for v in array.astype(np.complex128)]


def test_what_the_reference_library_writes_we_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.int64([[1]]), "z": np.zeros((2, 0), np.uint8)}
    save_file(values, path, {"made": "elsewhere"})
    found = open(path)
    assert dict(found.meta) == {"made": "elsewhere"}
    assert set(found) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name].array(), value)
    tensors = {"w": torch.arange(4).to(torch.bfloat16), "f": torch.ones(2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(tensors, path)
    assert open(path)["w"].array().tolist() == [0, 1, 2, 3]
    assert open(path)["f"].array().dtype == ml_dtypes.float8_e4m3fn


def test_whatever_we_accept_the_reference_library_accepts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(Weights.of({"a": np.float32([1, 2]), "b": np.int8([[3]]), "c": np.zeros((0,))}, meta={"k": "v"}), path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(3)
    alphabet = b'0123456789-.eE[]{}",: abFIU\\\x00\xff'
    accepted = 0
    for _ in range(500):
        at = rng.randrange(8 + header)
        path.write_bytes(whole[:at] + bytes([rng.choice(alphabet)]) + whole[at + 1 :])
        try:
            found = open(path)
        except SteelyardError:
            continue
        accepted += 1
        with safetensors.safe_open(path, "np") as file:
            assert set(file.keys()) == set(found)
    assert accepted > 20


def test_float4_lies_two_to_a_byte_low_half_first(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({"a": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, b"\x21\xf7"))
    array = open(path)["a"].array()
    assert array.astype(float).tolist() == [[0.5, 1.0], [6.0, -6.0]]
    write(open(path), tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes()[-2:] == b"\x21\xf7"
    with safetensors.safe_open(tmp_path / "y.safetensors", "np") as file:
        assert file.get_slice("a").get_dtype() == "F4"
    with pytest.raises(FormatError, match="pad it"):
        write(Weights.of({"a": array[0, :1]}), path)


def test_float6_is_listed_and_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"))
    assert open(path)["a"].spec.nbytes == 3
    with pytest.raises(FormatError, match="no standard says"):
        open(path)["a"].array()


def test_packed_tensors_open_elsewhere_as_their_parts(tmp_path: Path) -> None:
    x = np.where(np.arange(1 << 16) % 3 == 0, np.arange(1 << 16) % 4, 0).astype(np.float32).reshape(256, 256)
    plan = nest(CODECS["bitmask"](), values=CODECS["palette"](k=4))
    path = tmp_path / "x.safetensors"
    write(Weights.of({"w": pack(x, plan), "b": np.ones(5000, np.float32)}), path)
    parts = load_file(path)
    assert "w" not in parts
    assert all(key == "b" or key.startswith("w/") for key in parts)
    found = open(path)
    np.testing.assert_array_equal(found["w"].array(), x)
    assert found["w"].stored == sum(part.nbytes for key, part in parts.items() if key != "b")


def test_one_part_belongs_to_one_tensor(tmp_path: Path) -> None:
    layout = ["bits", "uint8", [8], {"stream": "s"}]
    own = json.dumps({"version": 1, "packed": {"a": layout, "b": layout}})
    stream = {"s": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({"__metadata__": {"steelyard": own}, **stream}, b"1"))
    with pytest.raises(FormatError, match="belongs to 'a' already"):
        open(path)


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="reserved"):
        write(Weights.of({}, meta={"steelyard": "x"}), tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="__metadata__"):
        write(Weights.of({"__metadata__": np.zeros(1)}), tmp_path / "x.safetensors")


def test_the_header_is_small_and_the_data_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert write(Weights.of({"a": np.float32([1])}), path) == 8 + 56 + 4
    assert path.read_bytes()[8:64] == b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '


def test_blocks_read_a_part_of_a_tensor_into_one_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = np.arange(10, dtype=np.float32).reshape(2, 5)
    write(Weights.of({"a": np.zeros(3), "b": values, "empty": np.zeros((0, 2)), "f": np.float32(2)}), path)
    found = open(path)
    assert [block.tolist() for block in found["b"].blocks(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(found["empty"].blocks(4)) == []
    assert [block.tolist() for block in found["f"].blocks(4)] == [[2]]
    first, second = (block.__array_interface__["data"] for block in found["a"].blocks(2))
    assert first == second
    assert [b.tolist() for b in found["b"].then(lambda x: -x).blocks(6)] == [[0, -1, -2, -3, -4, -5], [-6, -7, -8, -9]]

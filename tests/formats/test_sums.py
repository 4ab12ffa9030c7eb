"""Bytes of packed tensors that are not those that were written are refused, whichever they are; and lost headers told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import steelyard as sy
from steelyard.errors import DamageError, FormatError, SteelyardError
from steelyard.formats.manifest import JOINED
from steelyard.formats.sharded import Sharded

RNG = np.random.default_rng(5)
NAMES = ("a.weight", "b.weight", "a.bias", "b.bias")


def weights(scale: int) -> sy.Weights:
    """Packed tensors, of which two are of one codec and short, and a plain one."""
    x = RNG.normal(size=(8 * scale, 16)).astype(np.float32)
    nested = sy.nest(sy.Bitmask(), mask=sy.Entropy(), values=sy.nest(sy.Palette(4), codes=sy.Entropy()))
    small = [sy.pack(np.arange(20 + i, dtype=np.int8), sy.Entropy()) for i in range(2)]
    held = [sy.pack(x, sy.Affine(4, group=8)), sy.pack(np.where(x > 1, x, 0), nested), *small]
    return sy.Weights.of({**dict(zip(NAMES, held, strict=True)), "plain": np.ones(9, np.float32)})


def split(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data starts."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), start


def test_a_bit_that_flips_anywhere_in_a_small_file_is_noticed(tmp_path: Path) -> None:
    path, bad = tmp_path / "x.safetensors", tmp_path / "bad.safetensors"
    sy.write(weights(1), path)
    raw, (header, start) = path.read_bytes(), split(path)
    assert list(header) == ["__metadata__", "all"]
    for at in range(start, len(raw)):
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(FormatError) as caught:
            sy.open(bad).arrays()
        assert str(caught.value).startswith(str(bad))
    bad.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"not those that were written: their CRC-32 is .*; fetch the file again"):
        sy.open(bad).arrays()
    assert sy.open(path).arrays()["plain"].tolist() == [1] * 9


def test_the_sum_of_a_small_file_takes_four_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = sy.write(weights(1), path)
    header, start = split(path)
    assert header["all"]["shape"] == [size - start]
    count = int(header["__metadata__"]["steelyard"].removeprefix("folded "))
    assert size == start + count + sum(item.stored for item in sy.open(path).values()) + 4


def refused(item: sy.Weight) -> str | None:
    """What is said against a tensor when it is read."""
    try:
        item.array()
    except DamageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_large_file_each_part_of_a_packed_tensor_is_checked_when_it_is_read(tmp_path: Path, sharded: bool) -> None:
    path, whole = tmp_path / "x.safetensors", weights(1 << 12)
    if sharded:
        sy.write(whole, tmp_path / "x.safetensors.index.json", Sharded(1 << 30))
        path = tmp_path / "x-00001-of-00001.safetensors"
    else:
        sy.write(whole, path)
    source = tmp_path / "x.safetensors.index.json" if sharded else path
    assert all(np.array_equal(x, whole[n].array()) for n, x in sy.open(source).arrays().items())
    raw, (header, start) = path.read_bytes(), split(path)
    assert len(header) > 6
    seen = set()
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = (start + at for at in entry["data_offsets"])
        for at in (begin, end - 1):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
            found = {name: refused(item) for name, item in sy.open(source).items()}
            bad = {name: said for name, said in found.items() if said is not None}
            assert len(bad) == (key != "plain")  # a plain tensor has no sum, as in other safetensors files
            for name, said in bad.items():
                assert said.startswith(f"{path} @")
                assert f"'{name}': the bytes of the part" in said
                assert said.endswith("; fetch the file again")
            seen.update(bad)
    assert seen == set(NAMES)


def test_a_damaged_source_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    from steelyard.cli import main

    path, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for scale in (1, 1 << 12):
        sy.write(weights(scale), path)
        raw = bytearray(path.read_bytes())
        raw[-40 if scale == 1 else split(path)[1] + split(path)[0]["a.weight/codes/stream"]["data_offsets"][0]] ^= 1
        path.write_bytes(raw)
        for verb in (["convert"], ["quantize", "--bits", "2"], ["prune", "--fraction", "0.5"]):
            assert main([verb[0], str(path), str(target), *verb[1:]]) == 2
            assert not target.exists()


def damaged(path: Path, change: Any) -> None:
    """The text of a large file changed, on purpose: without the sum of all that it says."""
    raw, (header, start) = path.read_bytes(), split(path)
    told = json.loads(header["__metadata__"]["steelyard"])
    told.pop("sum", None)
    change(told)
    header["__metadata__"]["steelyard"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


SCALE = "scale"


def put(value: Any) -> Any:
    def change(told: dict[str, Any]) -> None:
        told["packed"]["a.weight"][3][SCALE] = value

    return change


@pytest.mark.parametrize("value", [-1, 1 << 32, [SCALE, 1, 2], [SCALE], [7, 7], ["", "x"], ["", None], ["", -1], 1.5])
def test_what_is_no_sum_is_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.safetensors"
    sy.write(weights(1 << 12), path)
    damaged(path, put(value))
    with pytest.raises(FormatError, match=r"expected a CRC-32 from 0 to|expected \[codec, dtype, shape"):
        sy.open(path)


@pytest.mark.parametrize("sums", [[], [1], {}, 7, [1, 2, 3], [1, -2], [1, None, 3], ["1", "2"]])
def test_sums_of_joined_tensors_are_checked(tmp_path: Path, sums: Any) -> None:
    path = tmp_path / "x.safetensors"
    sy.write(weights(1 << 12), path)
    damaged(path, lambda told: told["joined"][JOINED].__setitem__(4, sums))
    with pytest.raises(FormatError, match="expected"):
        sy.open(path)


def test_a_sum_may_stand_beside_any_key_and_may_lack(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", weights(1 << 12)
    sy.write(whole, path)
    damaged(path, put(""))
    damaged(path, lambda told: told["joined"][JOINED].pop())
    assert np.array_equal(sy.open(path)["a.weight"].array(), whole["a.weight"].array())
    assert np.array_equal(sy.open(path)["b.bias"].array(), whole["b.bias"].array())
    damaged(path, put(["a.weight/scale", 12345]))
    with pytest.raises(DamageError, match=r"'a.weight': the bytes of the part 'scale' .* expected 00003039"):
        sy.open(path)["a.weight"].array()


@pytest.mark.parametrize("key", ["Steelyard", "STEELYARD", " steelyard"])
@pytest.mark.parametrize("scale", [1, 1 << 12])
def test_a_key_that_was_misspelled_is_told(tmp_path: Path, scale: int, key: str) -> None:
    path = tmp_path / "x.safetensors"
    sy.write(weights(scale), path)
    raw, (header, start) = path.read_bytes(), split(path)
    header["__metadata__"][key] = header["__metadata__"].pop("steelyard")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    with pytest.raises(FormatError, match=f"'{key}' has what is written as 'steelyard' in the metadata: rename it"):
        sy.open(path)


def test_metadata_that_another_program_has_lost_are_told(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    sy.write(weights(1), path)
    save_file(load_file(path), other)  # which keeps no metadata
    with pytest.raises(
        FormatError, match=r"the metadata that tell of it are lost: write 'steelyard': '(folded \d+)'"
    ) as e:
        sy.open(other)
    told = str(e.value).split("'steelyard': '")[1].split("'")[0]
    save_file(load_file(path), other, {"steelyard": told})
    assert list(sy.open(other)) == [*NAMES, "plain"]


def test_what_only_looks_so_opens(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (np.arange(200, dtype=np.uint8), np.zeros(9, np.uint8), np.zeros(0, np.uint8), RNG.bytes(70_000)):
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        save_file({"all": array}, path, {"Steelyard": "a company", "steelyard-old": '{"version":1}'})
        assert sy.open(path)["all"].array().tobytes() == array.tobytes()
    save_file({"all": np.ones(3, np.float32)}, path)
    assert sy.open(path)["all"].array().tolist() == [1, 1, 1]
    save_file({"all": np.ones(3, np.float32)}, path, {"steelyard": "{}"})
    with pytest.raises(SteelyardError, match="version 1"):
        sy.open(path)

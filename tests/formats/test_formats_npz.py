"""npz and npy: numpy as oracle, no pickles, damaged archives."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats import open, write


def test_what_we_write_numpy_reads(tmp_path: Path) -> None:
    values = {"a/b": np.arange(6.0).reshape(2, 3), "s": np.array(1, np.int8), "e": np.zeros((0, 2), np.complex64)}
    path = tmp_path / "x.npz"
    write(Weights.of(values), path)
    with np.load(path) as found:
        assert found.files == list(values)
        for name, value in values.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
    write(Weights.of({"x": np.float16([1, 2])}), tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").tolist() == [1, 2]
    expected = io.BytesIO()
    np.save(expected, np.float16([1, 2]))
    assert (tmp_path / "x.npy").read_bytes()[128:] == expected.getvalue()[128:]


def test_types_that_numpy_lacks_open_there_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write(Weights.of({"a": np.array([1, 2], ml_dtypes.bfloat16), "b": np.array([1], ml_dtypes.int4)}), path)
    with np.load(path) as found:
        assert found["a"].view(ml_dtypes.bfloat16).tolist() == [1, 2]
        assert found["b"].tobytes() == b"\x01"
        assert b'"bfloat16"' in found["steelyard.json"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_what_numpy_writes_we_read(save: object, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    values = {
        "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        "big": np.arange(3, dtype=">i4"),
        "bool": np.array([True, False]),
        "scalar": np.float32(3),
        "zeros": np.zeros(10_000, np.int64),
    }
    save(path, **values)  # type: ignore[operator]
    found = open(path)
    assert list(found) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name].array(), value)
    for name in ("fortran", "big"):
        np.save(tmp_path / f"{name}.npy", values[name])
        np.testing.assert_array_equal(open(tmp_path / f"{name}.npy")[name].array(), values[name])


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.array([Bomb()], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=objects)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(FormatError, match="nothing is ever unpickled"):
            open(tmp_path / name).arrays()


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + header + data


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"


def test_an_archive_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"

    def archive(**members: bytes) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)

    archive(**{"a.npy": npy(GOOD, b"1234"), "b.txt": b"hello"})
    with pytest.raises(FormatError, match=r"b\.txt"):
        open(path)
    archive(**{"a.npy": npy(GOOD, b"1234"), "b.npy": npy(GOOD, b"5678")})
    path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    with pytest.raises(FormatError, match="twice"):
        open(path)
    archive(**{"a.npy": npy(GOOD, b"1234"), "steelyard.json": b'{"version":1,"dtypes":{"b":"bfloat16"}}'})
    with pytest.raises(FormatError, match="'b'"):
        open(path)
    archive(**{"a.npy": npy(GOOD, b"1234"), "steelyard.json": b'{"version":1,"dtypes":{"a":"bfloat16"}}'})
    with pytest.raises(FormatError, match="bfloat16"):
        open(path)
    archive(
        **{"a.npy": npy(GOOD.replace(b"<f4", b"|V2"), b"12"), "steelyard.json": b'{"version":1,"dtypes":{"a":"int4"}}'}
    )
    with pytest.raises(FormatError, match="2 bytes cannot be int4"):
        open(path)


def test_a_flipped_bit_of_the_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write(Weights.of({"a": np.arange(100)}), path)
    whole = bytearray(path.read_bytes())
    at = whole.index(np.int64(50).tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FormatError, match="CRC"):
        open(path).arrays()


def test_a_bomb_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1000, np.uint8))
    whole = bytearray(path.read_bytes())
    directory = whole.rindex(b"PK\x01\x02")
    whole[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(FormatError, match="cannot unpack from"):
        open(path)


def test_npy_holds_one_plain_tensor_of_its_own_name(tmp_path: Path) -> None:
    one = np.zeros(1)
    for weights, message in [
        (Weights.of({}), "one plain tensor"),
        (Weights.of({"x": one, "y": one}), "one plain tensor"),
        (Weights.of({"x": one}, meta={"k": "v"}), "metadata"),
        (Weights.of({"y": one}), "expected 'y' before .npy"),
        (Weights.of({"x": np.zeros(1, ml_dtypes.bfloat16)}), "holds no bfloat16"),
    ]:
        with pytest.raises(FormatError, match=message):
            write(weights, tmp_path / "x.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_deflated_member_is_read_in_blocks_and_in_any_order(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 50, (700, 1000)).astype(np.int32)
    np.savez_compressed(tmp_path / "w.npz", w=values)
    weight = open(tmp_path / "w.npz")["w"]
    assert weight.fill is not None
    for size in (1, 997, 65_536, values.size):
        first = 0 if size > 1 else values.size - 5
        blocks = [block.copy() for block in weight.blocks(size, first)]
        assert np.array_equal(np.concatenate(blocks), values.reshape(-1)[first:])
    for rows in (slice(600, 602), slice(0, 3), slice(698, 700), slice(300, 301)):
        assert np.array_equal(np.asarray(weight[rows]), values[rows])


def test_a_damaged_deflated_member_is_told_when_it_is_read_in_blocks(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 50, 200_000).astype(np.int32)
    np.savez_compressed(tmp_path / "w.npz", w=values)
    raw = bytearray((tmp_path / "w.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "bad.npz").write_bytes(raw)
    with pytest.raises(FormatError, match="tensor 'w'"):
        list(open(tmp_path / "bad.npz")["w"].blocks(1000))


def test_blocks_of_a_bomb_are_unpacked_once_by_turns_and_hold_no_more_than_themselves(tmp_path: Path) -> None:
    """100 MB of zeros in 100 kB; two readers that take the blocks by turns go on from each other's places."""
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros(25_000_000, np.float32))
    weight, size = open(tmp_path / "zeros.npz")["w"], 1 << 18
    fill, unpacked = weight.fill, 0
    assert fill is not None
    honest = fill._next

    def counted(*args: object) -> bytes:
        nonlocal unpacked
        block = honest(*args)
        unpacked += len(block)
        return block

    fill._next = counted
    block = np.empty(size, np.float32)
    tracemalloc.start()
    for first in range(0, 25_000_000 - 2 * size, 2 * size):
        for at in (first + size, first):  # the later one first
            fill(at, block)
            assert not block.any()
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert unpacked < 3 * 100e6

"""Hostile npz and npy files: headers, bombs, archives that lie, through the library and the command line; mutations."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open

from jail import judged


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + header + data


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)", more: str = "") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {more}}}".encode(), b"12345678")


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


GOOD = described()
NPY: dict[str, tuple[bytes, str]] = {
    "seven bytes": (b"\x93NUMPY\x01", "version 1 to 3"),
    "version 0": (npy(b"", version=b"\x00\x00"), "version 1 to 3"),
    "version 4": (npy(b"", version=b"\x04\x00"), "version 1 to 3"),
    "a header of 4 GB": (npy(b"{}", version=b"\x02\x00", length=2**32 - 1), "the limit is 10000"),
    "a header beyond the file": (npy(b"{}", length=9000), "the file ends before"),
    "objects": (saved(np.array([Bomb()], dtype=object)), "nothing is ever unpickled"),
    "objects in a record": (described("[('a', '|O')]"), "expected descr, fortran_order and shape"),
    "text": (described("'<U4'"), "found elements of '<U4'"),
    "dates": (described("'<M8[s]'"), "found elements of"),
    "opaque bytes": (described("'|V2'"), "opaque"),
    "1 << 62": (described(shape="(1<<62,)"), "expected descr, fortran_order and shape"),
    "2^62": (described(shape="(4611686018427387904,)"), "takes 18446744073709551616 bytes"),
    "2^62 twice": (described(shape="(4611686018427387904, 4611686018427387904)"), "takes .* bytes"),
    "2^62 twice and 0": (described(shape="(0, 4611686018427387904, 4611686018427387904)"), "takes 0 bytes, 8 follow"),
    "4000 digits": (described(shape=f"({'9' * 4000},)"), "dimensions from 0"),
    "negative": (described(shape="(-2,)"), "dimensions from 0"),
    "float": (described(shape="(2.0,)"), "expected descr"),
    "a number as shape": (described(shape="(2)"), "dimensions from 0"),
    "rank 1000": (described(shape=f"({'1,' * 1000})"), "up to 64 dimensions"),
    "a call": (npy(b"__import__('os').mkdir('executed')"), "expected descr"),
    "deep brackets": (npy(b"(" * 9999), "expected descr"),
    "deep lists": (npy(b"{'descr':" + b"[" * 9000), "expected descr"),
    "many signs": (npy(b"{'shape':" + b"-" * 9000 + b"1}"), "expected descr"),
    "a giant power": (npy(b"{'shape': (9**9**9**9,)}"), "expected descr"),
    "many spaces": (npy(b"{" + b" " * 9998), "expected descr"),
    "many commas": (npy(b"{'shape': (" + b"," * 9900 + b")}"), "expected descr|dimensions"),
    "a key twice": (described(more="'shape': (2,)"), "shape is given twice"),
    "a key more": (described(more="'x': 1"), "expected descr"),
    "a warning of Python": (described(r"'\d'"), "expected descr"),
    "Fortran order as a number": (described(order="1"), "expected descr"),
    "cut off": (GOOD[:-1], "takes 8 bytes, 7 follow"),
    "trailing bytes": (GOOD + b"PK", "takes 8 bytes, 10 follow"),
}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def patched(content: bytes, signature: bytes, offset: int, new: bytes) -> bytes:
    """`content` with `new` at `offset` of the last record that begins with `signature`."""
    at = content.rindex(signature) + offset
    return content[:at] + new + content[at + len(new) :]


ONE = zipped({"a.npy": GOOD})
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
BIG = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**9},), }}".encode(), bytes(2_000_000))
NPZ: dict[str, tuple[bytes, str]] = {
    "no directory": (ONE[: ONE.index(CENTRAL)], "no end record"),
    "bytes before": (b"\x7fELF" + bytes(60) + ONE, "unknown format|begins|bytes lie before"),
    "bytes behind": (ONE + b"hello", "no end record|follow after the archive"),
    "another member": (zipped({"a.npy": GOOD, "b.txt": b"hello"}), r"'b\.txt' is no array"),
    "a member twice": (zipped({"a.npy": GOOD, "b.npy": GOOD}).replace(b"b.npy", b"a.npy"), "twice"),
    "encrypted": (patched(ONE, CENTRAL, 8, b"\x01\x00"), "is encrypted"),
    "packed with LZMA": (zipped({"a.npy": GOOD}, zipfile.ZIP_LZMA), "packed by method 14"),
    "another name in front": (patched(ONE, LOCAL, 30, b"z.npy"), "another name, size, method or flag"),
    "another size in front": (patched(ONE, LOCAL, 22, b"\xff\0\0\0"), "another name, size, method or flag"),
    "another method in front": (patched(ONE, LOCAL, 8, b"\x08\0"), "another name, size, method or flag"),
    "no header in front": (patched(ONE, LOCAL, 0, b"XXXX"), "unknown format|instead of a local header"),
    "a size of 4 GB": (patched(patched(ONE, CENTRAL, 20, b"\xfe\xff\xff\xff"), CENTRAL, 24, b"\xfe\xff\xff\xff"), "'a"),
    "zip64 sizes that are not there": (patched(ONE, CENTRAL, 24, b"\xff" * 4), "lacks its zip64 sizes"),
    "a member behind the file": (patched(ONE, CENTRAL, 42, b"\xf0\xff\xff\x7f"), "does not lie in front|begin"),
    "65,000 members announced": (patched(ONE, END, 8, b"\xe8\xfd\xe8\xfd"), "announces 65000 members"),
    "a directory of 4 GB": (patched(ONE, END, 12, b"\xf0\xff\xff\xff"), "directory ends at byte"),
    "a bomb": (patched(zipped({"a.npy": BIG}, zipfile.ZIP_DEFLATED), CENTRAL, 24, struct.pack("<L", 10**9 + 67)), "'a"),
    "another checksum": (patched(ONE, CENTRAL, 16, b"1234"), "checksum"),
    "a manifest of zeros": (zipped({"a.npy": GOOD, "steelyard.json": bytes(1000)}), "expected JSON"),
    "objects": (zipped({"a.npy": saved(np.array([Bomb()], dtype=object))}), "nothing is ever unpickled"),
    "a header that is deflated and cut": (zipped({"a.npy": GOOD[:50]}, zipfile.ZIP_DEFLATED), "the file ends before"),
    "many members": (zipped({f"{n}.npy": b"" for n in range(30_000)}), "version 1 to 3"),
}
CASES = {f"{name}.npy": case for name, case in NPY.items()} | {f"{name}.npz": case for name, case in NPZ.items()}


def test_what_the_cases_are_made_of_is_valid(tmp_path: Path) -> None:
    for suffix, content in ((".npy", GOOD), (".npz", ONE), (".npz", zipped({"a.npy": GOOD}, zipfile.ZIP_DEFLATED))):
        (tmp_path / f"a{suffix}").write_bytes(content)
        assert open(tmp_path / f"a{suffix}")["a"].array().tobytes() == b"12345678"


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_an_error(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = CASES[case]
    path = tmp_path / f"x{case[-4:]}"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        open(path).arrays()
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(path) in captured.err
    assert os.listdir(tmp_path) == [path.name]


def test_all_of_them_take_little_time_and_memory_and_do_nothing_else(tmp_path: Path) -> None:
    paths = {case: tmp_path / f"{n}{case[-4:]}" for n, case in enumerate(CASES)}
    for case, path in paths.items():
        path.write_bytes(CASES[case][0])
    verdicts = judged(paths.values(), memory=60_000_000)
    for case, path in paths.items():
        verdict = verdicts[path]
        assert not verdict.untyped, (case, verdict)
        assert verdict.refusal, case
        assert verdict.seconds < 1.5, (case, verdict.seconds)  # a second on a machine that is not busy


def test_a_header_that_is_allowed_is_read(tmp_path: Path) -> None:
    for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        header = b"{'shape':(1 , 2),\"descr\" : '>f4','fortran_order':True}\n"
        (tmp_path / "x.npy").write_bytes(npy(header, np.array([1, 2], ">f4").tobytes(), version))
        assert open(tmp_path / "x.npy")["x"].array().tolist() == [[1, 2]]
    (tmp_path / "x.npy").write_bytes(npy(b"{'shape':(),'descr':'|b1','fortran_order':False,}", b"\1"))
    assert open(tmp_path / "x.npy")["x"].array() == np.array(True)


def test_names_that_lead_out_are_only_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(zipped({"../../a.npy": GOOD, "/etc/x.npy": GOOD, "red\x1b[31m\n.npy": GOOD}))
    assert list(open(path)) == ["../../a", "/etc/x", "red\x1b[31m\n"]
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["x.npz"]


def test_parts_are_read_where_they_lie(tmp_path: Path) -> None:
    values = {
        "plain": np.arange(1000, dtype=np.float32).reshape(10, 100),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(9, dtype=">i4"),
    }
    np.savez(tmp_path / "x.npz", **values)
    np.save(tmp_path / "plain.npy", values["plain"])
    weights = open(tmp_path / "x.npz")
    for name, value in values.items():
        assert (weights[name].fill is not None) == (name == "plain")
        blocks = [block.copy() for block in weights[name].blocks(7)]
        assert np.concatenate(blocks).tolist() == value.reshape(-1).tolist()
    item = open(tmp_path / "plain.npy")["plain"]
    assert item.fill is not None
    assert np.concatenate([block.copy() for block in item.blocks(7)]).tolist() == values["plain"].reshape(-1).tolist()


def fixed(data: bytearray) -> None:
    """Make the checksums of the members right again, so that a mutation of the values reaches the reader."""
    at = data.find(CENTRAL)
    while 0 <= at <= len(data) - 46:
        packed, size, names = struct.unpack_from("<LLH", data, at + 20)
        (header,) = struct.unpack_from("<L", data, at + 42)
        if packed == size and header + 30 <= len(data):
            inner, extra = struct.unpack_from("<HH", data, header + 26)
            begin = header + 30 + inner + extra
            struct.pack_into("<L", data, at + 16, zlib.crc32(data[begin : begin + size]))
        at = data.find(CENTRAL, at + 46 + names)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_mutations_are_refused_or_read(method: int, tmp_path: Path) -> None:
    whole = zipped(
        {"a.npy": GOOD, "b/c.npy": saved(np.asfortranarray(np.ones((2, 3)))), "d.npy": saved(np.int8(3))}, method
    )
    rng, path, refused = random.Random(2), tmp_path / "x.npz", []
    mutate: list[Callable[[bytearray, int], None]] = [
        lambda data, at: data.__setitem__(at, rng.randrange(256)),
        lambda data, at: data.__setitem__(at, rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x28, 0x27, 0x2C))),
        lambda data, at: data.__setitem__(slice(at, at + 4), b"\xff" * 4),
        lambda data, at: data.__delitem__(slice(at, at + rng.randrange(1, 9))),
        lambda data, at: data.__setitem__(slice(at, at), rng.randbytes(rng.randrange(1, 9))),
    ]
    for _ in range(2500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            rng.choice(mutate)(data, rng.randrange(len(data)))
        fixed(data)
        path.write_bytes(data)
        try:
            open(path).arrays()
        except SteelyardError as error:
            refused.append(str(error))
    assert 500 < len(refused) < 2500
    assert not [text for text in refused if not text.isprintable() or str(path) not in text or len(text) > 1000]


def test_ten_thousand_members_are_listed_in_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(zipped({f"layers.{n}.npy": GOOD for n in range(10_000)}))
    verdict = judged([path], memory=60_000_000)[path]  # reading all of them, too, takes no longer for each
    assert verdict.count == 10_000
    assert verdict.seconds < 5

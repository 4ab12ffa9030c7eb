"""Hostile HDF5 files: ways out, claims of size, bombs, through the library and the command line; truncations, mutations."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.errors import FormatError
from steelyard.formats import hdf5, open

from jail import judged

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py: pip install 'steelyard[formats]'")
SECRET = "secret.bin"


def external_storage(file: Any) -> None:
    file.create_dataset("w", (4,), "f4", external=[(SECRET, 0, 16)])


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("w", layout)


def raw_chunk(file: Any, content: bytes, shape: tuple[int, ...] = (1000,), **options: Any) -> None:
    found = file.create_dataset("w", shape, "f4", **{"chunks": shape, "compression": "gzip", **options})
    found.id.write_direct_chunk((0,) * len(shape), content)


def deep(file: Any) -> None:
    for _ in range(100):
        file = file.create_group("g")


def bad_name(file: Any) -> None:
    h5py.h5g.create(file.id, b"\xff\xfe")


BOMB = zlib.compress(bytes(50_000_000), 9)
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "external link": (
        lambda f: f.__setitem__("w", h5py.ExternalLink("/etc/passwd", "/x")),
        "'w': a link that leads out",
    ),
    "deeper external link": (
        lambda f: f.create_group("a/b").__setitem__("w", h5py.ExternalLink("../x.h5", "/x")),
        "'a/b/w': a link that leads out of the file",
    ),
    "external storage": (external_storage, "'w': its values lie in another file"),
    "virtual": (virtual, "'w': a virtual dataset"),
    "2^40 elements that were never written": (lambda f: f.create_dataset("w", (2**40,), "f4"), "0 lie in the file"),
    "2^62 elements in chunks": (
        lambda f: f.create_dataset("w", (2**31, 2**31), "i1", chunks=(1000, 1000)),
        "takes 4611686018427387904 bytes, 0 lie",
    ),
    "a chunk that claims 400 MB": (lambda f: raw_chunk(f, zlib.compress(b"x"), (10**8,)), "takes 400000000 bytes"),
    "a chunk of 400 MB for one element": (
        lambda f: raw_chunk(f, zlib.compress(b"x"), (1,), chunks=(10**8,), maxshape=(None,)),
        "chunks of .* take more than",
    ),
    "a chunk that inflates to 50 MB": (lambda f: raw_chunk(f, BOMB), "inflates to more than it holds"),
    "a chunk that inflates to little": (lambda f: raw_chunk(f, zlib.compress(b"x")), "a chunk of 4000 bytes has 1"),
    "a chunk that does not inflate": (lambda f: raw_chunk(f, b"hello"), "does not inflate"),
    "a chunk that is cut off": (lambda f: raw_chunk(f, zlib.compress(bytes(4000))[:-8]), "is cut off"),
    "missing chunks": (lambda f: raw_chunk(f, zlib.compress(bytes(40)), (1000,), chunks=(10,)), "100 chunks, found 1"),
    "deep groups": (deep, "groups lie more than 64 deep"),
    "a name that is no UTF-8": (bad_name, "is not UTF-8"),
}


def made(path: Path, make: Callable[[Any], None], **options: Any) -> Path:
    with h5py.File(path, "w", **options) as file:
        make(file)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = HOSTILE[case]
    path = made(tmp_path / "x.h5", make)
    with pytest.raises(FormatError, match=message) as caught:
        open(path).arrays()
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(path) in captured.err
    assert os.listdir(tmp_path) == ["x.h5"]


def test_all_of_them_take_little_time_and_memory_and_do_nothing_else(tmp_path: Path) -> None:
    (tmp_path / SECRET).write_bytes(bytes(100))
    paths = {case: made(tmp_path / f"{n}.h5", make) for n, (case, (make, _)) in enumerate(HOSTILE.items())}
    before = sorted(os.listdir(tmp_path))
    verdicts = judged(paths.values(), memory=100_000_000, imports=("h5py",))
    for case, path in paths.items():
        verdict = verdicts[path]
        assert not verdict.untyped, (case, verdict)
        assert verdict.refusal, case
        assert verdict.seconds < 1.5, (case, verdict.seconds)  # a second on a machine that is not busy
    assert sorted(os.listdir(tmp_path)) == before


def test_too_many_objects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "x.h5", lambda f: [f.create_group(f"{n}") for n in range(50)])
    assert len(open(path)) == 0
    monkeypatch.setattr(hdf5, "OBJECTS", 49)
    with pytest.raises(FormatError, match="more than 49 groups and datasets"):
        open(path)


def test_bytes_before_the_file_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "x.h5", lambda f: f.create_group("a"), userblock_size=512)
    with pytest.raises(FormatError, match="512 bytes lie before the file"):
        open(path)


@pytest.mark.parametrize("size", [0, 2**64 - 1, 2**40])
def test_a_heap_that_would_send_the_library_in_circles_is_refused(size: int, tmp_path: Path) -> None:
    path = made(tmp_path / "x.h5", lambda f: f.attrs.__setitem__("text", "hello"))
    data = bytearray(path.read_bytes())
    at = data.index(b"GCOL") + 16  # the first object: an index of 0 is that of the free space
    data[at : at + 16] = bytes(8) + size.to_bytes(8, "little")
    path.write_bytes(data)
    verdict = judged([path], memory=100_000_000, imports=("h5py",))[path]
    assert f"byte {at}: a global heap with an object of {size} bytes" in verdict.refusal


def test_a_text_that_is_longer_than_its_place_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = made(tmp_path / "x.h5", lambda f: f.attrs.__setitem__("text", "hello"))
    assert open(path).meta == {"text": "hello"}
    data = bytearray(path.read_bytes())
    at = data.index((5).to_bytes(4, "little") + data.index(b"GCOL").to_bytes(8, "little"))
    data[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"byte {at}: a text of 2147483648 bytes"):
        open(path)


def rich(file: Any) -> None:
    """A small file with all that is looked into."""
    file.attrs["layer_names"] = [b"a", b"b"]
    file.attrs["model_config"] = '{"class_name": "Sequential"}'
    file.create_group("a").attrs["weight_names"] = ["a/kernel:0"]
    file["a/a/kernel:0"] = np.arange(12, dtype=np.float32).reshape(3, 4)
    file.create_dataset("b/deflated", data=np.arange(60.0).reshape(6, 10), chunks=(4, 3), compression=1, shuffle=True)
    file["b/soft"] = h5py.SoftLink("/a")
    file["b/hard"] = file["a/a/kernel:0"]
    file["b/text"] = "hello"
    file["b/flag"] = np.array([True, False])


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_every_truncation_is_an_error_that_names_the_file(version: str, tmp_path: Path) -> None:
    whole = made(tmp_path / "x.h5", rich, libver=version).read_bytes()
    paths = [tmp_path / f"{count}.h5" for count in range(1, len(whole), 97)]
    for path in paths:
        path.write_bytes(whole[: int(path.stem)])
    for path, verdict in judged(paths, memory=200_000_000, imports=("h5py",)).items():
        assert not verdict.untyped, (path, verdict)
        assert str(path) in verdict.refusal


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_two_thousand_mutations_are_refused_or_read(version: str, tmp_path: Path) -> None:
    whole = made(tmp_path / "x.h5", rich, libver=version).read_bytes()
    rng, paths = random.Random(5), []
    for number in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            else:
                data[at : at + 8] = rng.choice(
                    (b"\xff" * 8, b"\0" * 8, rng.randbytes(8), len(data).to_bytes(8, "little"))
                )
        paths.append(tmp_path / f"{number}.h5")
        paths[-1].write_bytes(data)
    verdicts = judged(paths, memory=300_000_000, imports=("h5py",))
    assert len(verdicts) == len(paths)
    untyped = {path.stem: verdict for path, verdict in verdicts.items() if verdict.untyped}
    assert not untyped
    assert max(verdict.seconds for verdict in verdicts.values()) < 1.5  # a second on a machine that is not busy
    refused = [verdict for verdict in verdicts.values() if verdict.refusal]
    assert 50 < len(refused) < 1000
    assert not [verdict for verdict in refused if "\n" in verdict.refusal or str(tmp_path) not in verdict.refusal]

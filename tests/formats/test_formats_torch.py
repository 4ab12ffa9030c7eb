"""PyTorch checkpoints: equal to torch.load bit for bit, and every lie of a file is an error that names it."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import detect, open, write
from steelyard.formats._rebuild import TORCH

torch = pytest.importorskip("torch", reason="these tests compare with torch.load")

DTYPES = [name for name in TORCH if hasattr(torch, name)]


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """The names in order, and the bits of every tensor; aliases count as names."""
    found = open(path)
    assert {*found, *found.ties} == set(expected)
    for name, tensor in expected.items():
        array = found[name].array()
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        assert array.shape == tuple(tensor.shape), name
        assert found[name].spec.dtype.torch == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
        if found[name].fill is not None:
            blocks = [block.tobytes() for block in found[name].blocks(7)]
            assert b"".join(blocks) == array.tobytes(), name


def raw(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor of random bits."""
    kind = getattr(torch, dtype)
    count = int(np.prod(shape)) * kind.itemsize
    data = torch.randint(0, 2 if dtype == "bool" else 256, (count,), dtype=torch.uint8, generator=torch.manual_seed(1))
    return data.view(kind).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5), (1,)], ids=str)
def test_every_dtype_comes_out(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.pt", {"x": raw(dtype, *shape), "y": raw(dtype, 3)}
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        assert detect(path) == "torch"
        same(path, tensors)


def test_views_come_out_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    c = torch.randn(4, dtype=torch.complex64)
    d = torch.randn(4, dtype=torch.complex64)
    tensors = {
        "whole": base, "turned": base.permute(2, 0, 1), "row": base[1], "column": base[:, :, 2], "steps": base[::2, 1::2],
        "wide": base[0, 0].expand(6, 5), "windows": base.reshape(-1).unfold(0, 8, 3), "one": base[2, 3, 4],
        "none": base[:, :0], "conj": c.conj(), "neg": d.conj().imag, "unit": base[:, :1, :1],
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        same(tmp_path / "a.pt", tensors)


def test_identical_views_are_ties_and_others_are_tensors(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    copy = base.clone()
    torch.save({"a": base, "b": base, "c": base.t(), "d": copy, "e": base.view(2, 3), "f": base[1:]}, tmp_path / "a.pt")
    found = open(tmp_path / "a.pt")
    assert list(found) == ["a", "c", "d", "f"]
    assert dict(found.ties) == {"b": "a", "e": "a"}


def test_nested_objects_become_dotted_names_and_numbers_metadata(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "best": 0.5, "name": "née",
        "done": True, "nothing": None, "pair": (torch.ones(2), [torch.zeros(1), 3]), 5: torch.ones(1),
        "d": defaultdict(list, x=[torch.ones(3)]), "o": OrderedDict(y=torch.nn.Parameter(torch.ones(2))), "s": {1, 2},
        "numpy": np.float64(2.5), "shape": torch.Size([2, 3]), "device": torch.device("cpu"), "dtype": torch.float16,
        "bytes": b"\xff\x00",
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "a.pt")
    expected = {f"model.{k}": v for k, v in checkpoint["model"].items()}
    for index, state in checkpoint["optimizer"]["state"].items():
        expected |= {f"optimizer.state.{index}.{k}": v for k, v in state.items()}
    expected |= {"pair.0": torch.ones(2), "pair.1.0": torch.zeros(1), "5": torch.ones(1), "d.x.0": torch.ones(3)}
    same(tmp_path / "a.pt", {**expected, "o.y": torch.ones(2)})
    meta = open(tmp_path / "a.pt").meta
    for key, text in {
        "epoch": "7",
        "best": "0.5",
        "name": "née",
        "done": "True",
        "numpy": "2.5",
        "shape.1": "3",
    }.items():
        assert meta[key] == text
    assert meta["optimizer.param_groups.0.lr"] == "0.01"
    assert "pickle.globals" not in meta


def test_a_pickled_module_gives_the_names_of_its_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    torch.save(model, tmp_path / "a.pt")
    same(tmp_path / "a.pt", dict(model.state_dict()))
    wanted = json.loads(open(tmp_path / "a.pt").meta["pickle.globals"])
    assert [text.partition("@")[0] for text in wanted][:2] == [
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Linear",
    ]
    data = zipfile.ZipFile(tmp_path / "a.pt").read(_pickle_name(tmp_path / "a.pt"))
    for text in wanted:
        name, _, at = text.partition("@")
        module, _, attribute = name.rpartition(".")
        assert data[int(at) :].startswith(f"c{module}\n{attribute}\n".encode())


def _pickle_name(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return next(name for name in archive.namelist() if name.endswith("/data.pkl"))


def test_a_single_tensor_is_named_by_the_file(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "mask.pt")
    assert list(open(tmp_path / "mask.pt")) == ["mask"]
    torch.save([torch.ones(2), torch.ones(3)], tmp_path / "list.pt")
    assert list(open(tmp_path / "list.pt")) == ["0", "1"]


def test_what_is_not_held_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to remove them; files have them
        quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        half = torch.ones(2, dtype=torch.complex32)
    sparse = torch.eye(3).to_sparse()
    torch.save({"q": quantised, "s": sparse, "h": half, "w": torch.ones(1)}, tmp_path / "a.pt")
    found = open(tmp_path / "a.pt")
    assert list(found) == ["w"]
    assert [text.partition(":")[0] for text in json.loads(found.meta["pickle.skipped"])] == ["q", "s", "h"]


def test_a_torchscript_archive_gives_its_tensors(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(model).save(str(tmp_path / "a.pt"))
    same(tmp_path / "a.pt", dict(model.state_dict()))


def test_neither_torch_nor_an_unpickler_is_imported(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "b": [torch.zeros(2).t()]}, tmp_path / "a.pt")
    code = (
        "import sys; from steelyard.formats import open\n"
        f"w = open({str(tmp_path / 'a.pt')!r}); opened = set(sys.modules); w.arrays()\n"
        "print(sorted({'torch', 'pickle', '_pickle', 'pickletools', 'numpy', 'marshal_', 'shelve'} & opened))\n"
        "print('torch' in sys.modules, 'pickletools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False False"]


def test_the_order_of_bytes_in_the_archive_is_kept(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name, dtype in (("f", np.float32), ("c", np.complex64), ("b", np.uint8), ("h", np.float16)):
        data = values.astype(dtype)
        tensor = torch.from_numpy(data.copy())
        torch.save({"x": tensor, "t": tensor.t()}, tmp_path / "a.pt")
        swapped = data.byteswap().tobytes() if name != "c" else data.view(np.float32).byteswap().tobytes()
        rewrite(tmp_path / "a.pt", tmp_path / "b.pt", {"byteorder": b"big", "data/0": swapped})
        same(tmp_path / "b.pt", {"x": tensor, "t": tensor.t()})
    rewrite(tmp_path / "a.pt", tmp_path / "c.pt", {"byteorder": b"middle"})
    refused(tmp_path / "c.pt", "byteorder")


def rewrite(source: Path, target: Path, changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """The same archive with members replaced; keys are names without the folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.partition("/")[2], old.read(name)))


def test_deflated_members_are_unpacked_up_to_what_they_announce(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3e5), "b": torch.zeros(500, 600).t(), "c": raw("uint8", 200_000)}
    tensors["d"] = tensors["a"][100_000:]
    torch.save(tensors, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", tmp_path / "b.pt", {}, zipfile.ZIP_DEFLATED)
    same(tmp_path / "b.pt", tensors)
    assert (open(tmp_path / "b.pt")["b"].stored or 0) < 10_000


def test_opening_reads_the_pickle_and_the_directory_only(tmp_path: Path) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count the bytes that a process reads")
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    open(path)

    def read_so_far() -> int:
        return int(counter.read_text().split()[1])

    before = read_so_far()
    found = open(path)
    assert read_so_far() - before < 300_000
    before = read_so_far()
    next(found["a"].blocks(1000))
    assert read_so_far() - before < 20_000


def refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        open(path).arrays()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_old_file_is_read_past_a_long_pickle_and_refused_where_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    tensors = {f"layer.{i}.weight": torch.full((3, i % 5), float(i)) for i in range(3000)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size > 4 * 65536
    same(path, tensors)
    whole = path.read_bytes()
    for count in (1, 20, 70_000, len(whole) - 60_000, len(whole) - 1):
        path.write_bytes(whole[:count])
        refused(path)
    path.write_bytes(whole + b"x")
    refused(path, "1 bytes follow")
    at = whole.rfind((3 * 4).to_bytes(8, "little") + struct.pack("<f", 2999.0))
    path.write_bytes(whole[:at] + (2**61).to_bytes(8, "little") + whole[at + 8 :])
    refused(path, "ends after the file")


def test_views_of_storages_in_old_files(tmp_path: Path) -> None:
    def storage(key: str, count: int, view: bytes) -> bytes:
        return b"(U\x07storagectorch\nFloatStorage\nU\x01" + key.encode() + b"U\x03cpuK" + bytes([count]) + view + b"tQ"

    def rebuilt(where: bytes, size: int) -> bytes:
        return b"ctorch._utils\n_rebuild_tensor\n(" + where + b"K\x01K" + bytes([size]) + b"\x85K\x01\x85tR"

    def file(view: tuple[int, int], size: int) -> bytes:
        part = storage("0", 6, b"(U\x01v" + b"K%cK%c" % view + b"t")
        head = (
            b"\x80\x02" + b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b".\x80\x02M\xe9\x03.\x80\x02}."
        )
        pickled = b"\x80\x02}U\x01a" + rebuilt(storage("0", 6, b"N"), 5) + b"sU\x01b" + rebuilt(part, size) + b"s."
        return head + pickled + b"\x80\x02]U\x010a." + struct.pack("<q6f", 6, *range(6))

    path = tmp_path / "a.pt"
    path.write_bytes(file((2, 4), 3))
    assert torch.load(path, weights_only=False)["b"].tolist() == [3, 4, 5]
    assert {name: item.array().tolist() for name, item in open(path).items()} == {"a": [1, 2, 3, 4, 5], "b": [3, 4, 5]}
    path.write_bytes(file((2, 4), 4))
    refused(path, "'b': reaches to byte 20 of a storage of 16")
    path.write_bytes(file((3, 4), 1))
    refused(path, "'b': its storage is a view to byte 28 of 24")


def old_tar(changes: dict[str, bytes] | None = None) -> bytes:
    """A checkpoint as torch wrote it in 2016, by hand: two tensors, one of them of a view of the other's storage."""
    dump = partial(pickle.dumps, protocol=2)
    kind = b"(K\x01U\x03cpuctorch\nFloatStorage\nt."
    members = {
        "sys_info": dump({"protocol_version": 1000}),
        "pickle": b"\x80\x02}U\x01aU\x017QsU\x01bU\x018Qs.",
        "tensors": dump(2) + b"(K\x07K\x01ctorch\nFloatTensor\nt." + struct.pack("<i4x2q2qq", 2, 2, 3, 3, 1, 0)
        + b"(K\x08K\x02ctorch\nFloatTensor\nt." + struct.pack("<i4xqqq", 1, 2, 2, 1),
        "storages": dump(1) + kind + struct.pack("<q6f", 6, *range(6)) + dump([(2, 1, 2, 4)]),
    }  # fmt: skip
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in {**members, **(changes or {})}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def test_a_tar_of_2016_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(old_tar())
    assert detect(path) == "torch"
    same(path, torch.load(path, weights_only=False))
    assert open(path)["b"].array().tolist() == [3, 5]
    for changes, message in [
        (
            {"tensors": pickle.dumps(1, 2) + b"(K\x07K\x01Nt." + struct.pack("<i4xqqq", 1, 7, 1, 0)},
            "reaches to byte 28",
        ),
        ({"tensors": pickle.dumps(1, 2) + b"(K\x07K\x01Nt." + struct.pack("<i4x", 2**30)}, "dimensions"),
        ({"tensors": pickle.dumps(10**9, 2)}, "a number up to"),
        (
            {"storages": pickle.dumps(1, 2) + b"(K\x01Nctorch\nFloatStorage\nt." + struct.pack("<q", 2**60)},
            "ends after",
        ),
        ({"storages": pickle.dumps(0, 2) + pickle.dumps([(2, 1, 2, 4)], 2)}, "no storage '1'"),
        ({"pickle": b"cposix\nsystem\n(U\x02idtR\xff"}, "expected an opcode"),
    ]:
        path.write_bytes(old_tar(changes))
        refused(path, message)
    whole = old_tar()
    for count in range(600, len(whole) - 9000, 97):
        path.write_bytes(whole[:count])
        refused(path)
    path.write_bytes(old_tar({"../evil": b"x", "/etc/evil": b"x"}))
    assert len(open(path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    torch.save({"first": torch.arange(6.0).reshape(2, 3), "second": torch.ones(4, dtype=torch.int64)}, path)
    return path


def tensor(
    offset: int = 0,
    size: tuple = (2,),
    stride: tuple = (1,),
    count: object = 6,
    kind: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """A pickle of {'w': tensor} with these claims, by hand."""

    def number(n: object) -> bytes:
        raw = n.to_bytes(20, "little", signed=True) if isinstance(n, int) else b""
        return b"\x8a\x14" + raw if isinstance(n, int) else b"X" + struct.pack("<I", len(str(n))) + str(n).encode()

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = (
        b"(U\x07storagectorch\n"
        + kind.encode()
        + b"\nU"
        + bytes([len(key)])
        + key.encode()
        + b"U\x03cpu"
        + number(count)
        + b"tQ"
    )
    rest = number(offset) + numbers(size) + numbers(stride)
    return (
        b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + rest
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"size": (7,)}, "reaches to byte 28 of a storage of 24"),
        ({"offset": 5}, "reaches to byte 28"),
        ({"offset": -1}, "from -1 on"),
        ({"offset": 2**63}, "dimensions with"),
        ({"size": (-1,)}, "sizes and strides"),
        ({"stride": (-1,)}, "sizes and strides"),
        ({"size": (2, 2), "stride": (2**62, 1)}, "reaches to byte"),
        ({"size": (2**32, 2**32), "stride": (0, 0)}, "more than 2^63"),
        ({"size": (0, 2**62, 2**62), "stride": (1, 1, 1)}, "more than 2^63"),
        ({"size": (2**40,), "stride": (0,)}, "repeats 24 bytes"),
        ({"size": (2, 3), "stride": (1,)}, "2 dimensions with 1 strides"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "up to 64"),
        ({"size": ("x",)}, "sizes and strides"),
        ({"count": 7}, "announced with 28 bytes and has 24"),
        ({"count": 2**62}, "announced with"),
        ({"count": -6}, "a storage of -6"),
        ({"count": "6"}, "a storage of 6"),
        ({"kind": "DoubleStorage"}, "announced with 48 bytes and has 24"),
        ({"kind": "HalfStorage"}, "announced with 12 bytes and has 24"),
        ({"kind": "NoStorage"}, "expected a storage"),
        ({"key": "9"}, "no storage 'data/9'"),
        ({"key": "../../etc/passwd"}, "no storage 'data/../../etc/passwd'"),
    ],
    ids=str,
)
def test_a_view_that_cannot_be_is_refused_by_name(claims: dict, message: str, saved: Path, tmp_path: Path) -> None:
    rewrite(saved, tmp_path / "b.pt", {"data.pkl": tensor()})
    assert open(tmp_path / "b.pt")["w"].array().tolist() == [0, 1]
    rewrite(saved, tmp_path / "b.pt", {"data.pkl": tensor(**claims)})
    refused(tmp_path / "b.pt", message.replace("^", r"\^"))
    with pytest.raises(FormatError, match="'w'"):
        open(tmp_path / "b.pt")


def edit(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


def flags(value: int, central: bool) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = data.find(b"PK\x01\x02") + 8 if central else data.find(b"PK\x03\x04") + 6
        return data[:at] + struct.pack("<H", value) + data[at + 2 :]

    return change


ZIPS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "prefix": (lambda data: b"#!/bin/sh\n" + data, "unknown format"),
    "prefix that is a zip": (lambda data: b"PK\x03\x04" + bytes(40) + data, "bytes lie before"),
    "suffix": (lambda data: data + b"MZ and more", "11 bytes follow after the archive"),
    "cut": (lambda data: data[:-30], "no end record"),
    "local name": (edit(b"archive/data.pkl", b"archive/data.pkx"), "another name"),
    "encrypted": (flags(1, True), "encrypted"),
    "local flags": (flags(0x801, False), "another name, size, method or flag"),
    "7z": (lambda data: b"7z\xbc\xaf\x27\x1c" + data, "a 7z archive"),
    "gzip": (lambda data: b"\x1f\x8b\x08" + data, "gzip"),
    "nothing": (lambda data: b"<html>404</html>", "unknown format"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_an_archive_that_two_readers_could_see_apart_is_refused(case: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
    data = (tmp_path / "a.pt").read_bytes()
    assert len(open(tmp_path / "a.pt")) == 1
    change, message = ZIPS[case]
    (tmp_path / "a.pt").write_bytes(change(data))
    refused(tmp_path / "a.pt", message)


def test_bytes_before_the_first_member_are_refused_even_where_the_directory_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK\x03\x04 and a script")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/data/0", bytes(24))
    refused(path, "17 bytes lie before the first member")


def test_bombs_doubles_and_other_members(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        with zipfile.ZipFile(path, "w", method) as made:
            for name, data in members.items():
                made.writestr(name, data)
        return path.read_bytes()

    data = archive({"a/data.pkl": tensor(), "a/data/0": bytes(24)}, zipfile.ZIP_DEFLATED)
    at = data.find(b"PK\x01\x02")
    path.write_bytes(data[: at + 24] + struct.pack("<I", 2**31) + data[at + 28 :])
    refused(path, "cannot unpack from")
    archive({"a/data.pkl": bytes(101_000_000), "a/data/0": bytes(24)}, zipfile.ZIP_DEFLATED)
    refused(path, "the limit is 100000000")
    archive({"a/data.pkl": tensor(), "b/data.pkl": tensor()})
    refused(path, "expected one data.pkl")
    archive({"a/weights": b""})
    refused(path, "expected a member NAME/data.pkl")
    archive({"a/data.pkl": tensor() + b"\x80\x02N."})
    refused(path, "4 bytes follow it")
    archive({"a/data.pkl": tensor(), "a/data/0": bytes(24), "../../up": b"x", "inner.zip": data, "/etc/x": b""})
    assert list(open(path)) == ["w"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]
    data = archive({"a/data.pkl": tensor(), "a/data.pkx": tensor()})
    path.write_bytes(data.replace(b"data.pkx", b"data.pkl"))
    refused(path, "there twice")


def test_every_truncation_and_mutation_is_valid_or_a_typed_error(saved: Path) -> None:
    import random

    whole, rng, refusals = saved.read_bytes(), random.Random(1), list[str]()
    for count in range(0, len(whole), 7):
        saved.write_bytes(whole[:count])
        with pytest.raises(SteelyardError) as caught:
            open(saved).arrays()
        assert str(saved) in str(caught.value)
    for _ in range(1000):
        at = rng.randrange(len(whole))
        saved.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            open(saved).arrays()
        except SteelyardError as error:
            refusals.append(str(error))
    assert len(refusals) > 300
    assert not [text for text in refusals if "\n" in text]


def test_shards_that_an_index_names_are_opened_as_one(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
    files = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate(tensors, 1)}
    for name, file in files.items():
        torch.save({name: tensors[name]}, tmp_path / file)
    index = {"metadata": {"total_size": 32}, "weight_map": files}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(tmp_path, tensors)
    for file in files.values():
        (tmp_path / file).unlink()
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    same(tmp_path, tensors)


def test_what_is_read_can_be_written_as_safetensors(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": base, "b": base, "c": base.t(), "epoch": 3, "steelyard": "x"}, tmp_path / "a.pt")
    write(open(tmp_path / "a.pt"), tmp_path / "a.safetensors")
    found = open(tmp_path / "a.safetensors")
    assert {name: item.array().tolist() for name, item in found.items()} == {"a": base.tolist(), "c": base.t().tolist()}
    assert dict(found.ties) == {"b": "a"}
    assert found.meta["epoch"] == "3"

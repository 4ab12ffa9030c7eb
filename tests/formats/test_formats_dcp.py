"""Folders of torch.distributed.checkpoint: equal to what torch loads, and every lie of the metadata is an error."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import detect, open

torch = pytest.importorskip("torch", reason="these tests compare with torch.distributed.checkpoint")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: E402
from torch.distributed.checkpoint.metadata import (  # noqa: E402
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process only
        yield


def values(dtype: str = "float32") -> torch.Tensor:
    return torch.arange(35).reshape(5, 7).to(getattr(torch, dtype))


def save(
    folder: Path, boxes: list[Box], tensor: torch.Tensor | None = None, change: Callable[[Metadata], None] | None = None
) -> None:
    """A checkpoint of the tensor 'w' cut into boxes, two shards in turn, as the ranks of a cluster write it."""
    tensor = values() if tensor is None else tensor
    shards, places = [io.BytesIO(), io.BytesIO()], {}
    for number, (at, size) in enumerate(boxes):
        shard, item = shards[number % 2], io.BytesIO()
        torch.save(tensor[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))].clone(), item)
        place = _StorageInfo(f"__{number % 2}_0.distcp", shard.tell(), len(item.getvalue()))
        places[MetadataIndex("w", torch.Size(at), number)] = place
        shard.write(item.getvalue())
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
    stored = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    metadata = Metadata({"w": stored, "epoch": BytesStorageMetadata()}, planner_data={"w": ("w",)}, storage_data=places)
    if change is not None:
        change(metadata)
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        (folder / f"__{number}_0.distcp").write_bytes(shard.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


BOXES: dict[str, list[Box]] = {
    "whole": [((0, 0), (5, 7))],
    "rows": [((0, 0), (3, 7)), ((3, 0), (2, 7))],
    "rows in disorder": [((4, 0), (1, 7)), ((0, 0), (3, 7)), ((3, 0), (1, 7))],
    "columns": [((0, 0), (5, 4)), ((0, 4), (5, 3))],
    "both": [((0, 0), (3, 4)), ((3, 0), (2, 4)), ((0, 4), (3, 3)), ((3, 4), (2, 3))],
    "with an empty one": [((0, 0), (5, 7)), ((5, 0), (0, 7))],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool"])
@pytest.mark.parametrize("cut", BOXES)
def test_pieces_become_the_tensor_that_torch_loads(cut: str, dtype: str, tmp_path: Path) -> None:
    save(tmp_path / "c", BOXES[cut], values(dtype))
    found = open(tmp_path / "c")
    assert detect(tmp_path / "c") == "dcp"
    loaded = {"w": torch.empty(5, 7, dtype=getattr(torch, dtype))}
    dcp.load(loaded, checkpoint_id=tmp_path / "c")
    array = found["w"].array()
    assert (
        array.tobytes()
        == loaded["w"].view(torch.uint8).numpy().tobytes()
        == values(dtype).view(torch.uint8).numpy().tobytes()
    )
    assert b"".join(block.tobytes() for block in found["w"].blocks(4)) == array.tobytes()
    assert (found["w"].fill is None) == (cut in ("columns", "both"))
    assert json.loads(found.meta["dcp.objects"]) == ["epoch"]
    assert "pickle.globals" not in found.meta


def test_what_torch_saves_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}
    state |= {"t": torch.arange(12.0).reshape(3, 4).t(), "none": torch.zeros(0, 2), "one": torch.tensor(2.5)}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    found = open(tmp_path / "c")
    expected = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for index, part in state["optim"]["state"].items():
        expected |= {f"optim.state.{index}.{name}": tensor for name, tensor in part.items()}
    expected |= {name: state[name] for name in ("t", "none", "one")}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(found[name].array(), tensor.numpy()), name
        assert found[name].array().shape == tuple(tensor.shape)
    assert "epoch" in json.loads(found.meta["dcp.objects"])
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "model.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_what_two_processes_save_comes_out(tmp_path: Path) -> None:
    code = f"""
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", init_method={f"file://{tmp_path}/meet"!r}, rank=int(sys.argv[1]), world_size=2)
mesh, a = init_device_mesh("cpu", (2,)), torch.arange(35.0).reshape(5, 7)
places = {{"rows": Shard(0), "columns": Shard(1), "all": Replicate()}}
dcp.save({{n: distribute_tensor(a, mesh, [p]) for n, p in places.items()}}, checkpoint_id={str(tmp_path / "c")!r})
dist.destroy_process_group()
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        assert rank.communicate(timeout=120)[1] is not None
        assert rank.returncode == 0
    found = open(tmp_path / "c")
    assert set(found) == {"rows", "columns", "all"}
    for item in found.values():
        assert item.array().tolist() == values().tolist()


def test_opening_reads_the_metadata_only(tmp_path: Path) -> None:
    save(tmp_path / "c", BOXES["rows"])
    found = open(tmp_path / "c")
    for shard in tmp_path.glob("c/*.distcp"):
        stamp = shard.stat()
        shard.write_bytes(bytes(shard.stat().st_size))
        os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert found["w"].spec.shape == (5, 7)
    with pytest.raises(SteelyardError, match="distcp"):
        found["w"].array()


def place(name: str, value: object) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        first = next(iter(metadata.storage_data.values()))
        setattr(first, name, value)

    return change


def tensor(name: str, value: object) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        setattr(metadata.state_dict_metadata["w"], name, value)

    return change


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks[0] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    return change


LIES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a way out": (place("relative_path", "../secret.pt"), "leads out"),
    "an absolute path": (place("relative_path", "/etc/passwd"), "leads out"),
    "no file": (place("relative_path", "nowhere.distcp"), "no such file"),
    "a name with NUL": (place("relative_path", "a\0b"), "no name of a file"),
    "no name": (place("relative_path", 3), "name of a tensor, and a file"),
    "beyond the end": (place("length", 10**9), "its piece ends at byte"),
    "far beyond": (place("offset", 2**63), "from 0 to 2\\^63-1"),
    "before the beginning": (place("offset", -1), "from 0 to 2\\^63-1"),
    "too short": (place("length", 100), "no end record|ends too early|unknown format|cut off"),
    "another range": (place("offset", 5), "unknown format|piece ends"),
    "compressed": (place("transform_descriptors", ["zstd"]), "compressed"),
    "another dtype": (tensor("properties", TensorProperties(torch.float16)), "expected a piece of float16"),
    "no dtype": (tensor("properties", None), "no dtype"),
    "a dtype that is none": (tensor("properties", TensorProperties(torch.complex32)), "no dtype 'complex32'"),
    "another size": (tensor("size", torch.Size([6, 7])), "its pieces have 35 elements, it has 42"),
    "a size that wraps": (tensor("size", (2**40, 2**40)), "more than 2\\^63"),
    "no list": (tensor("chunks", None), "list of its pieces"),
    "no pieces": (tensor("chunks", []), "its pieces have 0 elements"),
    "outside": (chunk((3, 0), (3, 7)), "lies outside"),
    "a hole": (chunk((0, 0), (2, 7)), "its pieces have 28 elements"),
    "an overlap": (chunk((1, 0), (3, 7)), "no file has the piece at|overlap"),
    "another rank": (chunk((0,), (35,)), "lies outside"),
    "swapped": (chunk((3, 0), (2, 7)), "overlap|its pieces have"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lie_of_the_metadata_is_an_error_that_names_the_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "secret.pt").write_bytes(b"secret")
    change, message = LIES[case]
    save(tmp_path / "c", BOXES["rows"], change=change)
    with pytest.raises(FormatError, match=message) as caught:
        open(tmp_path / "c").arrays()
    assert str(tmp_path / "c") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pieces_that_overlap_are_refused(tmp_path: Path) -> None:
    boxes: list[Box] = [((0, 0), (3, 4)), ((2, 0), (3, 4)), ((0, 4), (3, 3)), ((4, 6), (1, 1)), ((3, 4), (1, 1))]
    save(tmp_path / "c", boxes)
    with pytest.raises(FormatError, match="overlap"):
        open(tmp_path / "c")


def test_metadata_never_runs_and_names_what_it_wanted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    def change(metadata: Metadata) -> None:
        metadata.planner_data = Payload()

    save(tmp_path / "c", BOXES["rows"], change=change)
    found = open(tmp_path / "c")
    assert found["w"].array().tolist() == values().tolist()
    assert json.loads(found.meta["pickle.globals"])[0].startswith("posix.system@")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "posix.system" in capsys.readouterr().out
    assert not (tmp_path / "canary").exists()


def test_a_mutated_checkpoint_is_refused_or_read(tmp_path: Path) -> None:
    import random

    save(tmp_path / "c", BOXES["both"])
    path, rng, refused = tmp_path / "c" / ".metadata", random.Random(3), list[str]()
    whole = path.read_bytes()
    for _ in range(1000):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            open(tmp_path / "c").arrays()
        except SteelyardError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert not [text for text in refused if "\n" in text]

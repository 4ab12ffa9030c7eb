"""Weights in several files: what an index and its files must agree on, and that a set is replaced as one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from steelyard.codecs.affine import Affine
from steelyard.core.packed import pack
from steelyard.core.weights import Weights
from steelyard.edit.transfer import transfer
from steelyard.errors import FormatError, RecipeError
from steelyard.formats import _index, detect, locate, move, open, sharded, write
from steelyard.formats.sharded import Sharded

INDEX = "model.safetensors.index.json"


def some(count: int = 5, factor: int = 1) -> Weights:
    """`count` tensors of 24 bytes."""
    return Weights.of(
        {f"layer.{i}": np.arange(6, dtype=np.float32) * (i + factor) for i in range(count)},
        ties={"head": "layer.0"},
        meta={"format": "pt", "author": "É"},
    )


def same(found: Weights, expected: Weights) -> bool:
    return (
        list(found) == list(expected)
        and dict(found.ties) == dict(expected.ties)
        and dict(found.meta) == dict(expected.meta)
        and all(np.array_equal(found[name].array(), expected[name].array()) for name in expected)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of two, two and one tensors, as another library writes them."""
    maps = {}
    for i, names in enumerate([["a", "b"], ["c", "d"], ["e"]]):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        arrays = {name: np.full((2, 3), ord(name), np.float32) for name in names}
        safetensors.numpy.save_file(arrays, tmp_path / file, metadata={"format": "pt", "part": str(i)})
        maps |= dict.fromkeys(names, file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 120, "n": 30}, "weight_map": maps}))
    return tmp_path


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    edit(data)
    (folder / INDEX).write_text(json.dumps(data))


def test_a_folder_is_opened_by_its_index_and_tensors_say_where_they_lie(folder: Path) -> None:
    weights = open(folder)
    assert list(weights) == list("abcde")
    assert weights["d"].array().tolist() == [[100.0] * 3] * 2
    assert weights["d"].origin.startswith(f"{folder}/model-00002-of-00003.safetensors @")
    assert dict(weights.meta) == {"format": "pt", "n": "30"}, "what the files say differently is left out"
    assert detect(folder) == "sharded"
    write(Weights.of({"a": np.zeros(1)}), folder / "model.safetensors")
    assert locate(folder).name == INDEX


def test_the_order_is_that_of_the_index(folder: Path) -> None:
    change(folder, lambda data: data.update(weight_map=dict(reversed(data["weight_map"].items()))))
    assert list(open(folder)) == list("edcba")


def test_tensors_are_made_in_the_order_of_the_index_however_it_jumps(folder: Path) -> None:
    order = list("ceadb")
    change(folder, lambda data: data.update(weight_map={name: data["weight_map"][name] for name in order}))
    found = open(folder)
    assert list(found) == [item.name for item in found.values()] == [name for name, _ in found.items()] == order
    assert [spec.shape for spec in found.specs()] == [(2, 3)] * 5
    assert found.nbytes == 120
    assert [item.array()[0, 0] for item in found.select(lambda item: item.name in "da").values()] == [97, 100]
    assert "f" not in found
    assert found.find("e").name == "e"


def test_shards_are_bounded_and_any_reader_opens_them(tmp_path: Path) -> None:
    size = write(some(), tmp_path / INDEX, Sharded(shard_size=50))
    names = sorted(os.listdir(tmp_path))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    assert size == sum((tmp_path / name).stat().st_size for name in names)
    assert same(open(tmp_path), some())
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 24
    for name in names[:3]:
        arrays = safetensors.numpy.load_file(tmp_path / name)
        assert sum(array.nbytes for array in arrays.values()) <= 50
        assert [key for key, file in index["weight_map"].items() if file == name] == sorted(arrays)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    write(some(), tmp_path / INDEX, Sharded(shard_size=1))
    assert len(list(tmp_path.glob("*.safetensors"))) == 5, "each tensor that is too large has its own"


def test_the_parts_of_a_packed_tensor_may_lie_in_several_files(tmp_path: Path) -> None:
    packed = pack(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), Affine(bits=4, axis=0))
    weights = Weights.of({"a": packed, "b": np.zeros(3)}, ties={"c": "a"})
    write(weights, tmp_path / INDEX, Sharded(shard_size=1))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = open(tmp_path)
    assert same(found, weights)
    assert found["a"].scheme == weights["a"].scheme
    assert found["a"].stored == pytest.approx(64 * 64 / 2, abs=600)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["weight_map"].update(f="model-00001-of-00003.safetensors"), "'f' is said to lie in .* have it"),
        (lambda d: d["weight_map"].pop("b"), "'b' lies in .*00001.* the index does not name it"),
        (
            lambda d: d["weight_map"].update(b="model-00002-of-00003.safetensors"),
            "'b' lies in '.*00001.*' and is said to lie in '.*00002",
        ),
        (lambda d: d["weight_map"].update(a=INDEX), "names others"),
        (lambda d: d["weight_map"].update(e="model-00009-of-00003.safetensors"), "00009.* no such file"),
        (lambda d: d["metadata"].update(total_size=121), "total_size is 121, the tensors take 120 bytes"),
        (lambda d: d["metadata"].update(total_size="120"), "expected a number of bytes"),
        (lambda d: d.update(metadata=[]), "expected an object as 'metadata'"),
        (lambda d: d.update(weight_map=[]), "expected an object with a 'weight_map'"),
        (lambda d: d["weight_map"].update(a=3), "expected an object with a 'weight_map'"),
        (lambda d: d["metadata"].update(steelyard=1), "expected text as 'steelyard'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_index_and_its_files_must_agree(folder: Path, edit: Callable[[dict], object], message: str) -> None:
    change(folder, edit)
    with pytest.raises(FormatError, match=message) as caught:
        open(folder)
    assert str(folder / INDEX) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_may_be_those_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shared = torch.arange(12.0).reshape(3, 4)
    files = [
        {"model.embed.weight": shared, "lm_head.weight": shared, "a": torch.ones(3, dtype=torch.bfloat16)},
        {"b": torch.zeros(5)},
    ]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, tensors in zip(names, files, strict=True):
        torch.save(tensors, tmp_path / name)
    index = {
        "metadata": {"total_size": 48 + 48 + 6 + 20},
        "weight_map": {key: name for name, tensors in zip(names, files, strict=True) for key in tensors},
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open(tmp_path)
    assert list(found) == ["model.embed.weight", "a", "b"]
    assert dict(found.ties) == {"lm_head.weight": "model.embed.weight"}
    assert found["lm_head.weight"].array().tolist() == shared.tolist()
    assert found["a"].origin.startswith(str(tmp_path / names[0]))
    write(found, tmp_path / INDEX, Sharded(shard_size=40))
    assert same(open(tmp_path / INDEX), found)


def test_two_files_that_own_one_name_are_refused(folder: Path) -> None:
    again = {name: np.full((2, 3), 1, np.float32) for name in ("d", "e")}
    safetensors.numpy.save_file(again, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(FormatError, match=r"'d' lies in '.*00003.*' and is said to lie in '.*00002"):
        open(folder)


@pytest.mark.parametrize("total", [5 * 24, 5 * 24.0, 6 * 24])
def test_a_tied_tensor_counts_once_or_with_each_of_its_names(tmp_path: Path, total: float) -> None:
    write(some(), tmp_path / INDEX)
    change(tmp_path, lambda data: data["metadata"].update(total_size=total))
    assert same(open(tmp_path), some())


def test_a_bool_counts_as_a_byte_or_as_an_eighth(tmp_path: Path) -> None:
    write(Weights.of({"mask": np.zeros(12, bool), "w": np.zeros(1, np.float32)}), tmp_path / INDEX)
    for total, right in [(16, True), (5.5, True), (6, True), (4, False), (8, False)]:
        change(tmp_path, lambda data, total=total: data["metadata"].update(total_size=total))
        if right:
            assert len(open(tmp_path)) == 2
        else:
            with pytest.raises(FormatError, match=f"total_size is {total}, the tensors take 16"):
                open(tmp_path)


def test_an_index_of_1000_files_needs_few_open_ones(tmp_path: Path) -> None:
    write(some(1000), tmp_path / INDEX, Sharded(shard_size=1))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        f"from steelyard.formats import open; w = open({str(tmp_path)!r}); print(len(w), len(w.arrays()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1000 1000\n"


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="written as safetensors"):
        write(some(), tmp_path / "pytorch_model.bin.index.json")
    with pytest.raises(FormatError, match="'total_size' is reserved"):
        write(some().with_meta(total_size="1"), tmp_path / INDEX)
    with pytest.raises(RecipeError, match="at least 1"):
        Sharded(shard_size=0)
    (tmp_path / "model-00001-of-00001.safetensors").write_text("mine")
    with pytest.raises(FormatError, match=r"00001-of-00001.*is there already, and .* does not name it"):
        write(some(), tmp_path / INDEX)
    assert os.listdir(tmp_path) == ["model-00001-of-00001.safetensors"]
    assert (tmp_path / "model-00001-of-00001.safetensors").read_text() == "mine"


def test_only_files_of_the_old_set_are_removed(tmp_path: Path) -> None:
    write(some(), tmp_path / INDEX, Sharded(shard_size=50))
    (tmp_path / "config.json").write_text("{}")
    change(tmp_path, lambda data: data["weight_map"].update(x="config.json", y="../out", z="model.safetensors"))
    write(some(1), tmp_path / INDEX)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model-00001-of-00001.safetensors", INDEX]


def stopping(monkeypatch: pytest.MonkeyPatch, left: int, end: Callable[[], object]) -> None:
    """Let `left` steps at the disk happen, and then call `end` once."""

    def counted(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == -1:
                end()
            return function(*arguments, **options)

        return call

    for name in ("replace", "link", "unlink", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "interrupted"])
@pytest.mark.parametrize("count", [5, 3], ids=["same names", "other names"])
def test_whenever_it_stops_the_index_names_a_whole_set(
    tmp_path: Path, kill: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def stopped() -> bool:
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            stopping(patch, step, (lambda: os._exit(3)) if kill else interrupt)
            write(new, path, Sharded(shard_size=50))
            return False
        return True

    new, seen = some(count, factor=7).with_meta(new="yes"), set()
    for step in range(100):
        path = tmp_path / str(step) / INDEX
        path.parent.mkdir()
        write(some(), path, Sharded(shard_size=50))
        if kill:
            child = os.fork()
            if child == 0:
                os._exit(3 if stopped() else 0)
            more = os.waitpid(child, 0)[1] != 0
        else:
            more = stopped()
        found = open(path)
        assert same(found, some()) or same(found, new), step
        seen.add(len(found.meta))
        if not more:
            break
        assert kill or same(found, new) or len(os.listdir(path.parent)) == 4, "nothing is left of what was not finished"
    assert not more
    assert step > 8
    assert seen == {2, 3}, "the old set was seen, and the new one"
    assert len(list(path.parent.iterdir())) == (count + 1) // 2 + 1


def test_without_second_names_for_files_the_set_keeps_names_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(some(), tmp_path / INDEX)

    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    write(some(2), tmp_path / INDEX)
    assert same(open(tmp_path), some(2))
    assert len(os.listdir(tmp_path)) == 2
    monkeypatch.undo()
    write(some(3), tmp_path / INDEX)
    assert same(open(tmp_path), some(3))
    assert sorted(os.listdir(tmp_path)) == ["model-00001-of-00001.safetensors", INDEX]


def test_a_set_is_moved_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    draft, path = tmp_path / "draft" / "x.safetensors.index.json", tmp_path / "out" / INDEX
    path.parent.mkdir()
    for factor in (1, 2):  # to a free place, then over the set that is there
        write(some(factor=factor), draft, Sharded(shard_size=50))
        move(draft, path)
        assert same(open(path), some(factor=factor))
        assert os.listdir(draft.parent) == []
        assert sorted(os.listdir(path.parent)) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]


def test_a_set_is_verified_before_it_gets_its_name(tmp_path: Path) -> None:
    write(some(), tmp_path / "a.safetensors")
    done = transfer(tmp_path / "a.safetensors", tmp_path / INDEX, lambda w: w, format=Sharded(50), verified=True)
    assert done.verified == 5
    assert same(open(tmp_path / INDEX), some())
    assert done.files[1] == sum(path.stat().st_size for path in tmp_path.glob("model*"))


def test_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_index, "SHARD_LIMIT", 2)
    monkeypatch.setattr(sharded, "SHARD_LIMIT", 2)
    with pytest.raises(FormatError, match="names 3 files, the limit is 2"):
        open(folder)
    with pytest.raises(FormatError, match="choose a larger shard size"):
        write(some(), folder / "x.safetensors.index.json", Sharded(shard_size=1))
    monkeypatch.setattr(_index, "INDEX_LIMIT", 100)
    with pytest.raises(FormatError, match="the limit is 100"):
        open(folder)

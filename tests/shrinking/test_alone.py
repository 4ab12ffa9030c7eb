"""Weights alone: smaller, no more wrong than was asked, told apart from a promise of a metric, or not there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.deploy import graft
from steelyard.deploy.graft import with_weights
from steelyard.deploy.onnx import write_onnx
from steelyard.deploy.session import OnnxModule
from steelyard.errors import FormatError, ModelError, RecipeError, SteelyardError, VerdictError
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.sharded import Sharded
from steelyard.shrinking import alone
from steelyard.shrinking.alone import shrink_weights

from damage import damaged_onnx, damaged_safetensors


@pytest.fixture(scope="module")
def weights() -> Weights:
    random = np.random.default_rng(0)
    shapes = {"embed.weight": (300, 64), "layer.0.self_attn.q_proj.weight": (64, 64), "layer.0.mlp.up.weight": (64, 64),
              "layer.0.mlp.up.bias": (64,)}  # fmt: skip
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made["positions"] = np.arange(512)
    return Weights.of(made).with_ties({"head.weight": "embed.weight"})


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "model.safetensors"
    formats.write(weights, path)
    return path


def errors(before: Weights, after: Weights) -> dict[str, float]:
    pairs = ((w.name, w.array().astype(float), after.find(w.name).array()) for w in before.values())
    return {name: float(np.linalg.norm(b - a) / np.linalg.norm(a)) for name, a, b in pairs}


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
def test_smaller_and_no_more_wrong_than_was_asked(weights: Weights, file: Path, error: float, tmp_path: Path) -> None:
    found = shrink_weights(file, tmp_path / "small.safetensors", error=error)
    row, read = found.summary.rows[0], formats.open(tmp_path / "small.safetensors")
    lost = errors(weights, read)
    floats = [w for w in weights.values() if w.spec.dtype.kind == "float"]
    whole = np.sqrt(sum(w.spec.size * lost[w.name] ** 2 for w in floats) / sum(w.spec.size for w in floats))
    assert 0.8 * error < whole <= error
    assert row["error"] == pytest.approx(whole, rel=1e-6)
    assert row["bytes"] == (tmp_path / "small.safetensors").stat().st_size < row["bytes before"]
    assert np.array_equal(read["positions"].array(), np.arange(512))
    assert read.ties == weights.ties
    assert "nothing is said of any metric" in found.summary.meta["promise"]
    assert lost["layer.0.self_attn.q_proj.weight"] > 2 * lost["layer.0.mlp.up.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_queries_may_count_as_much_as_others(weights: Weights, file: Path, tmp_path: Path) -> None:
    lost = errors(weights, shrink_weights(file, tmp_path / "small.safetensors", attention=1).weights)
    assert lost["layer.0.self_attn.q_proj.weight"] == pytest.approx(lost["layer.0.mlp.up.weight"], rel=0.1)


def test_a_folder_comes_with_all_but_other_weights(weights: Weights, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "small"
    (source / "1_Pooling").mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling" / "config.json").write_text('{"mean": true}')
    (source / "pytorch_model.bin").write_bytes(b"the same weights once more")
    formats.write(weights, source / "model.safetensors.index.json", Sharded(shard_size=40_000))
    found = shrink_weights(source, target)
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == {"config.json", "tokenizer.json", "1_Pooling/config.json", "packed.safetensors"}
    assert (target / "tokenizer.json").read_text() == "{}"
    assert "pytorch_model.bin" in found.summary.meta["left out"]
    opened = formats.open(target)
    assert opened.meta["config.model_type"] == "llama"
    assert max(errors(weights, opened).values()) < 0.2
    with pytest.raises(FormatError, match="exists already; name a new folder"):
        shrink_weights(source, target)
    there = sorted(source.rglob("*"))
    for inside in (source / "small", source / "1_Pooling" / "small", tmp_path / "small" / ".." / "model" / "small"):
        with pytest.raises(FormatError, match="lies in the source, which would be copied into itself; name a folder"):
            shrink_weights(source, inside)
    assert sorted(source.rglob("*")) == there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 5))
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    write_onnx(net, [torch.zeros(2, 1, 8, 8)], path)
    return path, net


def test_the_weights_of_a_graph_come_packed_or_run(graph: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, net = graph
    packed = shrink_weights(path, tmp_path / "small.safetensors", error=0.05)
    runs = shrink_weights(path, tmp_path / "rounded.onnx", error=0.05)
    assert packed.summary.rows[0]["smaller"] > 4
    assert "it would take" in runs.summary.meta["packed"]
    assert runs.summary.rows[0]["smaller"] == pytest.approx(1, abs=0.02)
    x = torch.rand(16, 1, 8, 8)
    found, expected = OnnxModule(tmp_path / "rounded.onnx")(x), net(x).detach()
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    with_weights(path, formats.open(tmp_path / "small.safetensors"), tmp_path / "restored.onnx")
    assert torch.equal(OnnxModule(tmp_path / "restored.onnx")(x), found)


def test_weights_that_the_graph_does_not_have(graph: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx has no tensor 'other' in its main graph"):
        with_weights(graph[0], Weights.of({"other": np.zeros((2, 2), np.float32)}), tmp_path / "x.onnx")
    name = next(w.name for w in formats.open(graph[0]).values() if w.spec.dtype.kind == "float")
    with pytest.raises(ModelError, match=r"and the weights have \[2\]"):
        with_weights(graph[0], Weights.of({name: np.zeros(2, np.float32)}), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    before = graph[0].read_bytes()
    with pytest.raises(FormatError, match="is the source itself"):
        with_weights(graph[0], Weights.of({}), graph[0])
    assert graph[0].read_bytes() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"error": "x"}, "error: expected a number, found 'x'"),
        ({"target": None}, "target: expected a path, found None"),
        ({"source": 3}, "source: expected a path, found 3"),
    ],
)
def test_what_is_no_path_and_no_number_is_named(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SteelyardError, match=said):
        shrink_weights(**{"source": tmp_path / "a.safetensors", "target": tmp_path / "b.safetensors", **given})


def test_a_file_with_more_error_gets_no_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is twice what it was: the other process sees the error."""
    transfer, target = alone.transfer, tmp_path / "small.safetensors"
    target.write_bytes(b"what was there")

    def damaging(source: str, draft: Path, *given, **named):
        done = transfer(source, draft, *given, **named)
        weights = formats.open(draft).settle()
        wrong = {n: w.array() * (1 + (n == "embed.weight")) for n, w in weights.items()}
        formats.write(Weights.of(wrong), draft)
        return done

    monkeypatch.setattr(alone, "transfer", damaging)
    with pytest.raises(VerdictError, match=r"the error of the file is 0\.\d+, more than 0\.1: nothing is written"):
        shrink_weights(file, target, force=True)
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


SEEDS = [*range(7), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(7, 50))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_packed_weights_that_are_not_what_they_were_meant_to_be_get_no_name(
    file: Path, seed: int, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = file, tmp_path / "out" / "small.safetensors"
    target.parent.mkdir()
    if whole:
        source, target = tmp_path / "model", tmp_path / "out" / "small"
        source.mkdir()
        (source / "config.json").write_text("{}")
        (source / file.name).write_bytes(file.read_bytes())
    resume, done = Safetensors.resume, []

    def damaging(self: Safetensors, weights: Weights, path: Path) -> int:
        size = resume(self, weights, path)
        path.write_bytes(damaged(path.read_bytes(), seed))
        done.append(path)
        return size

    monkeypatch.setattr(Safetensors, "resume", damaging)
    with pytest.raises(SteelyardError):
        shrink_weights(source, target)
    assert done
    assert not list(target.parent.iterdir())


def damaged(raw: bytes, seed: int) -> bytes:
    """Damaged, so that other values are read from it, or none: the last byte of a stream has bits that say nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.safetensors"
        file.write_bytes(raw)
        meant = formats.open(file).settle().arrays()
        for again in range(seed, seed + 500, 50):
            file.write_bytes(damaged_safetensors(raw, again))
            try:
                found = formats.open(file).settle().arrays()
            except SteelyardError:
                return file.read_bytes()
            if any(found[name].tobytes() != x.tobytes() for name, x in meant.items()):
                return file.read_bytes()
    raise AssertionError("no damage is seen")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_graph_that_is_not_what_it_was_meant_to_be_gets_no_name(
    graph: tuple[Path, nn.Module], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, done = graft.replacing, []

    @contextmanager
    def damaging(path: Path) -> Iterator[Any]:
        with save(path) as file:
            yield file
        raw = path.read_bytes()
        path.write_bytes(damaged_onnx(raw, seed))
        done.append(path.read_bytes() != raw)

    monkeypatch.setattr(graft, "replacing", damaging)
    with pytest.raises(SteelyardError):
        shrink_weights(graph[0], tmp_path / "rounded.onnx", error=0.05)
    assert done == [True]
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_other_files_were_not_copied_well_gets_no_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": 1}')
    (source / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(alone.shutil, "copyfile", lambda a, b: b.write_bytes(a.read_bytes()[:-1]))
    with pytest.raises(VerdictError, match=r"tokenizer\.json was read back with other bytes than it has in"):
        shrink_weights(source, tmp_path / "small")
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_to_gain_is_a_no(tmp_path: Path) -> None:
    formats.write(Weights.of({"w": np.float32([[1]])}), tmp_path / "tiny.safetensors")
    with pytest.raises(VerdictError, match="there is nothing to gain"):
        shrink_weights(tmp_path / "tiny.safetensors", tmp_path / "small.safetensors", error=0.001)


def test_a_job_that_was_broken_off_goes_on(file: Path, tmp_path: Path) -> None:
    def broken(what: str, _total: int):
        def tell(_count: int) -> None:
            if what == "writing":
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):
        shrink_weights(file, tmp_path / "small.safetensors", watch=broken)
    assert [path.name for path in tmp_path.iterdir()] == [".small.safetensors.shrinking"]
    shrink_weights(file, tmp_path / "small.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_errors(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"name a \.safetensors file"):
        shrink_weights(file, tmp_path / "small.npz")
    with pytest.raises(FormatError, match="which is safetensors"):
        shrink_weights(file, tmp_path / "small.onnx")
    with pytest.raises(RecipeError, match="attention is 0"):
        shrink_weights(file, tmp_path / "small.safetensors", attention=0)
    with pytest.raises(RecipeError, match="error is 2"):
        shrink_weights(file, tmp_path / "small.safetensors", error=2)
    with pytest.raises(FormatError, match="is the source itself"):
        shrink_weights(file, file, force=True)
    formats.write(Weights.of({"n": np.arange(9)}), tmp_path / "whole.safetensors")
    with pytest.raises(ModelError, match="no matrix"):
        shrink_weights(tmp_path / "whole.safetensors", tmp_path / "small.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.safetensors"]

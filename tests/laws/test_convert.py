"""The law of conversions, for every pair of a row of FORMATS and one that is written: the same bits, or a reason."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.core.weights import Weights
from steelyard.formats import FORMATS, WRITTEN, open, write

ARRAYS = {
    "a.weight": np.arange(-64, 64, dtype=np.float32).reshape(4, 32) / 8,
    "b.weight": np.arange(64, dtype=np.float16).reshape(2, 32),
    "b.bias": np.linspace(-1, 1, 32, dtype=np.float32),
}
ONE = {"npy"}  # formats that hold one tensor


def _torch(folder: Path) -> Path:
    torch = pytest.importorskip("torch", reason="torch writes what is read here")
    torch.save({name: torch.from_numpy(x) for name, x in ARRAYS.items()}, folder / "model.pt")
    return folder / "model.pt"


def _onnx(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx", reason="onnx writes what is read here")
    tensors = [onnx.numpy_helper.from_array(x, name) for name, x in ARRAYS.items()]
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    onnx.save(onnx.helper.make_model(graph), folder / "model.onnx")
    return folder / "model.onnx"


def _peft(folder: Path) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "none", "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {name: x for name, x in ARRAYS.items() if x.ndim == 2}
    write(Weights.of(names), folder / "adapter_model.safetensors")
    return folder


def _keras(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py writes what is read here")
    with h5py.File(folder / "model.weights.h5", "w") as file:
        for name, x in ARRAYS.items():
            file[name.replace(".", "/")] = x
    return folder / "model.weights.h5"


def _hdf5(folder: Path) -> Path:
    return _keras(folder).rename(folder / "model.h5")


def _dcp(folder: Path) -> Path:
    torch = pytest.importorskip("torch", reason="torch writes what is read here")
    checkpoint = pytest.importorskip("torch.distributed.checkpoint", reason="torch writes what is read here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writer, about processes that there are not
        checkpoint.save({name: torch.from_numpy(x) for name, x in ARRAYS.items()}, checkpoint_id=folder, no_dist=True)
    return folder


MADE = {
    "torch": _torch,
    "onnx": _onnx,
    "peft": _peft,
    "keras": _keras,
    "hdf5": _hdf5,
    "dcp": _dcp,
}  # the formats that are read only


def sample(format: str, folder: Path) -> Path:
    folder.mkdir()
    if format in MADE:
        return MADE[format](folder)
    if format not in WRITTEN:
        pytest.skip(f"nothing here writes {format}")
    arrays = {"sample": ARRAYS["a.weight"]} if format in ONE else ARRAYS
    path = folder / f"sample{FORMATS[format].suffixes[0]}"
    write(Weights.of(arrays), path)
    return path


@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", FORMATS)
def test_any_format_becomes_any_other(source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = sample(source, tmp_path / "from")
    (tmp_path / "to").mkdir()
    path = tmp_path / "to" / f"sample{FORMATS[target].suffixes[0]}"
    status = main(["convert", str(found), str(path), "--verify"])
    line = capsys.readouterr().err
    before = open(found)
    if target in ONE and len(before) > 1:
        assert (status, line.count("\n")) == (2, 1)
        assert "holds one plain tensor" in line
        assert os.listdir(tmp_path / "to") == []
        return
    assert (status, line) == (0, "")
    after = open(path)
    assert sorted(after) == sorted(before)
    for name, item in before.items():
        assert after[name].spec == item.spec
        assert after[name].array().tobytes() == item.array().tobytes()
    assert not list((tmp_path / "to").glob(".*"))


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(tmp_path: Path) -> None:
    found = sample("safetensors", tmp_path / "from")
    code = "import sys; from steelyard.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "convert", str(found), str(tmp_path / "to.npz"), "--verify", "--force"]
    piped = subprocess.run(words, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    ours, theirs = pty.openpty()
    shown = b""
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # Linux says so that the other end is closed
        pass
    assert job.communicate()[0].decode() == piped.stdout
    assert job.returncode == 0
    for part in (b"writing", b"verifying", b"768/768 bytes"):
        assert part in shown, shown

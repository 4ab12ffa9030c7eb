"""Keras archives: the HDF5 file inside, stored or deflated, and its texts."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.errors import FormatError
from steelyard.formats import detect, open

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py: pip install 'steelyard[formats]'")
VALUES = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)


def inner() -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        file["layers/dense/vars/0"] = VALUES
        file.create_dataset("layers/dense/vars/1", data=VALUES + 1, chunks=(7, 7), compression="gzip")
    return out.getvalue()


def saved(path: Path, method: int = zipfile.ZIP_STORED, **members: Any) -> Path:
    content = {"metadata.json": '{"keras_version": "3.4.1"}', "config.json": '{"class_name": "Lambda"}'}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, text in (content | {"model.weights.h5": inner()} | members).items():
            with archive.open(name, "w") as file:  # as Keras does, with the sizes behind the member
                file.write(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_the_weights_inside_are_read(method: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "model.keras", method)
    assert detect(path) == "keras"
    weights = open(path)
    assert list(weights) == ["layers/dense/vars/0", "layers/dense/vars/1"]
    assert weights["layers/dense/vars/0"].array().tobytes() == VALUES.tobytes()
    assert weights["layers/dense/vars/1"].array().tobytes() == (VALUES + 1).tobytes()
    blocks = [block.copy() for block in weights["layers/dense/vars/0"].blocks(77)]
    assert np.concatenate(blocks).tobytes() == VALUES.tobytes()
    assert weights.meta == {"config.json": '{"class_name": "Lambda"}', "metadata.json": '{"keras_version": "3.4.1"}'}
    assert main(["inspect", str(path)]) == 0
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 0
    capsys.readouterr()
    assert open(tmp_path / "out.safetensors")["layers/dense/vars/1"].array().tobytes() == (VALUES + 1).tobytes()


def test_what_is_wrong_inside_is_told_with_both_names(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = saved(tmp_path / "model.keras", method, **{"model.weights.h5": inner()[:5000]})
        with pytest.raises(FormatError, match=r"model\.keras/model\.weights\.h5"):
            open(path).arrays()
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(FormatError, match=r"expected a member 'model\.weights\.h5'"):
        open(tmp_path / "empty.keras")


def test_a_file_that_changed_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = saved(tmp_path / "model.keras", method)
        weights = open(path)
        saved(path, method, more="x")
        with pytest.raises(FormatError, match="changed since it was opened"):
            weights["layers/dense/vars/0"].array()

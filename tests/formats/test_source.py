"""Folders: which file speaks for one, and that no name leads out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats import locate, open, write
from steelyard.formats.source import LocalFolder

ONE = Weights.of({"a": np.zeros(1, np.float32)})


def test_a_folder_is_opened_by_the_file_that_speaks_for_it(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no file of weights"):
        open(tmp_path)
    write(ONE, tmp_path / "other.safetensors")
    assert locate(tmp_path).path == tmp_path / "other.safetensors"
    write(ONE, tmp_path / "another.safetensors")
    with pytest.raises(FormatError, match=r"2 files could be meant \('another.safetensors', 'other.safetensors'\)"):
        open(tmp_path)
    write(ONE, tmp_path / "model.safetensors")
    assert locate(tmp_path).path == tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "\\x", "..\\x", "c:x", "", "a\0b"])
def test_no_name_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        LocalFolder(tmp_path).source(name)


def test_no_link_leads_out_of_a_folder_but_to_the_blobs_of_the_cache_of_a_hub(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(ONE, tmp_path / "secret.safetensors")
    write(ONE, inner / "open.safetensors")
    (inner / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (inner / "in.safetensors").symlink_to("open.safetensors")
    with pytest.raises(FormatError, match="link that leads out"):
        LocalFolder(inner).source("out.safetensors")
    assert LocalFolder(inner).source("in.safetensors").size
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(ONE, blobs / "0123.safetensors")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123.safetensors")
    assert list(open(snapshot)) == ["a"]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(FormatError, match="link that leads out"):
        open(snapshot)

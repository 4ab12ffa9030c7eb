"""What a process that is killed while it writes leaves behind goes with the next one that writes into the folder."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import steelyard as sy
from steelyard.cli import main
from steelyard.formats.base import TEMPORARY, staging, sweep

KILLED = """
import os, signal, sys
from steelyard.cli import main
from steelyard.formats import base
write = base.Sink.write
def writing(sink, data):
    if sink.tell() > 1000:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(sink, data)
base.Sink.write = writing
main(sys.argv[1:])
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    sy.write(sy.Weights.of({f"w{i}": np.arange(1000, dtype=np.float32).reshape(10, 100) for i in range(4)}), path)
    return path


def killed(*words):
    """Run a command that is killed after it has written some bytes."""
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize("words", ["convert", "convert --verify", "quantize --bits 4"])
def test_a_killed_job_is_cleaned_up_by_the_next(source, tmp_path, words):
    folder = tmp_path / "out"
    folder.mkdir()
    verb, *options = words.split()
    words = [verb, str(source), str(folder / "out.npz"), *options]
    killed(*words)
    assert len(list(folder.rglob(".steelyard-*.tmp"))) == 1
    assert main(words) == 0
    assert os.listdir(folder) == ["out.npz"]


def test_what_is_being_written_and_what_is_not_ours_stays(source, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    names = [".steelyard-0123456789ab.tmp.bak", ".steelyard-mine.tmp", "steelyard-0123456789ab.tmp"]
    for name in names:
        (folder / name).touch()
    (folder / ".steelyard-0123456789ab.tmp").symlink_to(source)
    (folder / ".steelyard-ba9876543210.tmp").mkdir()
    before = set(os.listdir(folder))
    with staging(folder / "a.npz", folder / "a.npz") as (_, temporary):
        sy.write(sy.open(source), folder / "b.npz")
        sweep(folder)
        assert temporary.exists()
        assert set(os.listdir(folder)) == {*before, "b.npz", temporary.name}
        assert TEMPORARY.fullmatch(temporary.name)
    assert set(os.listdir(folder)) == {*before, "b.npz"}
    assert source.exists()

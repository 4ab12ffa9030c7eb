"""ONNX files run by a process of their own. Nothing here depends on how fast the machine is."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.deploy import apart
from steelyard.deploy.onnx import write_onnx
from steelyard.errors import ModelError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    made = {"narrow": nn.Linear(64, 8), "wide": nn.Sequential(nn.Linear(64, 40_000), nn.Linear(40_000, 8))}
    for name, net in made.items():
        write_onnx(net, [torch.zeros(2, 64)], folder / f"{name}.onnx")
    return folder / "narrow.onnx", folder / "wide.onnx", made["narrow"]


def test_files_take_turns(files):
    found = apart.race(files[:2], [np.zeros((1, 64), np.float32)], rounds=5)
    assert found.shape == (2, 5)
    assert (found > 0).all()
    assert np.median(found[1]) > np.median(found[0])  # 46,000 times as much to do


@pytest.mark.skipif(not apart._STATUS.exists(), reason="only Linux says")
def test_memory_is_that_of_the_weights_at_least(files):
    narrow, wide = (apart.peak(file, [np.zeros((1, 64), np.float32)]) for file in files[:2])
    assert narrow < 30e6
    assert wide - narrow > 72 * 40_000 * 4


def test_a_system_that_does_not_say_is_none(files, monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "_STATUS", tmp_path / "status")
    assert apart._peak(files[0], [np.zeros((1, 64), np.float32)]) is None


def test_answers_are_those_of_the_model_and_of_this_file(files):
    batches = [torch.randn(3, 64), torch.randn(2, 64)]
    digest, outputs = apart.answers(files[0], [[x.numpy()] for x in batches])
    assert digest == hashlib.sha256(files[0].read_bytes()).hexdigest()
    for x, found in zip(batches, outputs, strict=True):
        assert np.allclose(found, files[2](x).detach(), atol=1e-5)


def test_a_process_that_fails_is_one_line(files, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(files[0].read_bytes()[:50])
    with pytest.raises(ModelError, match=r"the process that runs broken\.onnx failed: ") as error:
        apart.answers(tmp_path / "broken.onnx", [[np.zeros((1, 64), np.float32)]])
    assert "\n" not in str(error.value)

"""ONNX files of eight bits: each form computes about the same in fewer bytes, or says why it cannot be made."""

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.deploy.int8 import FORMS, quantized
from steelyard.deploy.onnx import write_onnx
from steelyard.deploy.session import OnnxModule
from steelyard.errors import ModelError, UnknownNameError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 5))
    x = torch.rand(32, 1, 8, 8)
    file = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    write_onnx(net, [x], file)
    return net, x, file


def test_a_session_is_a_module(made):
    net, x, file = made
    assert torch.allclose(OnnxModule(file)(x), net(x), atol=1e-5)
    assert OnnxModule(file)(x[:3]).shape == (3, 5)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_computes_about_the_same_in_fewer_bytes(made, form, tmp_path):
    net, x, file = made
    quantized(file, tmp_path / "small.onnx", form, [[x.numpy()]])
    found, expected = OnnxModule(tmp_path / "small.onnx")(x), net(x).detach()
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < error < 0.1
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * file.stat().st_size


def test_the_ranges_are_those_of_the_batches(made, tmp_path):
    """Calibrated on a hundredth of the inputs, larger ones are cut off."""
    net, x, file = made
    quantized(file, tmp_path / "low.onnx", "int8", [[(x / 100).numpy()]])
    found = OnnxModule(tmp_path / "low.onnx")(x)
    assert (found - net(x)).abs().max() > 0.5 * net(x).std()


def test_errors(made, tmp_path):
    _, x, file = made
    with pytest.raises(UnknownNameError, match="int8"):
        quantized(file, tmp_path / "small.onnx", "int9", [[x.numpy()]])
    (tmp_path / "broken.onnx").write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"asked for 'int8', fails: ") as error:
        quantized(tmp_path / "broken.onnx", tmp_path / "small.onnx", "int8", [[x.numpy()]])
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=r"loading broken\.onnx, fails"):
        OnnxModule(tmp_path / "broken.onnx")


def test_what_the_batches_give_is_called_by_the_names_of_the_file(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(3, 16)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    torch.manual_seed(0)
    net, x, y = Two(), torch.randn(8, 4), torch.randn(8, 3)
    write_onnx(net, [x, y], tmp_path / "two.onnx")
    quantized(tmp_path / "two.onnx", tmp_path / "small.onnx", "int8", [[x.numpy(), y.numpy()]])
    assert np.allclose(OnnxModule(tmp_path / "small.onnx")(x, y), net(x, y).detach(), atol=0.1)

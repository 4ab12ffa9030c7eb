"""ONNX files get their name only after ONNX Runtime agreed with PyTorch."""

import os

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from steelyard.deploy import onnx
from steelyard.deploy.onnx import export_onnx
from steelyard.errors import ModelError, VerdictError


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), (1, 8, 8)), (Recurrent(), (6, 4))],
)
def test_the_file_computes_the_same_for_any_batch(model, shape, tmp_path):
    path = tmp_path / "model.onnx"
    (row,) = export_onnx(model, [torch.randn(5, *shape)], path).rows
    assert row["bytes"] == path.stat().st_size
    assert row["largest difference"] < 1e-5
    assert row["same decision"] == 1.0
    x = torch.randn(11, *shape)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_file_that_disagrees_gets_no_name(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(onnx, "_compare", lambda *_: (0.5, 1.0, 0.9))
    with pytest.raises(VerdictError, match=r"differs from PyTorch by 0.5, allowed 0.0001"):
        export_onnx(nn.Linear(4, 2), [torch.randn(3, 4)], path)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_difference_that_is_not_a_number_is_a_disagreement(tmp_path):
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(VerdictError):
        export_onnx(model, [torch.randn(3, 4)], tmp_path / "model.onnx")


def test_a_model_that_depends_on_its_values_is_refused(tmp_path):
    class Fickle(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Fickle cannot be exported to ONNX") as error:
        export_onnx(Fickle(), [torch.randn(3, 4)], tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_model_stays_in_the_mode_that_it_was_in(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    export_onnx(model, [torch.randn(3, 4)], tmp_path / "model.onnx")
    assert all(module.training for module in model.modules())

"""The verb init: a file of first weights, and a table that says of each layer how it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import steelyard as sy

NET = ("breast-cancer", "first.safetensors", "--model", "mlp(widths=(24, 12))")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(result) -> dict[str, dict]:
    assert result.status == 0, result.err
    return {row["layer"]: row for row in json.loads(result.out)["rows"]}


def test_the_gain_of_what_follows_each_layer(steelyard):
    found = rows(steelyard("init", *NET, "--scheme", "orthogonal", "--gain", "auto", "--seed", 3, "--json"))
    assert [(n, r["order"], r["activation"]) for n, r in found.items()] == [
        ("fc1", 1, "relu"),
        ("fc2", 2, "relu"),
        ("head", 3, "linear"),
    ]
    assert found["fc1"]["done"] == "weight orthogonal, gain 1.414"
    weights = sy.open("first.safetensors")
    assert {"task": "breast-cancer", "seed": "3", "scheme": "Orthogonal(gain='auto')"}.items() <= weights.meta.items()
    w = weights["fc2.weight"].array()
    assert np.allclose(w @ w.T, 2 * np.eye(12), atol=1e-5)
    assert not weights["fc1.bias"].array().any()


def test_by_data_every_layer_has_scale_1_and_the_seed_decides(steelyard):
    found = rows(steelyard("init", *NET, "--json"))
    assert [row["std"] for row in found.values()] == pytest.approx([1, 1, 1], abs=1e-4)
    first = Path("first.safetensors").read_bytes()
    assert steelyard("init", *NET, "--force").status == 0
    assert Path("first.safetensors").read_bytes() == first
    assert steelyard("init", *NET, "--force", "--seed", 1).status == 0
    assert Path("first.safetensors").read_bytes() != first


FACTORY = """
from torch import nn

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(30, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

class Broken(Blocks):
    def forward(self, x):
        return self.head(x)
"""


def test_residual_branches_of_a_model_of_ones_own(steelyard):
    Path("own_blocks.py").write_text(FACTORY)
    words = ("init", "breast-cancer", "w.npz", "--model", "own_blocks:Blocks", "--scheme", "he", "--residual", "gpt2")
    found = rows(steelyard(*words, "--json"))
    assert found["blocks.3.2"]["done"] == "weight he; times 0.5 (gpt2: 4 residual sums)"
    assert found["blocks.3.0"]["activation"] == "tanh"
    assert sy.open("w.npz")["blocks.0.2.weight"].spec.shape == (16, 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scheme", "hee"], "there is no initialiser 'hee'; did you mean 'he'?"),
        (["--scheme", "he", "--gain", "2"], "he: there is no setting 'gain'"),
        (["--gain", "2"], "--gain goes with a scheme such as lecun"),
        (["--scheme", "lecun", "--gain", "much"], "lecun.gain: 'much' is not a choice"),
        (["--scheme", "he", "--residual", "gpt2"], "residual='gpt2' scales residual branches, and Sequential has none"),
        (["--scheme", "he", "--residual", "gpt"], "did you mean 'gpt2'?"),
        (["--residual", "gpt2"], "residual= goes with the other schemes"),
        (["--model", "own_broken:Broken"], "own_broken.py:18: RuntimeError"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_file(steelyard, words, said):
    Path("own_broken.py").write_text(FACTORY)
    result = steelyard("init", *NET[:2], *words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not [name for name in os.listdir() if name.startswith("first")]

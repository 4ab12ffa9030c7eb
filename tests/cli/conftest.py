"""A small file of weights, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import steelyard as sy
from steelyard.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def steelyard(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a verb; what it printed and its status come back."""

    def run(*words: object) -> Result:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "model.embed.weight": rng.normal(size=(40, 16)).astype(np.float32),
        "model.layer.weight": rng.normal(size=(16, 32)).astype(np.float32),
        "model.layer.bias": rng.normal(size=(32,)).astype(np.float32),
        "model.steps": np.int64(7).reshape(()),
    }
    path = tmp_path / "model.safetensors"
    sy.write(sy.Weights.of(weights, ties={"head.weight": "model.embed.weight"}), path)
    return path

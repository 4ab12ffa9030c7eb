"""The verb ``score``: a file of evidence, and what it refuses before it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steelyard import formats
from steelyard.cli import main


@pytest.fixture
def weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "w.safetensors"
    assert main(["train", "digits", str(path), "--epochs", "1"]) == 0
    capsys.readouterr()
    return path


@pytest.mark.parametrize("kind", ["hessian", "norms", "moments", "fisher", "gradient", "taylor"])
def test_each_kind_is_a_file_of_the_names_of_the_weights(weights: Path, kind: str, capsys) -> None:
    target = weights.with_name("e.safetensors")
    assert main(["score", "digits", str(weights), str(target), "--kind", kind, "--batches", "2", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out.splitlines()[0])["rows"]}
    found = formats.open(target)
    assert set(found) == names
    assert names <= set(formats.open(weights))
    assert json.loads(found.meta["evidence"])["kind"] == kind


def test_what_is_there_is_not_replaced_and_other_weights_do_not_fit(weights: Path, capsys) -> None:
    target = weights.with_name("e.safetensors")
    target.write_text("mine")
    assert main(["score", "digits", str(weights), str(target)]) == 2
    assert target.read_text() == "mine"
    assert main(["score", "breast-cancer", str(weights), str(weights.with_name("new.safetensors"))]) == 2
    assert main(["score", "digits", str(weights), str(weights.with_name("new.safetensors")), "--where", "no*"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "nothing chooses a weight matrix" in lines[2]
    assert not weights.with_name("new.safetensors").exists()

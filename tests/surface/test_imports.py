"""The direction of imports is what docs/design.md says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_direction_of_imports_is_kept():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_document_and_the_contract_name_the_same_layers():
    text = (ROOT / "docs" / "design.md").read_text()
    drawn = text.partition("checked by import-linter")[2].split("```")[1].split()
    told = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("\n]")[0]
    named = [word.strip("()").removeprefix("steelyard.") for word in told.replace('"', " ").replace(",", " ").split()]
    there = [word for word in drawn if word != "|" and (ROOT / "src" / "steelyard" / word).exists()]
    assert [w for w in named if w not in ("|", ":")] == [*there, "errors"]

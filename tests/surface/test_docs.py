"""The documents say what is true: generated pages are current, links lead somewhere, and the README's example runs."""

import importlib.util
import re
from pathlib import Path

import pytest

from steelyard.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("design", "files", "generalization", "loop", "mup", "processes")),
]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_current():
    assert generator().main(["--check"]) == 0, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readme_names_every_verb():
    text = (ROOT / "README.md").read_text()
    assert [name for name in VERBS._own if f"`{name}" not in text] == []


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 25
    exec(compile(code.replace("epochs=20", "epochs=4"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("healthy\n")
    before, after = map(int, re.search(r"^(\d+) (\d+)$", printed, re.M).groups())
    assert (tmp_path / "small.safetensors").stat().st_size == after < before / 8


def test_the_examples_of_the_page_on_width_run(capsys):
    seen: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mup.md").read_text(), re.S):
        exec(compile(code, "docs/mup.md", "exec"), seen)
    assert re.fullmatch(r"mup flat \[.*\]\nstandard grows \[.*\]\n", capsys.readouterr().out)


def test_the_examples_of_the_page_on_generalization_run(capsys):
    seen: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generalization.md").read_text(), re.S):
        exec(compile(code, "docs/generalization.md", "exec"), seen)
    way, known, gap, folds, spoilt, families = capsys.readouterr().out.splitlines()
    assert way == "['fc1', 'fc2', 'head', 'all'] True"
    assert known == "30"
    assert re.fullmatch(
        r"\{'train': 1\.0, 'valid': 0\.\d+, 'test': 0\.\d+, 'gap, valid': 0\.\d+, 'gap, test': 0\.\d+\}", gap
    )
    assert float(folds.split()[0]) > 0.9
    assert folds.endswith("True")
    assert (spoilt, families) == ("True", "True")


def test_the_examples_of_the_page_on_loops_run(capsys):
    seen: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loop.md").read_text(), re.S):
        exec(compile(code, "docs/loop.md", "exec"), seen)
    assert capsys.readouterr().out == "True\nTrue 0\nTrue 4\n"


def test_the_example_in_docs_files_is_a_layout():
    import json

    from steelyard.formats.manifest import Manifest

    (text,) = re.findall(r"```\n(\{\"version\".*?)```", (ROOT / "docs" / "files.md").read_text(), re.S)
    found = Manifest.parse(json.dumps(json.loads(text)), "docs/files.md")
    assert found.packed["fc1.weight"].keys() == [
        "fc1.weight/mask/stream",
        "fc1.weight/values/codes/stream",
        "fc1.weight/values/codebook",
    ]

"""What everybody sees: what an import costs, that every table matches its files, and that every verb explains itself."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest

import steelyard as sy
from steelyard.cli import VERBS, main
from steelyard.codecs import CODECS
from steelyard.core.registry import Registry
from steelyard.edit import STEPS
from steelyard.formats import FORMATS
from steelyard.init import INITS
from steelyard.learn.task import build_seeded
from steelyard.learn.watch.log import Log

TABLES: dict[str, Registry] = {"formats": FORMATS, "codecs": CODECS, "init": INITS, "edit": STEPS, "cli": VERBS}
BESIDES = {  # files of a folder that are no entries of its table
    "formats": {"base", "config", "fileset", "layout", "manifest", "module", "ranges", "remote", "resuming", "source"},
    "codecs": set(),
    "init": {"base"},
    "edit": {"kronecker", "evidence", "importance", "transfer"},
    "cli": {"entry", "options", "models", "progress", "rewriting", "training"},
}
HEAVY = ("torch", "numpy", "click", "numba", "rich", "plotly", "sklearn", "yaml", "ml_dtypes")
OWN = [(table, name) for table, registry in TABLES.items() for name in registry._own]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def cpu_seconds(*command: str) -> float:
    """The least processor time of several runs: other work on the machine lengthens the wall time, not this."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def imported(code: str) -> set[str]:
    return set(json.loads(python(f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))").splitlines()[-1]))


def test_importing_the_package_brings_nothing_heavy():
    assert not imported("import steelyard") & set(HEAVY)
    assert not imported("import steelyard; steelyard.where; steelyard.chain; steelyard.open") & set(HEAVY)


@pytest.mark.parametrize("module", ["cli", "cli.entry", "cli.options", "formats", "report.text", "explain.inventory"])
def test_the_way_to_a_verb_brings_no_arrays(module):
    assert not imported(f"import steelyard.{module}") & {"torch", "numpy", "numba", "plotly", "rich", "yaml"}


def test_importing_takes_little_time():
    assert cpu_seconds(sys.executable, "-c", "import steelyard") - cpu_seconds(sys.executable, "-c", "pass") < 0.06


def test_inspecting_brings_no_arrays_and_takes_little_time(tmp_path):
    path = tmp_path / "model.safetensors"
    sy.write(sy.Weights.of({f"layers.{i}.weight": np.zeros((8, 8), np.float32) for i in range(300)}), path)
    brought = imported(f"from steelyard.cli import main; main(['inspect', {str(path)!r}])")
    assert not brought & {"torch", "numpy", "numba", "plotly", "rich", "yaml"}
    assert cpu_seconds(sys.executable, "-m", "steelyard", "inspect", str(path)) < 0.25


@pytest.mark.parametrize(("table", "name"), OWN)
def test_every_row_imports_and_says_what_it_is(table, name):
    row = TABLES[table]._own[name]
    assert row.about
    assert len(row.about) <= 90
    entry = TABLES[table][name]
    if table in ("codecs", "edit", "formats"):
        assert entry.name == name
    assert getattr(entry, "__doc__", None) or getattr(entry, "help", None)


@pytest.mark.parametrize("table", TABLES)
def test_every_file_has_a_row(table):
    folder = importlib.import_module(f"steelyard.{table}")
    files = {m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")}
    rows = {row.path.partition(":")[0].removeprefix(f"steelyard.{table}.") for row in TABLES[table]._own.values()}
    assert files - BESIDES[table] == {path.partition(".")[0] for path in rows}


@pytest.mark.parametrize("name", sy.__all__)
def test_every_exported_name_is_there_and_documented(name):
    assert getattr(sy, name).__doc__


def test_the_facade_says_what_it_has():
    assert set(sy.__all__) <= set(dir(sy))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sy.nonsense  # noqa: B018
    assert sy.__version__


def verbs():
    for name in VERBS._own:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in ("run", "claims") else [], id=name)


@pytest.mark.parametrize("name", VERBS._own)
def test_every_verb_has_help_an_example_and_a_file(name, capsys):
    verb = VERBS[name]
    assert isinstance(verb, click.Command)
    assert verb.name == name
    assert VERBS._own[name].path == f"steelyard.cli.{name}:verb"
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert examples(verb), "the help must end in 'Example:' and a command"
    assert "Example:" in shown
    for option in verb.params:
        assert isinstance(option, click.Argument) or option.help, f"--{option.name} has no help"
    assert {"--json", "--csv", "--html"} <= {o for p in verb.params for o in p.opts}


@pytest.mark.parametrize("name", list(verbs()))
def test_every_example_runs(name, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    shapes = {"model.a.weight": (16, 8), "model.a.bias": (16,), "model.b.weight": (4, 16)}
    monkeypatch.chdir(tmp_path)
    sy.write(sy.Weights.of({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}), "model.safetensors")
    fisher = {n: rng.random(s).astype(np.float32) for n, s in shapes.items()}
    sy.write(sy.Weights.of(fisher), "fisher.safetensors")
    hessians = {n: np.eye(s[1], dtype=np.float32)[None] for n, s in shapes.items() if len(s) == 2}
    about = {"evidence": json.dumps({"kind": "hessian", "inputs first": [], "samples": {}})}
    sy.write(sy.Weights.of(hessians, meta=about), "evidence.safetensors")
    shapes = {"head.weight": (2, 30), "head.bias": (2,)}  # those of the linear model on breast-cancer
    sy.write(
        sy.Weights.of({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}), "trained.safetensors"
    )
    Log("run.sqlite").close()
    if name == "sample":
        sy.write(sy.from_module(build_seeded(sy.task("text", model="rnn"))), "novel.safetensors")
    for command in examples(VERBS[name]):
        start = time.monotonic()
        assert main([*command, "--json"]) in (0, 1), command
        out = capsys.readouterr().out
        tables = [json.loads(line) for line in out.splitlines()]
        assert tables, command
        for table in tables:
            assert {"title", "columns", "rows", "meta"} == set(table)
            assert all(set(row) == {c["name"] for c in table["columns"]} for row in table["rows"])
        assert time.monotonic() - start < 300


def examples(verb: click.Command) -> list[list[str]]:
    lines = (verb.help or "").partition("Example:")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("steelyard ")]


@pytest.mark.parametrize("name", VERBS._own)
def test_every_verb_refuses_an_unknown_option(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([name, "--no-such-option"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"see 'steelyard {name} --help'" in captured.err
    assert os.listdir(tmp_path) == []


def test_the_package_is_typed_and_carries_its_page():
    root = Path(sy.__file__).parent
    assert (root / "py.typed").exists()
    assert (root / "report" / "page.css").exists()
    assert (root / "report" / "page.js").exists()
    assert (root / "report" / "svg.css").exists()

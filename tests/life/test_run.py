"""`steelyard run` from end to end: what it writes, what it measures, and how it ends when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from steelyard import formats, life
from steelyard.errors import VerdictError
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import evaluate
from steelyard.learn.task import build_seeded
from steelyard.life import stages
from steelyard.life.recipe import load, parse
from steelyard.life.record import make_task

ROOT = Path(__file__).parents[2]
SMALL = """
task: breast-cancer
model: {mlp: {widths: [32, 16]}}
train: {epochs: 8}
deep_compression: {tolerance: 0.05, sparsity: 0.7, prune_stages: 2, prune_epochs: 3, share_epochs: 2, k: 8}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def steelyard(*arguments, cwd):
    command = [sys.executable, "-m", "steelyard", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=False, cwd=cwd, env=ENVIRONMENT, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("life") / "out"
    said = []
    return life.run(parse(SMALL, "small"), out, say=said.append), out, said


def test_the_folder_holds_what_was_promised(done):
    _, out, said = done
    names = {"weights.safetensors", "small.safetensors", "model.onnx", "report.html", "tables.json", "recipe.yaml"}
    assert {path.name for path in out.iterdir()} == names
    assert [line.partition(":")[0].partition(" ")[0] for line in said] == [
        "started", "trained", "explained", "pruned", "shared", "coded", "re-read", "shipped",
    ]  # fmt: skip


def test_every_size_in_the_table_is_that_of_a_file(done):
    found, out, _ = done
    rows = {row["stage"]: row for row in found.stages.rows}
    assert list(rows) == ["started", "trained", "pruned", "shared", "coded", "re-read"]
    for stage, name in (("trained", "weights.safetensors"), ("re-read", "small.safetensors")):
        assert rows[stage]["bytes"] == (out / name).stat().st_size
    assert rows["re-read"]["ratio"] == rows["trained"]["bytes"] / rows["re-read"]["bytes"] > 1.5
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows.values())


def test_the_last_row_is_what_the_file_alone_gives(done):
    found, out, _ = done
    recipe = load(out / "recipe.yaml")
    assert recipe == found.recipe
    task = make_task(recipe.task, recipe.model, recipe.seed)
    model = build_seeded(task, 99)
    into_module(formats.open(out / "small.safetensors"), model)
    assert evaluate(model, task).rows[0]["value"] == found.stages.rows[-1]["accuracy"]


def test_the_small_file_opens_elsewhere_and_says_its_task(done):
    _, out, _ = done
    with safe_open(out / "small.safetensors", "np") as file:
        assert list(file.keys()) == ["all"], "so small that its header lies within the data"
    with safe_open(out / "weights.safetensors", "np") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118 - a safe_open is no mapping
    assert formats.open(out / "small.safetensors").meta["task"] == "breast-cancer"


def test_every_table_is_in_tables_json(done):
    found, out, _ = done
    tables = json.loads((out / "tables.json").read_text())
    titles = [table["title"] for table in tables]
    assert titles[0] == "Stages"
    assert len(tables[0]["rows"]) == 6
    drawn = [table.title for chapter in found.chapters for table in (*chapter.tables, *chapter.drawn.values())]
    assert titles[1:] == drawn
    assert all({c["name"] for c in table["columns"]} == set(row) for table in tables for row in table["rows"])


def test_the_report_stands_alone(done):
    _, out, _ = done
    text = (out / "report.html").read_text()
    page = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "breast-cancer" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    for heading in ("Stages", "Start", "Train", "Explain", "Shrink", "Ship"):
        assert re.search(rf"<h2[^>]*>{heading}<", page), heading


def test_the_same_seed_gives_the_same_bytes(done, tmp_path):
    _, out, _ = done
    again = life.run(parse(SMALL + "\nexplain: null\nship: null", "small"), tmp_path / "again")
    assert [row["stage"] for row in again.stages.rows][-1] == "re-read"
    for name in ("weights.safetensors", "small.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_smallest_file_within_a_tolerance_is_proven(tmp_path):
    text = "task: breast-cancer\nmodel: {mlp: {widths: [32, 16]}}\ntrain: {epochs: 8}\nexplain: null\nship: null\n"
    found = life.run(parse(text + "shrink: {tolerance: 0.1, epochs: 0}", "x"), tmp_path / "out")
    rows = {row["stage"]: row for row in found.stages.rows}
    assert list(rows) == ["started", "trained", "re-read"]
    assert rows["re-read"]["bytes"] == (tmp_path / "out" / "small.safetensors").stat().st_size
    assert rows["re-read"]["ratio"] > 2
    proof = next(chapter for chapter in found.chapters if chapter.name == "Shrink").tables[0].rows[0]
    assert proof["accuracy"] == pytest.approx(rows["re-read"]["accuracy"])
    assert proof["loss at most"] <= 0.1
    assert not found.failures


def test_what_cannot_be_proven_is_a_failure_that_is_said(tmp_path, monkeypatch):
    def refuse(*_given, **_options):
        raise VerdictError("nothing is written")

    monkeypatch.setattr(stages, "shrink", refuse)
    text = "task: breast-cancer\ntrain: {epochs: 3}\nexplain: null\nship: null\nshrink: {tolerance: 0.1}"
    found = life.run(parse(text, "x"), tmp_path / "out")
    assert found.failures == ["nothing is written"]
    assert not (tmp_path / "out" / "small.safetensors").exists()
    assert "No smaller file: nothing is written." in (tmp_path / "out" / "report.html").read_text()


def test_a_goal_that_is_missed_is_said_and_ends_with_status_1(tmp_path):
    text = yaml.safe_load(SMALL) | {"shrink": None, "ship": None, "explain": None}
    text["train"] = {"epochs": 1, "rate": 1e-6, "goal": 0.99}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(text))
    found = steelyard("run", "my.yaml", "--out", "out", cwd=tmp_path)
    assert found.returncode == 1
    assert "the recipe's goal is 0.99" in found.stderr.splitlines()[-1]
    assert "Not reached" in (tmp_path / "out" / "report.html").read_text()


def test_the_documented_example_runs_from_anywhere(tmp_path):
    found = steelyard("run", ROOT / "examples" / "own_model" / "wine.yaml", "--out", "wine", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    stages = json.loads(found.stdout.splitlines()[0])
    assert stages["rows"][-1]["ratio"] > 10
    assert stages["meta"]["task"] == "wine"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("task: digist", "did you mean 'digits'?"),
        ("task: digits\nmodel: cn", "did you mean 'cnn'?"),
        ("task: digits\nmodel: {cnn: {widht: 3}}", "has no option 'widht'"),
        ("task: nowhere:task", "there is no module 'nowhere'"),
        ("task: digits\ntrian: {}", "did you mean 'train'?"),
        ("task: digits\nstart: {scheme: hee}", "did you mean 'he'?"),
        ("task: digits\ntrain: {optimizer: adamm}", "did you mean 'adam"),
        ("task: digits\nmove: {target: digist}", "did you mean 'digits'?"),
        ("task: digits\ntrain: {goal: 98}", "accuracy is a fraction"),
        ("task: digits\nshrink: {tolerance: 0.001}", "450 test examples cannot prove 0.001"),
    ],
)
def test_a_mistake_ends_in_one_line_and_nothing_is_written(recipe, said, tmp_path, monkeypatch, capsys):
    from steelyard.cli import main

    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(recipe)
    assert main(["run", "my.yaml", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert os.listdir() == ["my.yaml"]


def test_a_metric_of_unsaid_direction_is_not_taken_for_success(tmp_path):
    """Less error counts as worse unless the task says otherwise: such a run must not end as if all were well."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from steelyard.learn.measures import cross_entropy\n"
        "from steelyard.learn.tasks import task\n"
        "def odd(seed=0):\n"
        "    return replace(task('breast-cancer', seed=seed), metrics={'surprise': cross_entropy})\n"
    )
    (tmp_path / "my.yaml").write_text("task: mine:odd\ntrain: {epochs: 3}")
    found = steelyard("run", "my.yaml", "--out", "out", cwd=tmp_path)
    assert found.returncode == 2
    assert "training made 'surprise' worse" in found.stderr
    assert "name it in Task(lower_is_better=...)" in found.stderr
    assert "small.safetensors" not in os.listdir(tmp_path / "out")


def test_the_model_of_the_task_is_taken_where_the_recipe_names_none(tmp_path):
    found = life.run(parse("task: breast-cancer\ntrain: {epochs: 3}\nshrink: null\nship: null", "x"), tmp_path / "out")
    assert list(formats.open(tmp_path / "out" / "weights.safetensors")) == ["head.weight", "head.bias"]
    assert load(tmp_path / "out" / "recipe.yaml").model is None
    assert found.recipe.threads == 1


def test_a_net_of_bare_parameters_lives_too(tmp_path, monkeypatch):
    """It has no layer whose signal or coefficients could be shown, and the report says so."""
    (tmp_path / "bare.py").write_text(
        "import torch\n"
        "class Bare(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.zeros(30, 2))\n"
        "    def forward(self, x):\n"
        "        return x @ self.w\n"
    )
    text = "task: breast-cancer\nmodel: bare:Bare\ntrain: {epochs: 5}\nship: null\ndeep_compression: {tolerance: 0.1, sparsity: 0.3}"
    found = life.run(parse(text, "x"), tmp_path / "out", tmp_path)
    said = {chapter.name: chapter.text for chapter in found.chapters}
    assert "No signal is shown: no layer with weights runs" in said["Start"]
    assert "No coefficients are shown" in said["Explain"]
    assert found.stages.rows[-1]["stage"] == "re-read"


def test_ctrl_c_leaves_no_half_written_file(tmp_path):
    command = [sys.executable, "-m", "steelyard", "run", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / "weights.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "steelyard: interrupted; no file was left half-written"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"recipe.yaml", "weights.safetensors"}
    assert len(formats.open(tmp_path / "out" / "weights.safetensors").arrays()) == 8

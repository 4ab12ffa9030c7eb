"""The verb ``signal``: its text, its data, its page and its exit status; and the same from ``explain --what signal``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steelyard.cli import main

NET = ["digits", "--model", "mlp(widths=(32, 32))"]


@pytest.mark.parametrize("start", [[], ["--start", "data"], ["--start", "auto"]])
def test_a_healthy_start(start: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signal", *NET, *start]) == 0
    text = capsys.readouterr().out
    assert text.startswith("scale against depth: forwards >, backwards <\n")
    assert "fc2" in text
    assert "verdict: healthy" in text


@pytest.mark.parametrize(
    ("start", "verdict"), [("constant(value=0.1)", "symmetric"), ("normal(std=9)", "exploding signal")]
)
def test_a_bad_start_is_a_no(start: str, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signal", *NET, "--start", start, "--json"]) == 1
    out, err = capsys.readouterr()
    (table,) = (json.loads(line) for line in out.splitlines())
    assert table["meta"]["verdict"] == verdict
    assert table["meta"]["first"] in err
    assert err.startswith(f"steelyard: {verdict}, first at the layer")
    assert err.count("\n") == 1
    assert {"weights", "weight gradient", "sgd step", "adam step"} <= set(table["rows"][0])


def test_the_rate_scales_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for rate in ("1e-3", "1e-2"):
        main(["signal", *NET, "--rate", rate, "--json"])
        steps.append(json.loads(capsys.readouterr().out)["rows"][0]["sgd step"])
    assert steps[1] == pytest.approx(10 * steps[0])


def test_weights_of_a_file_and_the_same_answer_from_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, page = str(tmp_path / "w.safetensors"), tmp_path / "page.html"
    assert main(["train", *NET, weights, "--epochs", "1"]) == 0
    capsys.readouterr()
    found = []
    for words in (["signal", "digits", weights], ["explain", "digits", weights, "--what", "signal"]):
        assert main([*words, *NET[1:], "--json", "--html", str(page)]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"])
        assert "scale against depth" in page.read_text()
    assert found[0] == found[1]


def test_a_start_and_a_file_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signal", "digits", "some.safetensors", "--start", "he"]) == 2
    assert "give one" in capsys.readouterr().err


def test_training_that_starts_badly_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start, words in (("constant(value=0.1)", "alarm, step 3: symmetric, first at the layer 'fc1': "), ("he", "")):
        assert main(["train", *NET, str(tmp_path / f"{start}.safetensors"), "--epochs", "1", "--start", start]) == 0
        err = capsys.readouterr().err
        assert err.startswith(words) if words else err == ""


def test_the_way_of_the_weights_is_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    told = ["--epochs", "3", "--trajectory", "--json", "--html", str(page)]
    assert main(["train", *NET, str(tmp_path / "w.safetensors"), *told]) == 0
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    way, known = tables[2:]
    assert [row["layer"] for row in way["rows"]][-1] == "all"
    assert all(row["path"] >= row["net"] > 0 for row in way["rows"])
    assert sorted({row["epoch"] for row in known["rows"]}) == [0, 1, 2, 3]
    html = page.read_text(encoding="utf-8")
    assert html.count("data-figure=") == 2


def test_folds_are_trained_and_tested_besides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *NET, str(tmp_path / "w.safetensors"), "--epochs", "2", "--folds", "3", "--json"]) == 0
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    seen, folds = tables[2:]
    assert {row["part"] for row in seen["rows"]} >= {"train", "valid", "test", "gap, test"}
    assert [row["fold"] for row in folds["rows"]] == [0, 1, 2]
    assert sum(row["test examples"] for row in folds["rows"]) == 1797

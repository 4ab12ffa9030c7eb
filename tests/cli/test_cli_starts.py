"""The verb ``starts``: its bars, its data and its page; and numbers on the command line that are none."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.types import FloatParamType

from steelyard.cli import VERBS
from steelyard.cli.options import Number

QUICK = ("breast-cancer", "--seeds", "1", "--examples", "16")
DEEP = (*QUICK, "--depth", "2", "--depth", "20", "--width", "16", "--start", "he", "--start", "normal(std=0.01)")


def test_the_text_has_a_bar_for_each_start_the_best_first(steelyard) -> None:
    result = steelyard("starts", *DEEP)
    assert result.status == 0
    lines = [line for line in result.out.splitlines() if line.strip().startswith(("2 ", "20 "))]
    assert [line.split()[:3] for line in lines] == [
        ["2", "1", "he"], ["2", "2", "normal(std=0.01)"], ["20", "1", "he"], ["20", "2", "normal(std=0.01)"],
    ]  # fmt: skip
    bars = [line.count("█") for line in lines]
    assert bars[0] > 10 > bars[3] == 0


def test_data_and_a_page_with_a_line_for_each_start(steelyard, tmp_path: Path) -> None:
    page = tmp_path / "starts.html"
    result = steelyard("starts", *DEEP, "--json", "--html", page)
    table = json.loads(result.out)
    assert table["meta"]["best"] == {"2": "he", "20": "he"}
    assert {"score", "taught", "steady", "forwards", "backwards"} <= set(table["rows"][0])
    assert "score by depth" in page.read_text()


def test_by_training_the_metric_ranks(steelyard) -> None:
    result = steelyard(
        "starts", *QUICK, "--model", "linear", "--start", "he", "--start", "zeros", "--train", "20", "--json"
    )
    table = json.loads(result.out)
    assert table["meta"]["steps"] == 20
    assert [column["name"] for column in table["columns"]][:3] == ["rank", "start", "accuracy"]
    assert "accuracy" in steelyard("starts", *QUICK, "--start", "he", "--train", "5").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--depth", "2", "--model", "linear"), "leave --model out"),
        (("--start", "glorot"), "did you mean 'xavier'?"),
        (("--examples", "4"), "4 is not in the range"),
    ],
)
def test_wrong_use(steelyard, words: tuple[str, ...], message: str) -> None:
    result = steelyard("starts", "breast-cancer", *words)
    assert result.status == 2
    assert message in result.err


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "words", [("signal", "breast-cancer", "--rate"), ("train", "breast-cancer", "x.safetensors", "--weight-decay")]
)
def test_a_number_is_finite(steelyard, words: tuple[str, ...], text: str) -> None:
    result = steelyard(*words[:-1], f"{words[-1]}={text}")
    assert result.status == 2
    assert "is not a finite number" in result.err or "not in the range" in result.err


def test_no_option_takes_a_number_in_another_way() -> None:
    """A float() of click also takes 'nan': every option that is a number goes through one type."""
    options = [(name, p) for name in VERBS._own for p in VERBS[name].params if isinstance(p, click.Option)]
    kinds = [(name, p.name, p.type) for name, p in options if isinstance(p.type, FloatParamType)]
    assert len(kinds) >= 5
    assert [(name, option) for name, option, kind in kinds if not isinstance(kind, Number)] == []

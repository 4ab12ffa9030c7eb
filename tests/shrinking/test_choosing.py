"""Another point of the curve without a new search: proven once more, at a price, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.errors import FormatError, ModelError, VerdictError
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import outcomes
from steelyard.learn.run import train
from steelyard.learn.task import Batch, Task, build_seeded
from steelyard.shrinking.choosing import Shrunk, choose
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.within import shrink

from blobs import blobs


class Counted:
    """A task that counts passes over its splits in which nothing is trained."""

    def __init__(self, task: Task) -> None:
        self.passes: list[str] = []
        self.task = replace(task, batches=self.served(task.batches))

    def served(self, source: Any) -> Any:
        def batches(split: Any, epoch: int) -> Iterator[Batch]:
            yield from source(split, epoch)
            if not torch.is_grad_enabled():
                self.passes.append(split)

        return batches


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(blobs())


@pytest.fixture(scope="module")
def model(counted: Counted) -> nn.Module:
    return train(counted.task, epochs=4, progress=False).model


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def found(counted: Counted, model: nn.Module, kept: Path) -> Shrunk:
    return shrink(model, counted.task, tolerance=0.02, epochs=2, checkpoint=kept)


def test_another_tolerance_is_proven_without_a_new_search(
    counted: Counted, model: nn.Module, found: Shrunk, tmp_path: Path
) -> None:
    plain = shrink(model, counted.task, tolerance=0.02, epochs=0)
    counted.passes.clear()
    more = plain.choose(tmp_path / "more.safetensors", tolerance=0.2)
    row = more.proof.rows[0]
    assert set(counted.passes) == {"test"}
    assert len(counted.passes) == more.proof.meta["evaluations"] <= 6
    assert row["bytes"] == (tmp_path / "more.safetensors").stat().st_size < plain.proof.rows[0]["bytes"]
    assert row["loss at most"] <= row["tolerance"] == 0.2
    assert {r["candidate"] for r in more.curve.rows} == {r["candidate"] for r in plain.curve.rows}, "nothing was made"
    other = build_seeded(counted.task, 7)
    into_module(formats.open(tmp_path / "more.safetensors"), other)
    assert outcomes(other, counted.task, "test")["accuracy"].mean() == row["accuracy"]


def test_the_safest_of_a_size_is_taken(found: Shrunk, tmp_path: Path) -> None:
    sizes = sorted(found.curve.column("bytes"))
    at_most = found.choose(tmp_path / "some.safetensors", bytes=sizes[2])
    assert at_most.proof.rows[0]["bytes"] <= sizes[2]
    assert at_most.proof.rows[0]["loss at most"] <= 0.02
    with pytest.raises(VerdictError, match=rf"candidates takes {sizes[0]:,} bytes, and none {sizes[0] - 1:,} or less"):
        found.choose(tmp_path / "none.safetensors", bytes=sizes[0] - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]


def test_what_was_asked_before_is_told_with_what_came_of_it(found: Shrunk) -> None:
    before = {row["candidate"]: row for row in found.curve.rows if row["loss"] is not None}
    now = {row["candidate"]: row for row in found.choose(bytes=max(found.curve.column("bytes"))).curve.rows}
    for name, row in before.items():
        assert now[name]["loss"] == row["loss"]
        if now[name]["outcome"] != "chosen":
            assert now[name]["outcome"] == f"asked before: {'fails' if row['outcome'] == 'fails' else 'holds'}"
    assert len(before) > 1


def test_what_is_told_once_more_is_told_as_surely_as_before(found: Shrunk) -> None:
    first = {row["candidate"]: row["loss at most"] for row in found.curve.rows if row["loss"] is not None}
    again = {row["candidate"]: row["loss at most"] for row in found.choose(tolerance=0.02).curve.rows}
    assert not found.search.reserved, "all were asked at one level"
    assert first.items() <= again.items()
    assert len(first) > 1


def test_a_choice_that_cannot_be_proven_names_what_would_be(counted: Counted, model: nn.Module, tmp_path: Path) -> None:
    found = shrink(model, counted.task, tolerance=0.02, epochs=0)
    smallest = min(found.curve.column("bytes"))  # loses ten times the tolerance on validation examples
    with pytest.raises(
        VerdictError, match=r"a tolerance of 0\.\d+ would have been kept \(from now on 0\.\d+: that .* look 3"
    ):
        found.choose(tmp_path / "small.safetensors", bytes=smallest)
    assert not list(tmp_path.iterdir())
    assert found.choose(bytes=smallest, tolerance=0.4).proof.rows[0]["bytes"] == smallest


def test_further_looks_are_asked_for_more_and_the_same_one_is_no_further(counted: Counted, model: nn.Module) -> None:
    found = shrink(model, counted.task, tolerance=0.02, epochs=0)
    assert "look" not in found.proof.meta
    looks = [found.choose(tolerance=t).proof for t in (0.03, 0.04, 0.03)]
    assert [proof.meta["look"].split()[0] for proof in looks] == ["2", "3", "2"]
    assert "its bound is at 0.9917" in looks[1].meta["look"]
    for proof, look in zip(looks, (2, 3, 2), strict=True):
        (row,) = proof.rows
        changed = row["examples changed"]
        alone = Promise(row["tolerance"])
        assert row["loss at most"] > alone.least(1200) or changed
        assert row["loss at most"] >= Promise(row["tolerance"], look=look).least(1200) > alone.least(1200)


def test_a_question_that_was_answered_gets_the_same_answer_without_a_look(
    counted: Counted, model: nn.Module, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    first = shrink(model, counted.task, tmp_path / "first.safetensors", tolerance=0.02, epochs=0, checkpoint=kept)
    row, once = first.proof.rows[0], (tmp_path / "first.safetensors").read_bytes()
    counted.passes.clear()
    for given in ({"tolerance": 0.02}, {"bytes": row["bytes"]}):
        again = first.choose(tmp_path / "again.safetensors", **given)
        assert (tmp_path / "again.safetensors").read_bytes() == once
        assert "look" not in again.proof.meta
        assert again.proof.rows[0]["loss at most"] == row["loss at most"]
    assert counted.passes == ["test"] * 2, "the finished files"
    choose(model, counted.task, tmp_path / "third.safetensors", checkpoint=kept, tolerance=0.02)
    assert (tmp_path / "third.safetensors").read_bytes() == once
    second = first.choose(tolerance=0.03)
    assert second.proof.meta["look"].startswith("2 "), "those were none"
    assert first.choose(tolerance=0.03).proof.rows[0]["bytes"] == second.proof.rows[0]["bytes"]


def test_all_later_looks_together_are_as_sure_as_the_first() -> None:
    spent = sum(1 - Promise(0.02, look=look).level for look in range(2, 2000))
    assert spent == pytest.approx(0.05, rel=1e-3)
    assert spent < 0.05
    assert Promise(0.02).level == 0.95


def test_a_tolerance_that_a_further_look_cannot_prove_is_said_before_it(counted: Counted, model: nn.Module) -> None:
    """1200 examples prove 0.0027 at the first look; at the second they would need to be more."""
    found = shrink(model, counted.task, tolerance=0.02, epochs=0)
    counted.passes.clear()
    assert Promise(0.0027).least(1200) < 0.0027
    with pytest.raises(ModelError, match=r"cannot prove a tolerance of 0\.0027 at their look 2"):
        found.choose(tolerance=0.0027)
    assert not counted.passes
    with pytest.raises(ModelError, match="has forgotten everything may do"):
        found.choose(tolerance=0.9)
    assert found.choose(tolerance=0.03).proof.meta["look"].startswith("2 "), "what was refused was no look"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ModelError, "expected a tolerance, or bytes, or both"),
        ({"bytes": 0}, ModelError, "bytes=0: expected a whole number of bytes"),
        ({"bytes": 2.5}, ModelError, r"bytes=2\.5: expected a whole number of bytes"),
        ({"tolerance": -1}, ModelError, "tolerance=-1: expected a number above 0"),
        ({"tolerance": 0.03, "target": "small.onnx"}, FormatError, "expected a name that ends in .safetensors"),
    ],
)
def test_wrong_choices_are_told(found: Shrunk, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        found.choose(**options)


def test_a_file_that_runs_has_no_curve_to_choose_from(found: Shrunk) -> None:
    with pytest.raises(ModelError, match="shrink with aim='file'"):
        replace(found, search=None).choose(tolerance=0.03)


def test_another_process_chooses_from_a_folder(counted: Counted, model: nn.Module, found: Shrunk, kept: Path) -> None:
    """All that the search has made is there again, and neither validation nor training is asked for anything."""
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
    counted.passes.clear()
    again = choose(model, counted.task, checkpoint=kept, tolerance=0.25)
    assert {(r["candidate"], r["bytes"]) for r in again.curve.rows} == {
        (r["candidate"], r["bytes"]) for r in found.curve.rows
    }
    assert counted.passes.count("valid") == 1, "that of the original"
    assert counted.passes.count("train") == 0
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")} == before
    assert int(again.proof.meta["look"].split()[0]) > 1


def test_another_search_with_the_folder_is_a_further_look(counted: Counted, model: nn.Module, tmp_path: Path) -> None:
    first, second, same = (
        shrink(model, counted.task, tolerance=t, epochs=0, checkpoint=tmp_path) for t in (0.02, 0.03, 0.02)
    )
    assert second.proof.meta["look"].startswith("2 ")
    assert "look" not in first.proof.meta
    assert same.proof.rows[0]["loss at most"] == first.proof.rows[0]["loss at most"]


def test_other_settings_go_on_in_the_same_folder(counted: Counted, model: nn.Module, tmp_path: Path) -> None:
    for evaluations in (8, 12):
        shrink(model, counted.task, tolerance=0.03, epochs=1, evaluations=evaluations, checkpoint=tmp_path)


def test_a_search_that_proved_nothing_can_be_chosen_from(
    counted: Counted, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Promise, "kept", lambda _self, _worse: False)
    with pytest.raises(VerdictError, match="Nothing is written"):
        shrink(model, counted.task, tolerance=0.02, epochs=0, checkpoint=tmp_path)
    monkeypatch.undo()
    assert choose(model, counted.task, checkpoint=tmp_path, tolerance=0.1).proof.rows[0]["loss at most"] <= 0.1


def test_a_folder_without_a_search_is_told(
    counted: Counted, model: nn.Module, found: Shrunk, kept: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no search is kept in a folder of that name"):
        choose(model, counted.task, checkpoint=tmp_path / "none", tolerance=0.1)
    with pytest.raises(ModelError, match="no search is kept"):
        choose(model, counted.task, checkpoint=tmp_path, tolerance=0.1)
    assert not list(tmp_path.iterdir()), "nothing is begun there"
    shutil.copytree(kept, tmp_path / "begun")
    lines = (kept / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "begun" / "journal.jsonl").write_bytes(lines[0])
    (tmp_path / "begun" / "journal.end").unlink()
    with pytest.raises(ModelError, match="no search there has come to its proof"):
        choose(model, counted.task, checkpoint=tmp_path / "begun", tolerance=0.1)


def test_the_journal_holds_what_was_asked(found: Shrunk, kept: Path) -> None:
    lines = [json.loads(line) for line in (kept / "journal.jsonl").read_text().splitlines()]
    asked = [line["answer"] for line in lines if line.get("question", "").startswith("look: ")]
    assert asked[0]["look"] == 1
    assert (asked[0]["tolerance"], asked[0]["epochs"], asked[0]["aim"]) == (0.02, 2, "file")

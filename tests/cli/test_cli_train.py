"""What can be said to `steelyard train` and `finetune`: penalties, averages, classes, rates, watches."""

from __future__ import annotations

import json

import numpy as np
import pytest

import steelyard as sy
from steelyard.learn.task import build_seeded
from steelyard.learn.tasks import task


def tables(result):
    return {table["title"]: table for table in map(json.loads, result.out.splitlines())}


def test_penalties_are_in_the_objective_and_in_the_weights(steelyard, tmp_path):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 6, "--weight-decay", 0,
                      "--rate", 0.05, "--penalty", "l1=0.05", "--penalty", "l2=0.01@*.bias", "--json")  # fmt: skip
    assert (found.status, found.err) == (0, "")
    rows = tables(found)["objective at the last step of each epoch"]["rows"]
    assert len(rows) == 6
    assert rows[-1]["objective"] == pytest.approx(sum(rows[-1][n] for n in ("data term", "L1(0.05)", "L2(0.01)")))
    weights = sy.open(tmp_path / "w.safetensors")
    assert (next(w for w in weights.values() if w.spec.shape == (2, 30)).array() == 0).any()


def test_no_penalty_no_objective(steelyard, tmp_path):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 1, "--json")
    assert "objective at the last step of each epoch" not in tables(found)


def test_averages_and_classes_change_what_is_trained(steelyard, tmp_path):
    seen = []
    for words in (
        [],
        ["--average", "ema=0.9"],
        ["--class-weights", "1,5"],
        ["--class-weights", "balanced"],
        ["--balanced"],
    ):
        path = tmp_path / f"{len(seen)}.safetensors"
        assert steelyard("train", "breast-cancer", path, "--epochs", 2, *words).status == 0
        seen.append(np.concatenate([w.array().ravel() for w in sy.open(path).values()]))
    assert all(not np.array_equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_watch_writes_its_log_and_says_faults(steelyard, tmp_path):
    found = steelyard("train", "digits", tmp_path / "w.safetensors", "--model", "mlp", "--epochs", 2, "--rate", 30,
                      "--optimizer", "adam", "--schedule", "constant", "--watch", tmp_path / "run.sqlite")  # fmt: skip
    assert "fault, step" in found.err
    assert "rate too high in model" in found.err
    log = sy.read_log(tmp_path / "run.sqlite")
    assert "rate too high" in log["faults"].column("fault")
    assert log["notes"].rows[0]["what"] == "loss"
    again = steelyard("train", "digits", tmp_path / "v.safetensors", "--watch", tmp_path / "run.sqlite")
    assert again.status == 2
    assert "run.sqlite exists: choose another name for the log" in again.err
    assert not (tmp_path / "v.safetensors").exists()


def test_a_live_page_is_there_while_it_trains(steelyard, tmp_path):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 1, "--live")
    assert found.status == 0
    assert "live page: http://127.0.0.1:" in found.err


def test_the_rate_is_found_first(steelyard, tmp_path):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 2, "--find-lr", "--json")
    assert "learning rate " in found.err
    named = tables(found)
    assert (
        named["training on breast-cancer, by epoch"]["meta"]["rate"]
        == named["learning rates for breast-cancer"]["meta"]["rate"]
    )


def test_a_training_that_ends_where_it_began_is_told(steelyard, tmp_path):
    bad = ["--rate", 1e-30, "--epochs", 2]  # moves nothing
    for options, told in ((bad, True), (["--epochs", 2], False)):
        found = steelyard("train", "breast-cancer", tmp_path / f"{told}.safetensors", "--model", "mlp", *options)
        assert found.status == 0
        assert ("the weights are those of the start; lower --rate, or use --find-lr" in found.err) == told


def test_the_rate_is_found_with_whole_runs(steelyard, tmp_path):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 1, "--find-lr-full", "--json")
    tried = tables(found)["learning rates for breast-cancer"]
    assert tried["meta"]["effort"] == "full"
    assert tried["rows"][-1]["length"] == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "interrupted, and nothing is kept: --checkpoint FOLDER keeps a state from which --resume goes on"),
        (["--checkpoint", "kept"], "interrupted; the same command with --resume goes on from the state in kept, if"),
    ],
)
def test_what_is_interrupted_says_what_is_kept(steelyard, tmp_path, monkeypatch, words, said):
    def made(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("steelyard.life.record.make_task", made)
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", *words)
    assert found.status == 130
    assert said in found.err


def test_weights_of_another_model_than_the_tasks_own_say_which(steelyard, tmp_path):
    path = tmp_path / "w.safetensors"
    steelyard("train", "breast-cancer", path, "--model", "mlp", "--epochs", "1")
    for words, asked in (([], "the task's own model"), (["--model", "linear"], "the one that was named")):
        found = steelyard("score", "breast-cancer", path, tmp_path / "e.safetensors", *words)
        assert found.status == 2
        assert f"not those of {asked} (Sequential); they fit --model mlp: name that one" in found.err
    steelyard("train", "breast-cancer", path, "--model", "mlp(widths=(3,))", "--epochs", "1", "--force")
    found = steelyard("score", "breast-cancer", path, tmp_path / "e.safetensors")
    assert "do not match" in found.err
    assert "--model names another model than the task's own" in found.err


def test_finetune_stays_near_what_was_loaded(steelyard, tmp_path):
    steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--epochs", 3)
    far, near = tmp_path / "far.safetensors", tmp_path / "near.safetensors"
    options = ["--head", "keep", "--epochs", 3, "--rate", 0.1]
    steelyard("finetune", "breast-cancer", tmp_path / "w.safetensors", far, *options)
    found = steelyard("finetune", "breast-cancer", tmp_path / "w.safetensors", near, *options,
                      "--penalty", "l2-sp=100", "--watch", tmp_path / "log", "--json")  # fmt: skip
    assert "L2SP(100)" in tables(found)["objective at the last step of each epoch"]["rows"][0]
    start = sy.open(tmp_path / "w.safetensors")
    moved = [sum(float(np.abs(w.array() - start[n].array()).sum()) for n, w in sy.open(p).items()) for p in (far, near)]
    assert moved[1] < 0.5 * moved[0]
    assert sy.read_log(tmp_path / "log")["steps"].rows


def test_finetune_finds_its_rate_from_what_was_loaded(steelyard, tmp_path):
    steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--model", "mlp", "--epochs", 2)
    options = ["--model", "mlp", "--epochs", 2, "--freeze", "body", "--find-lr", "--json"]
    found = steelyard("finetune", "breast-cancer", tmp_path / "w.safetensors", tmp_path / "t.safetensors", *options)
    named = tables(found)
    tried, run = named["learning rates for breast-cancer"], named["training on breast-cancer, by epoch"]
    assert f"learning rate {tried['meta']['rate']:.3g}, found by {len(tried['rows'])} short runs" in found.err
    assert run["meta"]["rate"] == tried["meta"]["rate"] != 1e-3
    start, tuned = (sy.open(tmp_path / f"{name}.safetensors") for name in "wt")
    changed = {name for name, w in tuned.items() if not np.array_equal(w.array(), start[name].array())}
    assert changed == set(list(tuned)[-2:])  # the trials have moved nothing, and the frozen body has not moved


def test_a_head_starts_as_the_model_starts_it_unless_told(steelyard, tmp_path):
    steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--model", "mlp", "--epochs", 1)
    heads = []
    for words in ([], ["--start", "he"]):
        path = tmp_path / f"{len(heads)}.safetensors"
        options = ["--model", "mlp", "--epochs", 1, "--rate", 1e-12, *words]
        assert steelyard("finetune", "breast-cancer", tmp_path / "w.safetensors", path, *options).status == 0
        heads.append(list(sy.open(path).values())[-2:])
    own = list(sy.from_module(build_seeded(task("breast-cancer", model="mlp"), 0)).values())[-2:]
    assert all(np.allclose(a.array(), b.array(), atol=1e-6) for a, b in zip(heads[0], own, strict=True))
    assert not np.allclose(heads[1][0].array(), own[0].array(), atol=1e-3)


@pytest.mark.parametrize(("words", "said"), [
    (["--penalty", "l3=1"], "there is no penalty 'l3'"),
    (["--penalty", "l1=1@nothing*"], "L1 chooses no trainable parameter"),
    (["--penalty", "l1"], "expected NAME=STRENGTH or NAME=STRENGTH@GLOB"),
    (["--average", "mean"], "there is no average 'mean'"),
    (["--class-weights", "1,2,3"], "3 class weights: the task 'breast-cancer' has 2 classes"),
    (["--class-weights", "1,much"], "--class-weights: 'much' is no number; expected balanced, or a number"),
])  # fmt: skip
def test_errors_are_one_line_and_nothing_is_written(steelyard, tmp_path, words, said):
    found = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", *words)
    assert found.status == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not (tmp_path / "w.safetensors").exists()

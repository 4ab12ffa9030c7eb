"""Classes that count more or are seen more often; penalties and averages as words; a run within a watch."""

from __future__ import annotations

import pytest
import torch

import steelyard as sy
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.average import AVERAGES, Ema, Swa, kind_of
from steelyard.learn.classes import balance_classes, weigh_classes
from steelyard.learn.named import PENALTIES, penalty
from steelyard.learn.record import objective_table
from steelyard.learn.task import objective


def first(task):
    return next(iter(task.batches("train", 0)))


def test_weights_of_classes_are_weights_of_their_examples():
    task = sy.task("breast-cancer")
    batch = first(weigh_classes(task, [1.0, 3.0]))
    assert torch.equal(batch.weight, 1 + 2.0 * batch.targets)
    outputs = torch.randn(len(batch), 2)
    cross = torch.nn.functional.cross_entropy(outputs, batch.targets, weight=torch.tensor([1.0, 3.0]))
    assert objective(task, outputs, batch) == pytest.approx(cross.item(), rel=1e-6)
    twice = first(weigh_classes(weigh_classes(task, [1.0, 3.0]), [2.0, 1.0]))
    assert torch.equal(twice.weight, 2 + 1.0 * twice.targets)
    assert next(iter(weigh_classes(task, [1.0, 3.0]).batches("valid", 0))).weight is None


def test_balanced_weights_make_up_for_rarity():
    task = weigh_classes(sy.task("breast-cancer"), "balanced")
    data = task.batches
    sums = [data.weight["train"][data.targets["train"] == c].sum().item() for c in (0, 1)]
    assert sums[0] == pytest.approx(sums[1])


def test_balanced_sampling_serves_classes_equally_often():
    task = balance_classes(sy.task("breast-cancer"))
    counts = torch.bincount(torch.cat([b.targets for b in task.batches("train", 0)]))
    assert abs(int(counts[0] - counts[1])) <= 1
    valid = torch.bincount(torch.cat([b.targets for b in task.batches("valid", 0)]))
    assert abs(int(valid[0] - valid[1])) > 5


def test_classes_that_are_not_there():
    task = sy.task("breast-cancer")
    for weights, said in (([1.0], "1 class weights: .* has 2 classes"), ([1.0, -1.0], "expected finite numbers"),
                          ([1.0, float("nan")], "expected finite numbers")):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            weigh_classes(task, weights)
    loop = sy.Task("own", task.build, lambda *_: [], task.loss, task.metrics)
    with pytest.raises(ModelError, match="'own' does not hold its examples in memory"):
        balance_classes(loop)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_can_be_said(name):
    found = penalty(f"{name}=0.5@*.weight,!head*")
    assert found.strength == 0.5
    assert found.where is not None
    assert penalty(f"{name}=0.5").where is None
    net = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    assert sy.penalize(net, optimizer, penalty(f"{name}=0.5")).names


@pytest.mark.parametrize(("text", "error", "said"), [
    ("l3=1", UnknownNameError, "there is no penalty 'l3'; "),
    ("l1", RecipeError, r"the penalty 'l1': expected NAME=STRENGTH or NAME=STRENGTH@GLOB, such as l1=1e-4@conv\*"),
    ("l1=much", RecipeError, "expected NAME=STRENGTH"),
    ("l1=1@", RecipeError, "expected NAME=STRENGTH"),
])  # fmt: skip
def test_what_cannot_be_read_as_a_penalty(text, error, said):
    with pytest.raises(error, match=said):
        penalty(text)


def test_averages_by_name():
    assert set(AVERAGES) == {"ema", "swa"}
    assert (kind_of("ema=0.9"), kind_of("swa=0.5"), kind_of("ema")) == (Ema(0.9), Swa(0.5), Ema())
    with pytest.raises(UnknownNameError, match="there is no average 'sma'"):
        kind_of("sma")
    with pytest.raises(RecipeError, match=r"expected ema or ema=NUMBER, such as ema=0\.9"):
        kind_of("ema=long")
    with pytest.raises(ModelError, match="from 0 to below 1"):
        kind_of("ema=2")


def test_a_run_within_a_watch_is_the_same_run(tmp_path):
    task = sy.task("breast-cancer")
    plain = sy.train(task, epochs=1, progress=False)
    watched = sy.train(task, epochs=1, progress=False, within=lambda run: sy.watch(run, path=tmp_path / "log"))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    log = sy.read_log(tmp_path / "log")
    assert [row["value"] for row in log["notes"].rows] == [row["loss"] for row in watched.log]


def test_the_objective_is_the_data_term_and_each_penalty():
    run = sy.train(sy.task("breast-cancer"), epochs=2, progress=False, penalties=[sy.L1(0.01), sy.L2(0.1)])
    table = objective_table(run.table())
    assert table.column("epoch") == [1, 2]
    for row in table.rows:
        step = run.log[row["step"]]
        assert row["data term"] == step["loss"]
        assert row["objective"] == pytest.approx(row["data term"] + row["L1(0.01)"] + row["L2(0.1)"], rel=1e-7)
    assert objective_table(sy.train(sy.task("breast-cancer"), epochs=1, progress=False).table()) is None

"""Moving weights: the account is complete, the head is new, what is frozen keeps its bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.errors import ModelError
from steelyard.formats.module import from_module
from steelyard.learn.evaluate import compare
from steelyard.learn.finetune import find_head, finetune, freeze, transfer
from steelyard.learn.run import train
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks import task as find_task


def account_of(table: object) -> dict[str, str]:
    return dict(zip(table.column("name"), table.column("status"), strict=True))


def test_what_fits_is_loaded_and_every_name_is_accounted_for() -> None:
    source = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    target = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 2))
    head = target[2].weight.detach().clone()
    given = Weights([*from_module(source).values(), *Weights.of({"extra": np.zeros(2, np.float32)}).values()])
    found = account_of(transfer(given, target))
    assert found == {
        "0.weight": "loaded",
        "0.bias": "loaded",
        "2.weight": "wrong shape",
        "2.bias": "wrong shape",
        "3.weight": "missing",
        "3.bias": "missing",
        "extra": "unexpected",
    }
    assert torch.equal(source[0].weight, target[0].weight)
    assert torch.equal(target[2].weight, head)


def test_a_new_head_stays_as_it_was_started_although_it_would_fit() -> None:
    source, target = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    head = target[1].weight.detach().clone()
    table = transfer(from_module(source), target, head=where("1.*"))
    assert account_of(table) == {"0.weight": "loaded", "0.bias": "loaded", "1.weight": "new", "1.bias": "new"}
    assert (table.meta["loaded"], table.meta["new"]) == (2, 2)
    assert torch.equal(target[1].weight, head)
    assert torch.equal(target[0].weight, source[0].weight)


def test_nothing_that_fits_is_an_error_and_changes_nothing() -> None:
    target = nn.Linear(4, 3)
    before = target.weight.detach().clone()
    with pytest.raises(ModelError, match="none of the 2 weights fits Linear"):
        transfer(from_module(nn.Linear(3, 4)), target)
    assert torch.equal(target.weight, before)


def test_a_head_that_is_not_there_is_an_error_and_changes_nothing(task: Task) -> None:
    target, source = nn.Linear(4, 3), nn.Linear(4, 3)
    before = target.weight.detach().clone()
    with pytest.raises(ModelError, match="no head to start anew: none of weight, bias is chosen"):
        transfer(from_module(source), target, head=where("nosuch*"))
    assert torch.equal(target.weight, before)
    given = from_module(build_seeded(task, 5)).settle()
    for choice in ({"head": where("nosuch*")}, {"head": where("3.*"), "freeze": where("nosuch*")}):
        with pytest.raises(ModelError, match="is chosen; choose from the names of the model"):
            finetune(task, given, epochs=1, progress=False, **choice)


def test_a_head_may_be_the_second_name_of_a_tied_weight() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert account_of(transfer(from_module(net), net, head=where("1.weight")))["0.weight"] == "loaded"


def test_freeze_returns_what_it_froze_and_refuses_to_freeze_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert freeze(net, where("0.*")) == ["0.weight", "0.bias"]
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    with pytest.raises(ModelError, match="no parameter to freeze"):
        freeze(net, where("body.*"))


def test_the_head_is_what_runs_last_not_what_is_registered_last(task: Task) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.body = nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.body(x).relu())

    net = Net().train()
    assert list(from_module(net).select(find_head(net, task))) == ["classifier.weight", "classifier.bias"]
    assert net.training
    assert not net.body._forward_hooks
    assert list(from_module(nn.Linear(5, 3)).select(find_head(nn.Linear(5, 3), task))) == ["weight", "bias"]


def test_with_a_frozen_body_only_the_head_moves(task: Task) -> None:
    weights = from_module(build_seeded(task, 5)).settle()
    run, account = finetune(task, weights, freeze="body", epochs=2, keep="last", progress=False)
    after = from_module(run.model).arrays()
    assert account_of(account) == {"0.weight": "loaded", "0.bias": "loaded", "3.weight": "new", "3.bias": "new"}
    assert after["0.weight"].tobytes() == weights["0.weight"].array().tobytes()
    assert after["0.bias"].tobytes() == weights["0.bias"].array().tobytes()
    start = from_module(build_seeded(task, 0)).arrays()
    assert (after["3.weight"] != start["3.weight"]).any()
    assert not np.allclose(after["3.weight"], weights["3.weight"].array())


def test_a_kept_head_begins_where_the_source_ended(task: Task) -> None:
    source = train(task, epochs=5, rate=0.01, progress=False)
    run, account = finetune(task, from_module(source.model), head="keep", epochs=1, rate=1e-9, progress=False)
    assert set(account.column("status")) == {"loaded"}
    assert compare(source.model, run.model, task).rows[0]["agreement"] == 1
    again = finetune(task, from_module(source.model), head="keep", epochs=1, rate=1e-9, progress=False)[0]
    assert torch.equal(run.model[0].weight, again.model[0].weight)


def test_digits_0_to_4_help_with_5_to_9() -> None:
    low = find_task("digits", classes=range(5))
    high = find_task("digits", classes=range(5, 10), shots=5)
    source = from_module(train(low, epochs=8, progress=False).model).settle()
    moved, _ = finetune(high, source, epochs=20, rate=3e-3, progress=False)
    scratch = train(high, epochs=20, rate=3e-3, progress=False)
    difference = compare(scratch.model, moved.model, high).rows[0]
    assert difference["b"] > 0.8
    assert difference["difference"] > -0.1

"""Worst groups: measured right, and raised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from steelyard.claims.d_discipline import spurious
from steelyard.errors import ModelError
from steelyard.learn.data import Examples
from steelyard.learn.groups import by_group, group_dro, just_train_twice, refit_head
from steelyard.learn.robust import GroupDRO
from steelyard.learn.run import train
from steelyard.learn.task import Task, build_seeded


class Companion(nn.Module):
    """Believes the companion alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x[:, 3], x[:, 3]], 1) + 0 * self.head(x)


def test_groups_are_measured_and_weighed_by_their_shares() -> None:
    task = spurious(0)
    table = by_group(Companion(), task, names=["a", "b", "c", "d"])
    assert table.column("group") == ["a", "b", "c", "d"]
    assert table.column("accuracy") == [1.0, 0.0, 0.0, 1.0]  # group 2 * class + companion
    assert table.meta["worst group"] == 0
    shares = torch.bincount(task.batches.groups["train"]).double() / 600  # type: ignore[attr-defined]
    assert table.column("training share") == pytest.approx(shares.tolist())
    assert table.meta["mean by training shares"] == pytest.approx(float(shares[0] + shares[3]))
    assert table.meta["mean"] == pytest.approx((table.column("examples")[0] + table.column("examples")[3]) / 2000)


def test_group_dro_takes_the_step_of_the_paper() -> None:
    dro = GroupDRO(lambda a, b: (a - b).square(), torch.tensor([4, 16, 1]), step=0.5, adjustment=2.0)
    losses = torch.tensor([1.0, 3.0, 0.5], requires_grad=True)
    value = dro.mean(losses, torch.tensor([0, 0, 1]))
    q = torch.exp(0.5 * torch.tensor([2.0 + 1.0, 0.5 + 0.5, 0.0]).double())  # the absent group is not raised
    q = q / q.sum()
    assert torch.allclose(dro.weights, q)
    assert value.item() == pytest.approx(float(q[0] * 2.0 + q[1] * 0.5))
    value.backward()
    assert losses.grad.tolist() == pytest.approx([float(q[0]) / 2, float(q[0]) / 2, float(q[1])])
    with pytest.raises(ModelError, match="have no groups"):
        dro.mean(losses, None)
    with pytest.raises(ModelError, match="has group 3, there are 3"):
        dro.mean(losses, torch.tensor([0, 0, 3]))
    with pytest.raises(ModelError, match="needs the number of examples"):
        GroupDRO(dro.loss, 3, adjustment=1.0)


def test_each_way_raises_the_worst_group() -> None:
    task = spurious(1)
    options = {"epochs": 10, "rate": 0.01, "weight_decay": 0.1, "keep": "last"}
    plain = train(task, progress=False, **options).model
    before = by_group(plain, task).meta["worst group"]
    robust = [
        group_dro(task, step=0.1, **options).model,
        just_train_twice(task, first_epochs=6, upweight=20.0, **options).model,
    ]
    body = plain[1].weight.detach().clone()
    table = refit_head(plain, task, draws=4, steps=150)
    assert torch.equal(plain[1].weight, body)
    assert table.meta["best"] in table.column("strength")
    for model in [*robust, plain]:
        assert by_group(model, task).meta["worst group"] > before + 0.1


def test_training_twice_weighs_what_the_first_model_got_wrong() -> None:
    task = spurious(2)
    data: Examples = task.batches  # type: ignore[assignment]
    seen: list[torch.Tensor] = []
    start = build_seeded(task, 0)
    kept = {n: p.clone() for n, p in start.state_dict().items()}
    just_train_twice(
        task,
        start,
        first_epochs=6,
        upweight=7.0,
        epochs=1,
        gauges=[lambda step: seen.append(step.batches[0].weight) or {}],
    )
    weights = torch.cat(seen[-6:])
    assert set(weights.tolist()) == {1.0, 7.0}
    first = build_seeded(task, 0)
    assert all(torch.equal(kept[n], p) for n, p in first.state_dict().items())
    train(task, first, epochs=6, keep="last", progress=False)
    first.eval()
    wrong = first(data.inputs["train"]).argmax(1) != data.targets["train"]
    assert int((weights == 7).sum()) == int(wrong.sum())


def test_what_has_no_groups_is_refused_in_one_line(task: Task) -> None:
    with pytest.raises(ModelError, match="has no groups of its test split"):
        by_group(build_seeded(task), task)
    with pytest.raises(ModelError, match="serves batches of its own"):
        just_train_twice(replace(task, batches=lambda split, epoch: []))
    given: Examples = task.batches  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"groups of train: shape \[3\], expected one number for each example"):
        replace(given, groups={"train": torch.zeros(3)})
    few = replace(given, groups={"valid": torch.tensor([1] + [0] * 19)})
    with pytest.raises(ModelError, match="group 1 has 1 example in valid"):
        refit_head(build_seeded(task), replace(task, batches=few))

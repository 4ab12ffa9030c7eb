"""Worst groups: measured right, and raised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from steelyard.claims.d_discipline import spurious
from steelyard.errors import ModelError
from steelyard.learn.data import Examples
from steelyard.learn.examples import ExampleLoss
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


@pytest.mark.parametrize("heavy_classes", [False, True])
def test_group_dro_takes_weights_of_examples_as_copies(heavy_classes: bool) -> None:
    """One batch of all examples, so that the order does not matter; group 1 is removed altogether."""
    task = spurious(0)
    data, options = task.batches, {"weight": torch.tensor([1.0, 3.0])} if heavy_classes else {}
    copies = torch.arange(600) % 3 * (data.groups["train"] != 1)
    weighed = replace(data, batch_size=2000, weight={"train": copies.float()})
    parts = {"inputs": data.inputs, "targets": data.targets, "groups": data.groups}
    repeated = {n: {**of, "train": of["train"].repeat_interleave(copies, 0)} for n, of in parts.items()}
    found = [
        group_dro(
            replace(task, batches=batches, loss=ExampleLoss("cross_entropy", options)),
            epochs=20, step=0.2, adjustment=2.0, keep="last", rate=0.05,
        )
        for batches in (weighed, replace(data, batch_size=2000, **repeated))
    ]  # fmt: skip
    for a, b in zip(*(run.model.parameters() for run in found), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert found[0].log[-1]["loss"] == pytest.approx(found[1].log[-1]["loss"], abs=1e-5)
    assert torch.allclose(found[0].task.loss.weights, found[1].task.loss.weights, atol=1e-6)
    plain = group_dro(replace(task, batches=replace(data, batch_size=2000)), epochs=20, step=0.2, keep="last")
    assert plain.log[-1]["loss"] != pytest.approx(found[0].log[-1]["loss"], abs=1e-3)


def test_group_dro_goes_on_bit_for_bit(tmp_path: Path) -> None:
    task = spurious(0)
    options = {"epochs": 3, "step": 0.5, "keep": "last"}
    whole = group_dro(task, **options)

    def stop(model: nn.Module) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        group_dro(task, checkpoint=tmp_path, every=1, after_step=stop, **options)
    parts = group_dro(task, checkpoint=tmp_path, every=1, resume=True, **options)
    assert [row["loss"] for row in parts.log] == [row["loss"] for row in whole.log]
    assert torch.equal(parts.task.loss.weights, whole.task.loss.weights)
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("stop", [4, 25])
def test_training_twice_goes_on_in_either_training(tmp_path: Path, stop: int) -> None:
    task = spurious(0)
    options = {"first_epochs": 2, "epochs": 3, "upweight": 5.0}
    whole = just_train_twice(task, checkpoint=tmp_path / "whole", **options)
    assert just_train_twice(task, **options).log[-1]["loss"] == whole.log[-1]["loss"]

    def broken(model: nn.Module) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        just_train_twice(task, checkpoint=tmp_path / "parts", every=2, after_step=broken, **options)
    assert (tmp_path / "parts" / "second").exists() == (stop == 25)
    parts = just_train_twice(task, checkpoint=tmp_path / "parts", every=2, resume=True, **options)
    assert [row["loss"] for row in parts.log] == [row["loss"] for row in whole.log]
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(ModelError, match="first holds the checkpoint of a run: go on with it"):
        just_train_twice(task, checkpoint=tmp_path / "whole", **options)


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

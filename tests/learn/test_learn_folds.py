"""Folds: each example tested once, classes and groups as asked for, any task; intervals as in the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.data import Examples
from steelyard.learn.intervals import apart, resampled, student, wilson
from steelyard.learn.measures import cross_entropy, squared_error
from steelyard.learn.pool import Pool, in_memory
from steelyard.learn.task import SPLITS, Task, build_seeded


def numbered(targets: Tensor, groups: Tensor | None = None, batch_size: int = 4) -> Task:
    """Examples whose inputs are their numbers, in one pool of three splits."""
    cuts = [round(len(targets) * 0.6), round(len(targets) * 0.8)]
    parts = dict(zip(SPLITS, torch.arange(len(targets)).tensor_split(cuts), strict=True))
    data = Examples(
        {s: r[:, None].float() for s, r in parts.items()}, {s: targets[r] for s, r in parts.items()}, batch_size, 0,
        groups={} if groups is None else {s: groups[r] for s, r in parts.items()},
    )  # fmt: skip
    return Task("numbers", lambda: nn.Linear(1, 3), data, cross_entropy, sy.task("digits").metrics)


def rows(fold: Task) -> dict[str, list[int]]:
    data: Any = fold.batches
    return {split: data.inputs[split].flatten().long().tolist() for split in SPLITS}


@pytest.mark.parametrize("by", ["stratified", "blocks", "groups"])
@pytest.mark.parametrize("count", [2, 5])
def test_each_example_is_tested_once_and_in_one_split_of_a_fold(by: str, count: int) -> None:
    task = numbered(torch.arange(53) % 3, torch.arange(53) // 5)
    parts = [rows(fold) for fold in sy.folds(task, count, by=by)]
    assert sorted(i for part in parts for i in part["test"]) == list(range(53))
    for part in parts:
        assert sorted(part["train"] + part["valid"] + part["test"]) == list(range(53))
        assert all(part[split] for split in SPLITS)


def test_classes_are_divided_evenly_and_the_seed_decides() -> None:
    task = numbered(torch.tensor([0] * 41 + [1] * 9))
    found = sy.folds(task, 5)
    for fold in found:
        data: Any = fold.batches
        assert 8 <= int((data.targets["test"] == 0).sum()) <= 9
        assert 1 <= int((data.targets["test"] == 1).sum()) <= 2
        assert abs(len(data.targets["test"]) - 10) <= 1
        assert int((data.targets["valid"] == 1).sum()) >= 1
    assert [rows(f) for f in found] == [rows(f) for f in sy.folds(task, 5)]
    assert [rows(f) for f in found] != [rows(f) for f in sy.folds(task, 5, seed=1)]


def test_blocks_are_consecutive_and_groups_stay_whole() -> None:
    groups = torch.tensor([0] * 20 + [1] * 3 + [2] * 4 + [3] * 5 + [4] * 6 + [5] * 12)
    task = numbered(torch.zeros(50, dtype=torch.long), groups)
    for part in map(rows, sy.folds(task, 5, by="blocks")):
        assert part["test"] == list(range(part["test"][0], part["test"][0] + 10))
    ordered = replace(task, ordered=True)
    assert [rows(f) for f in sy.folds(ordered)] == [rows(f) for f in sy.folds(task, by="blocks")]
    for part in map(rows, sy.folds(task, 3, by="groups", valid=0.5)):
        owners = [{int(groups[i]) for i in part[split]} for split in SPLITS]
        assert not owners[0] & owners[1]
        assert not owners[0] & owners[2]
        assert not owners[1] & owners[2]
    sizes = sorted(len(rows(f)["test"]) for f in sy.folds(task, 3, by="groups", valid=0.5))
    assert sizes == [15, 15, 20]


class Two(nn.Module):
    """A model of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([x, y], 1))
        return found


def test_a_task_of_several_inputs_served_by_a_function_is_pooled() -> None:
    def serve(split: str, epoch: int) -> list[sy.Batch]:
        size = {"train": 12, "valid": 0, "test": 5}[split]
        draw = torch.Generator().manual_seed(size)
        x, y = torch.randn(size, 2, generator=draw), torch.randn(size, 1, generator=draw)
        made = [sy.Batch((x[i : i + 4], y[i : i + 4]), (y[i : i + 4, 0] > 0).long()) for i in range(0, size, 4)]
        return made[::-1] if epoch else made

    task = Task("two", Two, serve, cross_entropy, sy.task("digits").metrics)
    held: Any = in_memory(task).batches
    assert held.sizes == {"train": 12, "valid": 0, "test": 5}
    assert held.batch_size == 4
    assert Pool.of(task).weight is None
    table = sy.cross_validate(task, 3, epochs=2)
    assert table.column("test examples") == [6, 6, 5]


def test_a_text_is_divided_in_blocks_and_not_where_state_is_carried(tmp_path: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcabcabd" * 300, encoding="utf-8")
    task = sy.task(f"text:{path}", context=16, batch_size=8, carry=False)
    sizes = [fold.about["examples"]["test"] for fold in sy.folds(task, 3)]
    assert max(sizes) - min(sizes) <= 1
    assert sy.cross_validate(task, 3, epochs=1).meta["division"] == "blocks"
    with pytest.raises(ModelError, match="carry=False"):
        sy.folds(sy.task(f"text:{path}", context=16, batch_size=8, carry=True))


def test_weights_follow_their_examples() -> None:
    task = numbered(torch.arange(30) % 3)
    data: Any = task.batches
    weighted = replace(task, batches=replace(data, weight={"train": data.inputs["train"].flatten()}))
    for fold in sy.folds(weighted, 3):
        found: Any = fold.batches
        for split in SPLITS:
            numbers = found.inputs[split].flatten()
            assert torch.equal(found.weight[split], torch.where(numbers < 18, numbers, 1.0))


def test_cross_validation_measures_what_it_says(task: Task) -> None:
    start = build_seeded(task, 3)
    before = [p.detach().clone() for p in start.parameters()]
    table = sy.cross_validate(task, 3, model=start, repeats=2, epochs=3, rate=0.02)
    assert all(torch.equal(a, b) for a, b in zip(before, start.parameters(), strict=True))
    assert table.column("repeat") == [0] * 3 + [1] * 3
    assert table.column("fold") == [0, 1, 2] * 2
    fold = sy.folds(task, 3)[1]
    run = sy.train(fold, build_seeded(task, 3), epochs=3, rate=0.02, seed=1, progress=False)
    value = sy.evaluate(run.model, fold).rows[0]["value"]
    assert table.rows[1]["test accuracy"] == value
    for row in table.rows:
        assert row["gap"] == pytest.approx(row["train accuracy"] - row["test accuracy"])
    tested = np.array(table.column("test accuracy"))
    assert table.meta["mean"] == pytest.approx(tested.mean())
    assert table.meta["spread"] == pytest.approx(tested.std(ddof=1))
    assert table.column("test accuracy")[:3] != table.column("test accuracy")[3:]
    ratio = np.mean(np.divide(table.column("test examples"), table.column("train examples")))
    half = student(tested)[1] - tested.mean()
    assert table.meta["high"] - table.meta["mean"] == pytest.approx(half * math.sqrt(1 + 6 * ratio))


def test_a_metric_of_which_less_is_better_has_its_gap_the_other_way() -> None:
    draw = torch.Generator().manual_seed(0)
    x = {s: torch.randn(n, 8, generator=draw) for s, n in zip(SPLITS, (12, 6, 6), strict=True)}
    y = {s: torch.randn(len(v), 1, generator=draw) for s, v in x.items()}
    metrics = {"squared error": squared_error}
    task = Task(
        "noise",
        lambda: nn.Linear(8, 1),
        Examples(x, y, 4, 0),
        squared_error,
        metrics,
        lower_is_better=("squared error",),
    )
    table = sy.cross_validate(task, 3, epochs=60, rate=0.05, weight_decay=0.0, keep="last")
    assert table.meta["gap mean"] > 0.5
    assert [c.unit for c in table.columns if c.name == "gap"] == [""]


def test_intervals_are_those_of_the_papers() -> None:
    of = wilson(48, 80), wilson(56, 70)
    assert apart(0.6, of[0], 0.8, of[1]) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # Newcombe 1998, table II a
    from scipy import stats

    a, b = np.random.default_rng(0).normal(size=80), 2 * np.random.default_rng(1).normal(size=50) + 1
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    ours = apart(a.mean(), student(a), b.mean(), student(b))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)
    values = np.array([0.9, 0.92, 0.95, 0.97, 0.93])
    wide, narrow = resampled(values, 0.25), student(values)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(math.sqrt(1 + 0.25 * 5))


def test_labels_are_wrong_in_the_share_that_was_asked_for(task: Task) -> None:
    plain: Any = task.batches
    for share, wrong in ((0.0, 0), (0.25, 10), (0.5, 20), (1.0, 40)):
        noisy: Any = sy.label_noise(task, share).batches
        assert int((noisy.targets["train"] != plain.targets["train"]).sum()) == wrong
        assert torch.equal(noisy.targets["test"], plain.targets["test"])
        assert set(noisy.targets["train"].tolist()) <= {0, 1, 2}
    some: Any = sy.label_noise(task, 0.25).batches
    more: Any = sy.label_noise(task, 0.5).batches
    kept = some.targets["train"] != plain.targets["train"]
    assert torch.equal(some.targets["train"][kept], more.targets["train"][kept])
    other: Any = sy.label_noise(task, 0.25, seed=1).batches
    assert not torch.equal(other.targets["train"], some.targets["train"])
    both: Any = sy.label_noise(task, 0.5, splits=("train", "test")).batches
    assert int((both.targets["test"] != plain.targets["test"]).sum()) == 15


def test_wrong_use_is_told(blobs: Callable[..., Task]) -> None:
    task = blobs()
    with pytest.raises(ModelError, match=r"1 folds .* expected 2 to 90"):
        sy.folds(task, 1)
    with pytest.raises(ModelError, match="has no groups"):
        sy.folds(task, by="groups")
    with pytest.raises(ModelError, match="the groups there are"):
        sy.folds(numbered(torch.zeros(20, dtype=torch.long), torch.arange(20) % 3), 5, by="groups")
    with pytest.raises(ModelError, match="leave nothing to train"):
        sy.folds(numbered(torch.zeros(20, dtype=torch.long), torch.arange(20) % 2), 2, by="groups")
    with pytest.raises(UnknownNameError, match="'blocs'"):
        sy.folds(task, by="blocs")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="valid=0"):
        sy.folds(task, valid=0)
    with pytest.raises(ModelError, match="repeats=0"):
        sy.cross_validate(task, repeats=0)
    with pytest.raises(ModelError, match="leave checkpoint= out"):
        sy.cross_validate(task, checkpoint="runs")
    with pytest.raises(ModelError, match=r"share=1\.5"):
        sy.label_noise(task, 1.5)
    data: Any = task.batches
    numbers = replace(task, classes=(), batches=replace(data, targets={s: t.float() for s, t in data.targets.items()}))
    with pytest.raises(ModelError, match="noise in labels is for classes"):
        sy.label_noise(numbers, 0.5)
    balanced = replace(task, batches=replace(data, balance=data.targets["train"]))
    with pytest.raises(ModelError, match="balances its training examples"):
        sy.folds(balanced)
    empty = Task("none", lambda: nn.Linear(1, 1), lambda split, epoch: [], cross_entropy, task.metrics)
    with pytest.raises(ModelError, match=r"train split .* is empty"):
        sy.folds(empty)

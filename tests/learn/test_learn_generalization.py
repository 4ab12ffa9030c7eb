"""Seen and unseen: gaps with intervals that cover, and inputs spoilt as stated, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steelyard as sy
from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.corrupt import CORRUPTIONS
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.measures import cross_entropy
from steelyard.learn.task import SPLITS, Task, build_seeded
from steelyard.learn.warp import warped


def test_every_part_and_gap_is_what_it_says(task: Task) -> None:
    model = sy.train(task, epochs=5, rate=0.02, progress=False).model
    table = sy.generalization(model, task)
    assert [r["part"] for r in table.rows] == [*SPLITS, "gap, valid", "gap, test"] * 2
    found = {split: outcomes(model, task, split) for split in SPLITS}
    for row in table.rows:
        metric, part = str(row["metric"]), str(row["part"])
        if part in SPLITS:
            expected = found[part][metric].mean()
        else:
            unseen = found[part.removeprefix("gap, ")][metric].mean()
            expected = (unseen - found["train"][metric].mean()) * (1 if metric == "loss" else -1)
        assert row["value"] == pytest.approx(expected)
        assert row["low"] <= row["value"] <= row["high"]
    assert set(table.column("method")) == {"Wilson", "Newcombe", "Student t"}


def test_the_intervals_of_a_gap_cover_the_gap_of_all_examples() -> None:
    """A fixed model on 200 draws of a train and a test split: the true gap is within 95 % of the intervals."""
    torch.manual_seed(0)
    model, draw = nn.Linear(2, 2), torch.Generator().manual_seed(0)
    metrics, inside = sy.task("digits").metrics, []

    def examples(size: int, flipped: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, 2, generator=draw)
        with torch.no_grad():
            y = model(x).argmax(1)
        return x, torch.where(torch.rand(size, generator=draw) < flipped, 1 - y, y)

    for _ in range(200):
        parts = {s: examples(80, flipped) for s, flipped in zip(SPLITS, (0.1, 0.3, 0.3), strict=True)}
        data = Examples({s: x for s, (x, _) in parts.items()}, {s: y for s, (_, y) in parts.items()}, 80, 0)
        rows = sy.generalization(model, Task("t", lambda: model, data, cross_entropy, metrics)).rows
        row = next(r for r in rows if (r["metric"], r["part"]) == ("accuracy", "gap, test"))
        inside.append(row["low"] <= 0.2 <= row["high"])
    assert 0.9 <= np.mean(inside) <= 0.995


def first(task: Task, split: str = "test", epoch: int = 0) -> torch.Tensor:
    found: Any = next(iter(task.batches(split, epoch))).inputs  # type: ignore[arg-type]
    return found


def test_noise_has_the_spread_of_each_column_and_missing_is_the_mean(blobs: Callable[..., Task]) -> None:
    task = blobs(sizes=(400, 20, 200))
    data: Any = task.batches
    scaled = replace(
        task, batches=replace(data, inputs={s: x * 10.0 ** torch.arange(5) for s, x in data.inputs.items()})
    )
    train: Any = scaled.batches
    spread, mean = train.inputs["train"].std(0), train.inputs["train"].mean(0)
    added = first(sy.corrupted(scaled, "noise", 0.5)) - first(scaled)
    assert torch.allclose(added.std(0) / spread, torch.full((5,), 0.5), atol=0.1)
    spoilt = first(sy.corrupted(scaled, "missing", 0.3))
    gone = spoilt != first(scaled)
    assert 0.25 < float(gone.float().mean()) < 0.35
    assert torch.allclose(spoilt[gone], mean.expand_as(spoilt)[gone], rtol=1e-4, atol=1e-4)


def test_spoilt_examples_are_the_same_each_time_and_other_splits_are_whole(task: Task) -> None:
    spoilt = sy.corrupted(task, "noise", 1.0)
    assert torch.equal(first(spoilt), first(spoilt, epoch=3))
    assert not torch.equal(first(spoilt), first(sy.corrupted(task, "noise", 1.0, seed=1)))
    assert torch.equal(first(spoilt, "valid"), first(task, "valid"))
    assert torch.equal(first(sy.corrupted(task, "noise", 0.0)), first(task))
    trained = sy.corrupted(task, "noise", 1.0, splits=("train",))
    assert len(trained.batches("train", 0)) == len(task.batches("train", 0))  # type: ignore[arg-type]
    assert not torch.equal(first(trained, "train"), first(task, "train"))
    sy.train(trained, epochs=1, progress=False)
    assert spoilt.about["corruption"] == "noise 1"


def test_images_move_by_so_many_pixels_and_turn_by_so_many_degrees() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 6] = 1
    assert warped(image, right=2.0)[0, 0, 4].round(decimals=4).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert warped(image, down=-3.0)[0, 0, :, 6].round(decimals=4).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    turned = warped(image, angle=torch.pi / 2)
    assert {tuple(p) for p in turned[0, 0].round(decimals=4).nonzero().tolist()} <= {(2, 4), (6, 4)}
    task = sy.task("digits", augment=False)
    far = [first(sy.corrupted(task, kind, s)) for kind, s in (("shift", 1.0), ("rotate", 30.0))]
    for spoilt in far:
        assert spoilt.shape == first(task).shape
        assert float((spoilt - first(task)).abs().mean()) > 0.02
    x = torch.zeros(256, 1, 15, 15)
    x[:, :, 7, 7] = 1
    data = Examples(dict.fromkeys(SPLITS, x), dict.fromkeys(SPLITS, torch.zeros(256, dtype=torch.long)), 256, 0)
    moved = first(sy.corrupted(replace(task, batches=data), "shift", 3.0))[:, 0]
    grid = torch.arange(15.0) - 7
    across, down = (moved.sum(1) * grid).sum(1), (moved.sum(2) * grid).sum(1)
    assert torch.allclose((across**2 + down**2).sqrt(), torch.full((256,), 3.0), atol=1e-3)
    assert abs(float(across.mean())) < 0.5


def test_robustness_is_paired_and_grows_with_the_strength() -> None:
    task = sy.task("digits", model="mlp", augment=False)
    model = sy.train(task, epochs=8, progress=False).model
    table = sy.robustness(model, task)
    assert table.column("corruption") == ["none", *(k for k in CORRUPTIONS for _ in range(4))]
    assert table.rows[0]["accuracy"] == sy.evaluate(model, task).rows[0]["value"]
    for kind in CORRUPTIONS:
        rows = [r for r in table.rows if r["corruption"] == kind]
        assert rows[-1]["low"] > 0
        assert [r["cost"] for r in rows] == sorted(r["cost"] for r in rows)
        spoilt = sy.evaluate(model, sy.corrupted(task, kind, rows[2]["strength"])).rows[0]["value"]
        assert rows[2]["accuracy"] == pytest.approx(spoilt)
        assert rows[2]["cost"] == pytest.approx(table.rows[0]["accuracy"] - spoilt)
    few = sy.robustness(model, task, ["noise"], strengths={"noise": (0.3,)})
    assert few.column("strength") == [0.0, 0.3]


def test_wrong_use_is_told(task: Task) -> None:
    model = build_seeded(task)
    assert {r["corruption"] for r in sy.robustness(model, task).rows} == {"none", "noise", "missing"}
    with pytest.raises(UnknownNameError, match="corruption 'nois'"):
        sy.corrupted(task, "nois", 0.1)
    with pytest.raises(ModelError, match="strength=-1"):
        sy.corrupted(task, "noise", -1.0)
    with pytest.raises(ModelError, match="needs images of shape"):
        sy.corrupted(task, "shift", 1.0)
    data: Any = task.batches
    tokens = replace(task, batches=replace(data, inputs={s: x.long() for s, x in data.inputs.items()}))
    with pytest.raises(ModelError, match="needs numbers"):
        sy.corrupted(tokens, "noise", 1.0)

"""Intervals against published values and by simulation; outcomes and comparisons against direct computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.errors import ModelError
from steelyard.learn.evaluate import compare, evaluate, outcomes
from steelyard.learn.intervals import _phi, block_length, blocks, paired_proportions, student, wilson
from steelyard.learn.measures import absolute_error, squared_error
from steelyard.learn.task import Task, build_seeded


@pytest.mark.parametrize(
    ("hits", "examples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(hits: int, examples: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(hits, examples) == pytest.approx((low, high), abs=6e-5)


def test_student_gives_the_textbook_interval() -> None:
    values = np.array([4.0, 6.0, 8.0, 10.0])  # mean 7, s 2.582, t(3) = 3.1824
    assert student(values) == pytest.approx((7 - 3.18245 * 1.29099, 7 + 3.18245 * 1.29099), abs=1e-4)
    assert student(values[:1]) == (-np.inf, np.inf)


def test_paired_proportions_gives_the_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17, 2635-2650, table II, method 10: 36, 12, 2, 0 of 50."""
    a = np.repeat([1.0, 0.0, 1.0, 0.0], [36, 12, 2, 0])
    b = np.repeat([1.0, 1.0, 0.0, 0.0], [36, 12, 2, 0])
    assert paired_proportions(a, b) == pytest.approx((0.0569, 0.3404), abs=6e-5)


def test_the_correlation_of_two_outcomes_is_corrected_for_continuity() -> None:
    assert _phi(20, 3, 2, 25) == pytest.approx((20 * 25 - 3 * 2 - 50 / 2) / (23 * 27 * 22 * 28) ** 0.5)
    assert _phi(5, 5, 4, 5) == 0  # 0 < 25 - 20 < 19 / 2
    assert _phi(10, 0, 0, 0) == 0


def test_paired_proportions_has_a_width_without_disagreement_and_is_antisymmetric() -> None:
    a = np.repeat([1.0, 0.0], [95, 5])
    low, high = paired_proportions(a, a)
    assert -0.06 < low < 0 < high < 0.06
    b = np.roll(a, 3)
    assert paired_proportions(a, b) == pytest.approx(tuple(-x for x in reversed(paired_proportions(b, a))))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    hits = random.binomial(200, 0.97, 1000)
    wilsons = [wilson(h, 200) for h in hits]
    assert 0.93 <= np.mean([low <= 0.97 <= high for low, high in wilsons]) <= 0.985
    means = [student(random.exponential(1.0, 60)) for _ in range(600)]
    assert 0.91 <= np.mean([low <= 1 <= high for low, high in means]) <= 0.97
    covered = []
    for _ in range(600):
        a = (random.random(150) < 0.95).astype(float)
        b = np.where(random.random(150) < 0.04, 1 - a, a)  # true difference: 0.04 * (1 - 2 * 0.95)
        low, high = paired_proportions(a, b)
        covered.append(low <= 0.04 * (1 - 2 * 0.95) <= high)
    assert 0.93 <= np.mean(covered) <= 0.995


def autoregressive(rho: float, random: np.random.Generator) -> np.ndarray:
    x = random.normal(size=1100)
    for i in range(1, len(x)):
        x[i] += rho * x[i - 1]
    return x[100:]


@pytest.mark.parametrize(("rho", "lengths"), [(0.0, (1, 4)), (0.6, (8, 25))])
def test_blocks_cover_the_truth_though_neighbours_are_alike(rho: float, lengths: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    series = [autoregressive(rho, random) for _ in range(100)]
    covered = sum(low <= 0 <= high for low, high in map(blocks, series))
    assert 89 <= covered <= 99
    assert lengths[0] <= np.mean([block_length(x) for x in series]) <= lengths[1]
    if rho:
        assert sum(low <= 0 <= high for low, high in map(student, series)) < 80
    assert blocks(series[0]) == blocks(series[0])
    assert blocks(series[0][:1]) == (-math.inf, math.inf)
    assert blocks(np.ones(50)) == (1.0, 1.0)


def test_examples_that_follow_one_another_have_intervals_by_blocks(task: Task) -> None:
    ordered = replace(task, ordered=True)
    values = outcomes(build_seeded(task), task)["loss"]
    row = evaluate(build_seeded(task), ordered).rows[-1]
    assert (row["low"], row["high"], row["method"]) == (*blocks(values), "block bootstrap")
    a, b = build_seeded(task, 0), build_seeded(task, 1)
    row = compare(a, b, ordered).rows[-1]
    difference = outcomes(b, task)["loss"] - outcomes(a, task)["loss"]
    assert (row["low"], row["high"], row["method"]) == (*blocks(difference), "block bootstrap, paired")


def test_outcomes_are_those_of_a_direct_computation_and_the_mode_survives(task: Task) -> None:
    model = build_seeded(task).train()
    model[2].eval()
    found = outcomes(model, task)
    assert [m.training for m in model] == [True, True, False, True]
    batch = next(iter(task.batches("test", 0)))
    model.eval()
    logits = model(batch.inputs)
    assert np.allclose(found["loss"], nn.functional.cross_entropy(logits, batch.targets, reduction="none").detach())
    assert np.array_equal(found["accuracy"], (logits.argmax(1) == batch.targets).double())
    assert found["loss"].shape == (30,)


def test_evaluate_says_value_interval_and_method(task: Task) -> None:
    table = evaluate(build_seeded(task), task)
    accuracy, loss = table.rows
    assert accuracy["method"] == "Wilson"
    assert loss["method"] == "Student t"
    assert (accuracy["low"], accuracy["high"]) == wilson(accuracy["value"] * 30, 30)
    assert loss["low"] < loss["value"] < loss["high"]
    narrow = evaluate(build_seeded(task), task, confidence=0.5).rows[0]
    assert accuracy["low"] < narrow["low"] < narrow["high"] < accuracy["high"]
    with pytest.raises(ModelError, match="between 0 and 1"):
        evaluate(build_seeded(task), task, confidence=95)


def test_compare_pairs_the_examples(task: Task) -> None:
    a, b = build_seeded(task, 0), build_seeded(task, 1)
    row = compare(a, b, task).rows[0]
    x, y = outcomes(a, task)["accuracy"], outcomes(b, task)["accuracy"]
    assert row["difference"] == pytest.approx(y.mean() - x.mean())
    assert row["low"] <= row["difference"] <= row["high"]
    batch = next(iter(task.batches("test", 0)))
    same = (a.eval()(batch.inputs).argmax(1) == b.eval()(batch.inputs).argmax(1)).float().mean().item()
    assert row["agreement"] == pytest.approx(same)
    itself = compare(a, a, task)
    assert itself.column("difference") == [0, 0]
    assert itself.column("agreement") == [1, 1]


def test_regression_has_no_agreement(task: Task) -> None:
    numbers = replace(
        task,
        build=lambda: nn.Linear(5, 1),
        loss=lambda outputs, targets: squared_error(outputs, targets.float()),
        metrics={"error": lambda outputs, targets: absolute_error(outputs, targets.float())},
        batches=lambda split, epoch: [replace(b, targets=b.targets.float()) for b in task.batches(split, epoch)],
    )
    assert compare(build_seeded(numbers), build_seeded(numbers, 1), numbers).column("agreement") == [None, None]
    assert evaluate(build_seeded(numbers), numbers).column("method") == ["Student t", "Student t"]


def test_an_empty_split_and_wrong_shapes_are_refused(blobs: Callable[..., Task]) -> None:
    task = blobs(sizes=(9, 9, 0))
    with pytest.raises(ModelError, match="test split of the task 'blobs' is empty"):
        evaluate(build_seeded(task), task)
    with pytest.raises(ModelError, match="test split of the task 'blobs' is empty"):
        compare(build_seeded(task), build_seeded(task), task)
    with pytest.raises(ModelError, match="no split 'proof'"):
        outcomes(build_seeded(task), task, "proof")
    with pytest.raises(ModelError, match="one more axis"):
        outcomes(nn.Flatten(0), blobs())
    with pytest.raises(ModelError, match="expected one tensor"):
        outcomes(nn.LSTM(5, 3), blobs())
    assert torch.is_grad_enabled()

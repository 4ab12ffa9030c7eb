"""A task whose targets are a model's own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn import imitation as module
from steelyard.learn.evaluate import outcomes
from steelyard.learn.imitation import imitation
from steelyard.learn.run import train
from steelyard.learn.task import SPLITS, Batch, build_seeded


def inputs(count: int = 12) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, 6, generator=g) for _ in range(count)]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 5))


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs - targets).square().sum(1)


@pytest.mark.parametrize(("metric", "best"), [("agreement", 1), ("cosine", 1), (squared, 0)])
def test_the_model_itself_agrees_fully_and_another_does_not(net: nn.Module, metric, best: int) -> None:
    task = imitation(net, inputs(), metric)
    other = nn.Linear(6, 5)
    for split in SPLITS:
        assert outcomes(net, task, split)[task.headline] == pytest.approx(best, abs=1e-6)
        assert outcomes(other, task, split)[task.headline].mean() < best - 0.05


def test_every_batch_is_in_one_split(net: nn.Module) -> None:
    task, given = imitation(net, inputs()), inputs()
    dealt = [batch.inputs for split in SPLITS for batch in task.batches(split, 0)]
    assert len(dealt) == len(given)
    assert all(sum(torch.equal(a, b) for b in dealt) == 1 for a in given)
    assert [task.about["batches"][split] for split in SPLITS] == [6, 2, 4]


def test_a_changed_model_changes_no_target(net: nn.Module) -> None:
    task = imitation(net, inputs(), "cosine")
    before = [next(iter(task.batches(split, 0))).targets for split in SPLITS]
    with torch.no_grad():
        net[0].weight.zero_()
    after = [next(iter(task.batches(split, 0))).targets for split in SPLITS]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("kept", "asked"), [(2**26, 2 + 4), (3 * 16 * 5 * 4, 3 + 2 * 3), (0, 2 * (2 + 4))])
def test_answers_to_what_measures_are_kept_while_they_are_small(
    net: nn.Module, kept: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are 16 x 5 numbers of four bytes; there are two batches to validate and four to test."""
    calls: list[Any] = []
    answered = module._answered
    monkeypatch.setattr(module, "KEPT", kept)
    monkeypatch.setattr(module, "_answered", lambda *given: calls.append(given) or answered(*given))
    task = imitation(net, inputs(), "cosine")
    first, second = ([b for split in ("valid", "test") for b in task.batches(split, 0)] for _ in range(2))
    assert len(calls) == asked
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("metric", ["agreement", "cosine", squared])
def test_training_on_it_brings_another_model_nearer(net: nn.Module, metric) -> None:
    task = imitation(net, inputs(30), metric).with_model(lambda: nn.Linear(6, 5))
    before = outcomes(build_seeded(task), task)[task.headline].mean()
    after = outcomes(train(task, epochs=10, rate=1e-2, progress=False).model, task)[task.headline].mean()
    assert after > before + 0.1 * abs(before)


def test_what_it_builds_is_the_model_and_trains(net: nn.Module) -> None:
    task = imitation(net, [Batch(x, torch.zeros(16)) for x in inputs()])
    built = build_seeded(task)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), net.parameters(), strict=True))
    assert all(p.requires_grad for p in built.parameters())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (None, "inputs: expected batches .*, found None"),
        ("abc", "inputs: expected batches .*, found 'abc'"),
        ({"x": torch.zeros(3, 4)}, "inputs: expected batches .*, found a dict"),
        (torch.zeros(30, 4), r"found one tensor of \(30, 4\): give inputs.split\(32\)"),
        ([{"x": torch.zeros(3, 4)}] * 5, "batch 0 is a dict: expected a tensor, .*; wrap the model"),
        (
            [torch.zeros(3, 4), [torch.zeros(3, 4)]] * 5,
            r"batch 1 is a list of 1 \(Tensor\): expected a tensor, a tuple",
        ),
        ([1, 2, 3], "batch 0 is a int"),
        ([()] * 3, "batch 0 is an empty tuple"),
        ([torch.zeros(())] * 3, "batch 0 is a tensor without axes"),
    ],
)
def test_what_are_no_batches_is_named(net: nn.Module, inputs: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        imitation(net, inputs)
    assert "\n" not in str(caught.value)


def test_too_few_batches_and_unknown_metrics_are_refused(net: nn.Module) -> None:
    with pytest.raises(ModelError, match="2 batches of inputs: expected at least three"):
        imitation(net, inputs(2))
    with pytest.raises(UnknownNameError, match="cosine"):
        imitation(net, inputs(), "cosin")  # type: ignore[arg-type]

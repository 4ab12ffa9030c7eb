"""Averages of weights: their formulas, ties, buffers, wrappers, low precision; in a run, and after it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.formats.module import from_module
from steelyard.learn.average import Average, Ema, Swa, greedy_soup, update_batch_norm
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.run import Run, train
from steelyard.learn.state import copied, model_state, tensors_of
from steelyard.learn.task import Task, build_seeded


class Tied(nn.Module):
    """Embedding and head are one parameter; a counter and running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x)))[:, :3]


def walk(model: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of the model after each of some random steps."""
    random, seen = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        with torch.no_grad():
            for tensor in tensors_of(model).values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=random).to(tensor.dtype))
                else:
                    tensor.add_(1)
        seen.append({name: t.detach().clone() for name, t in tensors_of(model).items()})
        yield seen[-1]


def averaged(average: Average) -> dict[str, torch.Tensor]:
    with average.applied():
        return {name: t.detach().clone() for name, t in tensors_of(average.model).items()}


def test_an_exponential_average_is_its_formula() -> None:
    model = Tied()
    average, expected = Average(model, Ema(0.7)), None
    for t, now in enumerate(walk(model, 30), 1):
        average.update()
        d = min(0.7, (1 + t) / (10 + t))
        w = now["embed.weight"].double()
        expected = w if expected is None else d * expected + (1 - d) * w
    assert torch.allclose(averaged(average)["embed.weight"].double(), expected, atol=1e-5)


def test_an_equal_average_is_the_mean_and_counters_are_copied() -> None:
    model = Tied()
    average, seen = Average(model, Swa()), []
    for now in walk(model, 12):
        seen.append(now)
        average.update()
    with average.applied([(torch.zeros(3, 5), torch.zeros(3))]):
        assert torch.allclose(model.embed.weight, torch.stack([s["embed.weight"] for s in seen]).mean(0), atol=1e-5)
        assert model.head.weight is model.embed.weight
    assert average.state()["tensors"]["norm.num_batches_tracked"] == 12
    assert "head.weight" not in average.state()["tensors"]
    assert torch.equal(model.embed.weight, seen[-1]["embed.weight"])


def test_small_steps_of_bfloat16_weights_are_not_lost() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    average = Average(model, Ema(0.9999))
    average.update()
    average.count = 10**6
    nn.init.ones_(model.weight)
    for _ in range(5000):
        average.update()
    expected = 1 - 0.9999**5000
    assert average.state()["tensors"]["weight"].dtype == torch.float32
    assert averaged(average)["weight"].float().mean().item() == pytest.approx(expected, rel=0.01)


def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    model = nn.Sequential(nn.Linear(5, 3), torch.compile(nn.Linear(3, 3), backend="eager"))
    compiled = torch.compile(model, backend="eager")
    average = Average(compiled, Ema(0.5))
    for _ in walk(model, 3):
        average.update()
    assert list(average.state()["tensors"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    other = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))
    average.copy_to(other)
    assert torch.equal(other[1].weight, average.state()["tensors"]["1.weight"])


def test_batch_norm_is_measured_anew(blobs: Callable[..., Task]) -> None:
    task = blobs(build=lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)))
    model = build_seeded(task)
    model[0].running_mean.fill_(9)
    model.train()
    batches = list(task.batches("train", 0))
    assert update_batch_norm(model, batches) == 1
    inputs = torch.stack([b.inputs.mean(0) for b in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, inputs, atol=1e-6)
    assert model[0].momentum == 0.1
    assert all(module.training for module in model.modules())


def test_batch_norm_without_batches_is_refused_and_left_as_it_was(blobs: Callable[..., Task]) -> None:
    task = blobs(build=lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    model = build_seeded(task)
    model(next(iter(task.batches("train", 0))).inputs)
    before = copied(model_state(model)["tensors"])
    average = Average(model, "swa")
    average.update()
    for use in (lambda: average.applied().__enter__(), lambda: update_batch_norm(model, [])):
        with pytest.raises(ModelError, match=r"1 batch norms.* give batches of the training data"):
            use()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model)["tensors"].items())
    with pytest.raises(ModelError, match="a tuple of 3"), average.applied([(1, 2, 3)]):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model)["tensors"].items())
    plain = Average(nn.Linear(5, 3), "swa")
    plain.update()
    with plain.applied():  # nothing to measure
        pass


@pytest.mark.parametrize("pair", [tuple, list])
def test_batch_norm_is_measured_on_pairs_of_a_loader(blobs: Callable[..., Task], pair: type) -> None:
    task = blobs(build=lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    model, found = build_seeded(task), []
    average = Average(model, Swa())
    average.update()
    batches = list(task.batches("train", 0))
    for given in (batches, [pair((b.inputs, b.targets)) for b in batches]):
        with average.applied(given):
            found.append(model[0].running_mean.clone())
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


def test_an_average_is_not_copied_to_another_model() -> None:
    average, other = Average(nn.Linear(2, 2), "ema"), nn.Linear(2, 3)
    average.update()
    before = other.bias.detach().clone()
    with pytest.raises(ModelError, match=r"Linear: 'weight' is of shape \[2, 2\] in the one and of shape \[3, 2\]"):
        average.copy_to(other)
    with pytest.raises(ModelError, match=r"'0\.weight' is absent in the one"):
        average.copy_to(nn.Sequential(nn.Linear(2, 2)))
    assert torch.equal(other.bias, before)


def test_the_best_of_a_run_with_an_average_is_an_average(task: Task) -> None:
    """Also if the weights before it were better: those of a rate that is far too high in the end, here."""
    options = {"epochs": 4, "optimizer": "sgd", "rate": 3.0, "schedule": lambda done: 0.01 if done < 0.5 else 1.0}
    run = train(task, average="swa=0.6", progress=False, **options)
    losses = run.history().column("valid loss")
    assert min(losses[:3]) < min(losses[3:])
    assert mean_outcomes(run.model, task, "valid")["loss"] == min(losses[3:])


def test_an_average_is_named_or_made(task: Task) -> None:
    a, b = (train(task, epochs=2, average=kind, progress=False) for kind in ("ema=0.9", Ema(0.9)))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert Average(a.model, "swa=0.5").kind == Swa(0.5)
    for use in (lambda: Run(task, average=0.9), lambda: Average(a.model, None)):
        with pytest.raises(RecipeError, match=r"expected Ema\(\), Swa\(\), or a text such as ema=0.99"):
            use()
    with pytest.raises(UnknownNameError, match="there is no average 'sma'"):
        Run(task, average="sma")


def test_a_frozen_batch_norm_is_left_alone(blobs: Callable[..., Task]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(5).requires_grad_(False), nn.Linear(5, 3))
    assert update_batch_norm(model, blobs().batches("train", 0)) == 0
    assert model[0].running_mean.abs().sum() == 0


@pytest.mark.parametrize("kind", [Ema(0.9), Swa(0.4)])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_ends_with_its_average_also_when_it_was_broken_off(
    blobs: Callable[..., Task], tmp_path: Path, kind: Ema | Swa, keep: str
) -> None:
    task = blobs(build=Tied)
    options = {"epochs": 5, "average": kind, "keep": keep, "schedule": "constant", "rate": 0.05}
    plain = train(task, progress=False, **{**options, "average": None})
    whole = train(task, progress=False, **options)
    assert [row["loss"] for row in whole.log] == [row["loss"] for row in plain.log]  # training itself is the same
    assert not torch.equal(whole.model.embed.weight, plain.model.embed.weight)
    losses = whole.history().column("valid loss")
    last = losses[-1] if keep == "last" else min(losses[1 if isinstance(kind, Ema) else 3 :])  # raw until then
    assert mean_outcomes(whole.model, task, "valid")["loss"] == last
    for stop in (8, 19):
        with Run(task, checkpoint=tmp_path / str(stop), **options) as run:
            for step in run:
                if step.index == stop:
                    break
        parts = train(task, checkpoint=tmp_path / str(stop), resume=True, progress=False, **options)
        for name, tensor in tensors_of(whole.model).items():
            assert torch.equal(tensor, tensors_of(parts.model)[name])


def test_the_average_of_a_run_is_that_of_its_weights(task: Task) -> None:
    seen = []
    options = {"epochs": 4, "average": Swa(0.5), "keep": "last", "schedule": "constant"}
    with Run(task, **options) as run:
        for step in run:
            if step.index in (14, 19):  # the last of the third and of the fourth epoch
                seen.append(run.model[0].weight.detach().clone())
    assert torch.allclose(run.model[0].weight, torch.stack(seen).mean(0), atol=1e-6)


def test_a_soup_takes_what_helps_and_leaves_out_what_does_not(task: Task) -> None:
    nets = [train(task, epochs=e, seed=0, rate=0.01, progress=False).model for e in (3, 5, 8)]
    bad = build_seeded(task, 9)
    with torch.no_grad():
        for p in bad.parameters():
            p.mul_(50)
    candidates = [from_module(net).settle() for net in (bad, *nets)]
    model = build_seeded(task, 1)
    table = greedy_soup(model, candidates, task)
    losses = [mean_outcomes(net, task, "valid")["loss"] for net in nets]
    assert table.column("candidate")[-1] == 0
    assert table.rows[-1]["kept"] is False
    assert mean_outcomes(model, task, "valid")["loss"] == table.meta["valid loss"] <= min(losses)
    kept = [candidates[row["candidate"]]["0.weight"].array() for row in table.rows if row["kept"]]
    assert torch.allclose(model[0].weight, torch.tensor(sum(kept) / len(kept)), atol=1e-6)


def test_a_soup_of_what_does_not_fit_changes_nothing(task: Task) -> None:
    model = build_seeded(task, 1)
    before = model[0].weight.detach().clone()
    with pytest.raises(ModelError, match="do not match"):
        greedy_soup(model, [from_module(build_seeded(task, 2)).settle(), from_module(nn.Linear(2, 2))], task)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ModelError, match="no candidates"):
        greedy_soup(model, [], task)


def test_wrong_numbers_are_named(task: Task) -> None:
    with pytest.raises(ModelError, match=r"decay=1\.5"):
        Ema(1.5)
    with pytest.raises(ModelError, match=r"start=1"):
        Swa(1)
    with pytest.raises(ModelError, match=r"decay='a'"):
        Ema("a")
    assert replace(Ema(), decay=0.5).share(100) == 0.5

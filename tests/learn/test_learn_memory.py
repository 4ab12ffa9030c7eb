"""Adding and copying: what an example is, from a seed, with the baselines that theory gives; what the tables show."""

from __future__ import annotations

import math

import pytest
import torch

from steelyard.errors import ModelError, RecipeError
from steelyard.learn.evaluate import evaluate
from steelyard.learn.models import model
from steelyard.learn.run import train
from steelyard.learn.seeding import seeded
from steelyard.learn.task import Split, Task
from steelyard.learn.tasks import task


def all_of(found: Task, split: Split, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(found.batches(split, epoch))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def test_an_example_of_adding() -> None:
    found = task("adding:31", examples=400)
    x, y = all_of(found, "train")
    assert x.shape == (400, 31, 2)
    assert found.name == "adding:31"
    assert torch.equal(x[..., 1].sum(1), torch.full((400,), 2.0))
    assert torch.equal(x[:, :15, 1].sum(1), torch.ones(400))
    assert torch.equal((x[..., 0] * x[..., 1]).sum(1), y)
    assert (x[..., 1].sum(0) > 0).all()  # every step is marked in some example
    assert 0 <= x.min() <= x.max() <= 1


def test_an_example_of_copying() -> None:
    found = task("copying:25", examples=300)
    x, y = all_of(found, "train")
    assert x.shape == y.shape == (300, 45)
    assert (x[:, :10] < 8).all()
    assert (x[:, 10:34] == 8).all()  # length - 1 blanks
    assert (x[:, 34] == 9).all()
    assert (x[:, 35:] == 8).all()
    assert (y[:, :35] == 8).all()
    assert torch.equal(y[:, 35:], x[:, :10])
    assert x[:, :10].unique().tolist() == list(range(8))


@pytest.mark.parametrize("name", ["adding:10", "copying:10"])
def test_examples_are_a_function_of_seed_split_and_epoch(name: str) -> None:
    found, again, other = task(name, seed=1), task(name, seed=1), task(name, seed=2)
    assert torch.equal(all_of(found, "train", 3)[0], all_of(again, "train", 3)[0])
    assert not torch.equal(all_of(found, "train", 3)[0], all_of(found, "train", 4)[0])
    assert not torch.equal(all_of(found, "train")[0], all_of(other, "train")[0])
    assert torch.equal(all_of(found, "test", 0)[0], all_of(found, "test", 5)[0])
    assert not torch.equal(all_of(found, "test")[0], all_of(found, "valid")[0])


class Says(torch.nn.Module):
    """The answer of who remembers nothing."""

    def __init__(self, copying: bool) -> None:
        super().__init__()
        self.copying = copying

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.copying:
            return torch.ones(len(x), 1)
        logits = torch.full((*x.shape, 9), -math.inf)
        logits[:, :-10, 8] = 0.0
        logits[:, -10:, :8] = 0.0
        return logits


@pytest.mark.parametrize("name", ["adding:40", "copying:40"])
def test_the_baselines_are_those_of_a_model_without_memory(name: str) -> None:
    found = task(name)
    table = evaluate(Says("copying" in name), found)
    for row in table.rows:
        assert row["low"] - 1e-6 <= row["baseline"] <= row["high"] + 1e-6, row
    assert table.column("baseline") == [found.baselines[m] for m in table.column("metric")]


def test_an_lstm_learns_to_add() -> None:
    found = task("adding:10", examples=2000)
    with seeded(0):
        net = model("rnn", found.interface, hidden=32)
    run = train(found, net, epochs=12, rate=1e-2, progress=False)
    rows = {row["metric"]: row for row in evaluate(run.model, found).rows}
    assert rows["squared error"]["value"] < 0.005
    assert rows["right"]["value"] > 2 * rows["right"]["baseline"]


@pytest.mark.parametrize("name", ["adding", "copying"])
def test_wrong_lengths_are_named(name: str) -> None:
    assert task(name).about["length"] == 100
    with pytest.raises(ModelError, match=f"the task '{name}:x': expected the number of steps, as in {name}:100"):
        task(f"{name}:x")
    with pytest.raises(RecipeError, match="length=0: expected a positive whole number"):
        task(f"{name}:0")
    with pytest.raises(RecipeError, match="batch_size=0"):
        task(name, batch_size=0)
    if name == "adding":
        with pytest.raises(ModelError, match="length=1: expected 2 steps"):
            task("adding:1")

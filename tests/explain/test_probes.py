"""Probes: ridge as scikit-learn has it, what a layer hands on, and a model and a training that are left as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor, nn

import steelyard as sy
from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain import probes as module
from steelyard.explain.layers import differentiable
from steelyard.explain.ridge import STRENGTHS, fit_ridge
from steelyard.learn.data import Examples
from steelyard.learn.measures import cross_entropy, squared_error
from steelyard.learn.task import Batch, Task, build_seeded
from steelyard.report.plots import Line


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("features", [5, 40])  # fewer than the examples, and more
def test_ridge_is_scikit_learns(features: int) -> None:
    draw = torch.Generator().manual_seed(features)
    x = torch.randn(30, features, generator=draw, dtype=torch.float64) + 3
    y = x[:, :2] * 2 + torch.randn(30, 2, generator=draw, dtype=torch.float64)
    ours = fit_ridge(x, y)
    scale = float((x - x.mean(0)).square().sum()) / features
    theirs = RidgeCV(alphas=(STRENGTHS * scale).numpy(), scoring="neg_mean_squared_error").fit(x.numpy(), y.numpy())
    assert ours.strength * scale == pytest.approx(theirs.alpha_, rel=1e-9)
    there = Ridge(alpha=theirs.alpha_).fit(x.numpy(), y.numpy())
    assert ours.predict(x).numpy() == pytest.approx(there.predict(x.numpy()), abs=1e-8)
    left_out = []
    for i in range(30):  # what the closed form stands for
        rest = np.arange(30) != i
        fit = Ridge(alpha=theirs.alpha_).fit(x.numpy()[rest], y.numpy()[rest])
        left_out.append(np.square(fit.predict(x.numpy()[i : i + 1]) - y.numpy()[i]).mean())
    assert np.mean(left_out) == pytest.approx(-theirs.best_score_, rel=1e-6)


def test_ridge_of_what_never_varies_is_the_mean() -> None:
    found = fit_ridge(torch.ones(4, 3), torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    assert found.predict(torch.zeros(1, 3)).item() == pytest.approx(3)


class Block(nn.Module):
    """A shortcut around two layers, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.tanh(x + self.b(torch.relu(self.a(x))))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_hands_on_what_the_next_is_given(frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Block().requires_grad_(not frozen), torch.randn(7, 5)
    with differentiable(model):
        found = module._handed_on(model, [Batch(x, torch.zeros(7, dtype=torch.long))], 100).features
    with torch.no_grad():
        stem = torch.relu(model.stem(x))
        a = torch.relu(model.a(stem))
        b = torch.tanh(stem + model.b(a))
        expected = {"inputs": x, "stem": stem, "a": a, "b": b, "head": model.head(b)}
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, atol=1e-6), name
    assert all(p.requires_grad is not frozen for p in model.parameters())


def blobs(build) -> Task:
    draw = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 5, generator=draw) * 1.5
    targets = {split: torch.arange(size) % 3 for split, size in (("train", 90), ("valid", 60), ("test", 60))}
    inputs = {s: centres[y] + torch.randn(len(y), 5, generator=draw) for s, y in targets.items()}
    return Task(
        "blobs",
        build,
        Examples(inputs, targets, 30, 0),
        cross_entropy,
        {"accuracy": sy.task("digits").metrics["accuracy"]},
    )


def test_a_layer_of_zeros_knows_nothing_and_a_wide_one_is_read_through_a_sketch() -> None:
    task = blobs(lambda: nn.Sequential(nn.Linear(5, 900), nn.ReLU(), nn.Linear(900, 4), nn.Linear(4, 3)))
    model = build_seeded(task)
    nn.init.zeros_(model[2].weight)
    table = sy.probe(model, task, width=64)
    known = dict(zip(table.column("layer"), table.column("known"), strict=True))
    assert known["2"] == known["3"] == table.meta["chance"] == pytest.approx(1 / 3)
    assert known["inputs"] > 0.7
    assert known["0"] > 0.7
    assert table.column("numbers") == [5, 900, 4, 3]
    for row in table.rows:
        assert row["low"] <= row["known"] <= row["high"]


def test_the_model_and_all_random_numbers_are_left_as_they_were() -> None:
    task = blobs(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))
    model = build_seeded(task)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    chance = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sy.probe(model, task)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert not model[1].training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(chance[0], torch.get_rng_state())
    assert np.array_equal(chance[1], np.random.get_state()[1])
    assert chance[2] == random.getstate()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_as_a_gauge_it_probes_between_epochs_and_changes_nothing() -> None:
    task = blobs(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))
    probes = sy.Probes(task, at=(0, 2))
    run = sy.train(task, epochs=4, gauges=[probes], keep="last", progress=False)
    alone = sy.train(task, epochs=4, keep="last", progress=False)
    assert run.table().column("loss") == alone.table().column("loss")
    for a, b in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    table = probes.table()
    assert table.column("epoch") == [0] * 3 + [2] * 3 + [4] * 3
    assert table.rows == probes.table().rows
    half = sy.Run(task, epochs=4, keep="last")
    models = [build_seeded(task), None, run.model]
    for step in half:
        if step.epoch == 2:
            break
        models[1] = step.model  # the loop stops after the first step of the third epoch, see below
        kept = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    models[1].load_state_dict(kept)
    for number, model in enumerate(models):
        rows = [{k: v for k, v in r.items() if k != "epoch"} for r in table.rows[3 * number : 3 * number + 3]]
        assert list(sy.probe(model, task).rows) == rows
    told = sy.Probes(task)
    sy.train(task, epochs=6, gauges=[told], keep="last", progress=False)
    assert list(dict.fromkeys(told.table().column("epoch"))) == [0, 1, 2, 4, 6]
    assert len(Line(table, "epoch", ("known",), by="layer").figure()["data"]) == 3


@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_run_goes_on_with_its_probes(tmp_path, stop: int) -> None:
    task = blobs(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    whole, first, second = (sy.Probes(task, at=(0, 1, 3)) for _ in range(3))
    sy.train(task, epochs=4, gauges=[whole], keep="last", progress=False)
    with sy.Run(task, epochs=4, gauges=[first], keep="last", checkpoint=tmp_path) as run:
        for step in run:
            if step.index == stop:
                break
    assert step.epoch < 3
    sy.train(task, epochs=4, gauges=[second], keep="last", checkpoint=tmp_path, resume=True, progress=False)
    assert second.table() == whole.table()


def test_numbers_to_predict_give_the_share_of_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = {
        split: torch.randn(size, 4, generator=draw) for split, size in (("train", 60), ("valid", 40), ("test", 40))
    }
    targets = {split: x[:, :1] * 2 for split, x in inputs.items()}
    build = lambda: nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))  # noqa: E731
    task = Task("lines", build, Examples(inputs, targets, 20, 0), squared_error, {"error": squared_error})
    table = sy.probe(build_seeded(task), task)
    assert table.column("known")[0] == pytest.approx(1, abs=1e-6)
    assert table.column("known")[1] < 0.999
    assert "R²" in next(c.about for c in table.columns if c.name == "known")


def test_targets_of_positions_are_examples(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcabcabd" * 300, encoding="utf-8")
    task = sy.task(f"text:{path}", context=16)
    build = lambda: sy.model("transformer", task.interface)  # noqa: E731
    table = sy.probe(build_seeded(task.with_model(build)), task, examples=200)
    assert table.meta["examples"] <= 200
    assert table.column("known")[-1] > table.meta["chance"]


def test_some_layers_in_the_order_in_which_they_run() -> None:
    task = blobs(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    model = build_seeded(task)
    every = {row["layer"]: row for row in sy.probe(model, task).rows}
    assert list(sy.probe(model, task, ["4", "0"]).rows) == [every[name] for name in ("inputs", "0", "4")]


def test_wrong_use_is_told() -> None:
    task = blobs(lambda: nn.Linear(5, 3))
    model = build_seeded(task)
    with pytest.raises(UnknownNameError, match="layer 'heat'"):
        sy.probe(model, task, ["heat"])
    with pytest.raises(ModelError, match="no model to probe"):
        sy.Probes(task).update()
    empty = Task("none", lambda: nn.Linear(5, 3), lambda split, epoch: [], cross_entropy, task.metrics)
    with pytest.raises(ModelError, match=r"train split .* is empty"):
        sy.probe(model, empty)
    with pytest.raises(ModelError, match="examples=0"):
        sy.probe(model, task, examples=0)
    turned = Task("turned", lambda: nn.Linear(5, 3), task.batches, cross_entropy, task.metrics)
    time_first = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (5, -1)), nn.Flatten(), nn.LazyLinear(3))
    time_first(torch.zeros(30, 5))
    with pytest.raises(ModelError, match="same first axes"):
        sy.probe(time_first, turned)

"""Starts compared: the left-out prediction is exact, bad starts come last with a reason, and nothing is harmed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.core.table import Table
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.explain.starts import compare_starts
from steelyard.explain.tangent import RIDGE, Tangent, tangent
from steelyard.init.he import He
from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.seeding import generator
from steelyard.learn.task import SPLITS, Task


def net(depth: int) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def blobs(build: object = lambda: net(1)) -> Task:
    random = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 6, generator=random) * 2
    targets = {split: torch.arange(48) % 3 for split in SPLITS}
    inputs = {split: centres[y] + torch.randn(48, 6, generator=random) for split, y in targets.items()}
    data = Examples(inputs, targets, 24, 0)
    return Task("blobs", build, data, cross_entropy, {"accuracy": accuracy})  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    found = next(iter(blobs().batches("train", 0)))
    assert isinstance(found.inputs, Tensor)
    return found.inputs, found.targets


def test_the_kernel_holds_inner_products_of_gradients_along_one_direction() -> None:
    torch.manual_seed(0)
    model, (x, y) = net(1), batch()
    signs = torch.randint(0, 2, (3,), generator=generator(4, "direction")) * 2.0 - 1
    gradients = [torch.autograd.grad(f @ signs, list(model.parameters()), retain_graph=True) for f in model(x)]
    rows = torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients])
    assert torch.allclose(tangent(model, x, y, functional.cross_entropy, 4).kernel.float(), rows @ rows.T, atol=1e-3)
    directions = {tuple((torch.randint(0, 2, (3,), generator=generator(s, "direction"))).tolist()) for s in range(99)}
    assert len(directions) == 8


def test_what_is_left_out_is_predicted_by_the_others_alone() -> None:
    torch.manual_seed(0)
    x, y = batch()
    seen = tangent(net(1), x, y, functional.cross_entropy)
    size = seen.kernel.diagonal().sqrt()
    cosines = seen.kernel / size[:, None] / size
    cosines = cosines - cosines.mean(0) - cosines.mean(1, keepdim=True) + cosines.mean()
    asked, outputs = seen.asked - seen.asked.mean(0), seen.outputs - seen.outputs.mean(0)
    got = []
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        ridged = cosines[rest][:, rest] + RIDGE * torch.eye(len(rest))
        got.append(outputs[i] + cosines[i, rest] @ torch.linalg.solve(ridged, (asked - outputs)[rest]))
    predicted = torch.stack(got)
    assert seen.taught() == pytest.approx(float((predicted * asked).sum() / predicted.norm() / asked.norm()), abs=1e-9)
    assert seen.taught() > 0.5


def test_no_scale_of_the_gradient_counts_and_loud_outputs_do() -> None:
    torch.manual_seed(0)
    x, y = batch()
    seen = tangent(net(1), x, y, functional.cross_entropy)
    assert replace(seen, kernel=seen.kernel * 1e-12).taught() == pytest.approx(seen.taught(), rel=1e-9)
    noise = torch.randn(seen.outputs.shape, dtype=torch.float64) * 100
    loud = replace(seen, outputs=noise)
    assert loud.taught() < 0.3 < seen.taught()
    assert loud.loud > 1 > seen.loud


def test_rounding_teaches_nothing() -> None:
    """A kernel of equal samples has differences of 1e-16, in whose direction any prediction is perfect."""
    targets = torch.arange(30) % 3
    asked = functional.one_hot(targets).double()
    same = torch.ones(30, 30).double() + 1e-15 * (targets[:, None] == targets)
    assert Tangent(same, torch.zeros(30, 3).double(), asked, 1.0).taught() < 1e-6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_teaches_nothing(wrong: float) -> None:
    seen = Tangent(torch.full((9, 9), wrong).double(), torch.zeros(9, 2).double(), torch.randn(9, 2).double(), 1.0)
    assert (seen.taught(), seen.alike) == (0.0, None)


def test_regression_and_targets_of_any_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    y = 1000 * x @ torch.randn(6, 2)
    seen = tangent(nn.Linear(6, 2), x, y, functional.mse_loss)
    assert torch.allclose(seen.asked.float(), y, rtol=0.1)
    assert seen.taught() > 0.9


STARTS = {"constant": "constant(value=0.3)", "small": "normal(std=0.001)", "he": "he", "xavier": He(), "data": "data"}


def compared(**options: object) -> Table:
    return compare_starts(blobs(), STARTS, [1, 8], model=net, **options)  # type: ignore[arg-type]


def test_the_best_come_first_at_each_depth_and_each_row_says_why() -> None:
    table = compared()
    assert table.column("depth") == [1] * 5 + [8] * 5
    for depth in (1, 8):
        rows = [row for row in table.rows if row["depth"] == depth]
        assert {row["start"] for row in rows[3:]} == {"constant", "small"}, depth
        assert table.meta["best"][depth] == rows[0]["start"]
        assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    bad = {row["start"]: row for row in table.rows if row["depth"] == 8}
    assert "all are the same" in bad["small"]["why"]
    assert "vanishing" in bad["small"]["why"]
    assert bad["small"]["alike"] > 0.99
    assert "teach each other" in table.rows[0]["why"]


def test_starts_that_teach_nothing_share_a_rank() -> None:
    table = compare_starts(blobs(), {"a": "zeros", "b": "zeros", "he": "he"}, model=net(1), seeds=1)
    assert [row["rank"] for row in table.rows] == [1, 2, 2]
    assert table.meta["best"] == "he"


def test_training_decides_where_it_is_asked_for() -> None:
    table = compared(train=30, rate=0.01, seeds=2)
    for depth in (1, 8):
        found = [row["accuracy"] for row in table.rows if row["depth"] == depth]
        assert found == sorted(found, reverse=True)
        assert found[0] > 0.8
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in table.rows)
    assert table.meta["steps"] == 30
    assert table.meta["tau-b of score and result"] > 0.4


def test_less_is_better_where_the_task_says_so() -> None:
    task = replace(blobs(), metrics={"error": lambda f, y: 1 - accuracy(f, y)}, lower_is_better=("error",))
    table = compare_starts(task, {"small": "normal(std=0.0001)", "he": "he"}, train=30, rate=0.01, seeds=1)
    assert table.column("start") == ["he", "small"]
    assert table.column("error")[0] < table.column("error")[1]
    assert table.column("low") == [None, None]


def test_a_training_that_diverges_is_last_and_says_so() -> None:
    def enormous(model: nn.Module) -> None:
        for p in model.parameters():
            nn.init.constant_(p, 1e38)

    table = compare_starts(blobs(lambda: nn.Linear(6, 3)), {"enormous": enormous, "he": "he"}, train=3, seeds=1)
    assert table.column("start") == ["he", "enormous"]
    assert table.rows[1]["accuracy"] is None
    assert table.rows[1]["why"].startswith("cannot be trained: ")
    assert "the validation loss before the first step is nan" in table.rows[1]["why"]


def test_a_start_that_cannot_be_made_is_last_and_says_why() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.fc(x) - 1e9) + x)

    def fails(_model: nn.Module) -> None:
        raise ModelError("no such thing")

    table = compare_starts(Zero(), {"he": "he", "fails": fails}, batch=batch(), loss=functional.cross_entropy)
    assert table.column("start") == ["he", "fails"]
    assert table.rows[1]["why"] == "cannot be made: no such thing"
    assert table.rows[1]["score"] is None


def test_the_model_and_chance_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    model(batch()[0]).sum().backward()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    table = compare_starts(model, batch=batch(), loss=functional.cross_entropy)
    assert len(table.rows) == 7
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.training for layer in model.modules())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


def test_as_given_is_what_came_and_default_is_torchs() -> None:
    torch.manual_seed(3)
    model = net(1)
    x, y = batch()
    table = compare_starts(model, ["as given", "default"], batch=(x, y), loss=functional.cross_entropy, seeds=1)
    losses = dict(zip(table.column("start"), table.column("loss"), strict=True))
    assert losses["as given"] == pytest.approx(float(functional.cross_entropy(model(x), y).detach()), rel=1e-6)
    assert losses["default"] != losses["as given"]


def test_the_same_seed_gives_the_same_table() -> None:
    rows = [compare_starts(blobs(), ["default", "he", "data"], seeds=2, seed=5).rows for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0] != compare_starts(blobs(), ["default", "he", "data"], seeds=2, seed=6).rows


LOSS = functional.cross_entropy


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: compare_starts(net(1), ["he"]), RecipeError, "needs batch=(inputs, targets) and loss="),
        (lambda: compare_starts(net(1), ["he"], batch=batch(), loss=LOSS, train=5), RecipeError, "needs a task"),
        (lambda: compare_starts(blobs(), ["hee"]), UnknownNameError, "did you mean 'he'?"),
        (lambda: compare_starts(blobs(), "he"), RecipeError, "write ['he']"),
        (lambda: compare_starts(blobs(), []), RecipeError, "0 starts"),
        (lambda: compare_starts(blobs(), ["he", "he"]), RecipeError, "give each one a name"),
        (lambda: compare_starts(blobs(), [3]), RecipeError, "not 3"),
        (lambda: compare_starts(blobs(), ["he"], [1, 2]), RecipeError, "depths need a function"),
        (lambda: compare_starts(blobs(), ["he"], [], model=net), RecipeError, "expected whole numbers"),
        (lambda: compare_starts(blobs(), ["he"], [0], model=net), RecipeError, "expected whole numbers"),
        (lambda: compare_starts(blobs(), ["he"], [1], model=lambda d: d), ModelError, "built as a int"),
        (lambda: compare_starts(blobs(), ["he"], seeds=0), RecipeError, "1 seed"),
        (lambda: compare_starts(blobs(), ["he"], examples=2), RecipeError, "at least 8"),
        (lambda: compare_starts(blobs(), ["he"], rate=0.1), RecipeError, "train=200"),
        (lambda: compare_starts(blobs(), ["he"], train=2, rat=0.1), UnknownNameError, "did you mean 'rate'?"),
        (lambda: compare_starts(blobs(), ["he"], train=2, optimizer="adm"), UnknownNameError, "did you mean 'adam"),
        (lambda: compare_starts(blobs(), ["he"], train=2, rate=-1), ModelError, "positive rate"),
        (lambda: compare_starts("digits", ["he"], batch=batch(), loss=LOSS), RecipeError, "not str"),
        (lambda: compare_starts(net(1).to("meta"), ["he"], batch=batch(), loss=LOSS), ModelError, "meta device"),
        (lambda: compare_starts(nn.LazyLinear(3), ["he"], batch=batch(), loss=LOSS), ModelError, "no shape yet"),
        (lambda: compare_starts(net(1), ["he"], batch=3, loss=LOSS), RecipeError, "(inputs, targets)"),
        (lambda: compare_starts(blobs(), ["he"], batch=tuple(t[:4] for t in batch())), ModelError, "4 samples"),
        (lambda: compare_starts(blobs(lambda: nn.Linear(5, 3)), ["he"]), ModelError, "fails"),
        (lambda: compare_starts(blobs(lambda: nn.LSTM(6, 3)), ["he"]), ModelError, "returns a tuple"),
        (lambda: compare_starts(blobs(lambda: net(1).requires_grad_(False)), ["he"]), ModelError, "trainable weight"),
    ],
)
def test_wrong_use_is_said_in_one_line(call: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_every_kind_of_model_can_be_compared() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x))[0])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (16, 6), generator=random)
    image = torch.randn(16, 3, 8, 8, generator=random)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    two = _Two()
    cases: Iterable[tuple[nn.Module, object, object]] = [
        (Words(), (tokens, tokens), loss),
        (conv, (image, torch.arange(16) % 3), functional.cross_entropy),
        (two, ((image.flatten(1)[:, :4], image.flatten(1)[:, 4:8]), torch.arange(16) % 3), functional.cross_entropy),
    ]
    for model, given, how in cases:
        table = compare_starts(model, ["default", "he"], batch=given, loss=how, seeds=1)  # type: ignore[arg-type]
        assert all(row["score"] is not None for row in table.rows)


class _Two(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x) + self.b(y)))

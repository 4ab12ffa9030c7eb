"""Norms, margins and sharpness by hand, what rescaling leaves alone, and rankings whose intervals cover."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

import steelyard as sy
from steelyard.errors import ModelError
from steelyard.explain.capacity import MEASURES, path_norm
from steelyard.explain.layers import differentiable
from steelyard.explain.ranking import kendall
from steelyard.explain.sharpness import (
    ADAPTIVE,
    OCTAVES,
    RADIUS,
    TOLD,
    Landscape,
    ascent,
    hessian_trace,
    random_weights,
)
from steelyard.learn.data import Examples
from steelyard.learn.measures import cross_entropy, squared_error
from steelyard.learn.task import SPLITS, Batch, Task, build_seeded


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task_of(build: Any, features: int = 4) -> Task:
    draw = torch.Generator().manual_seed(1)
    targets = {split: torch.arange(size) % 3 for split, size in zip(SPLITS, (60, 30, 60), strict=True)}
    centres = torch.randn(3, features, generator=draw)
    inputs = {s: centres[y] + 0.3 * torch.randn(len(y), features, generator=draw) for s, y in targets.items()}
    return Task("blobs", build, Examples(inputs, targets, 20, 0), cross_entropy, sy.task("digits").metrics)


def net(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias)
    )


def trained(bias: bool = True) -> tuple[Task, nn.Module, sy.Weights]:
    task = task_of(lambda: net(bias))
    model = build_seeded(task)
    start = sy.from_module(build_seeded(task))
    sy.train(task, model, epochs=30, rate=0.03, keep="last", progress=False)
    return task, model, start


def values(table: sy.Table) -> dict[str, Any]:
    return dict(zip(table.column("measure"), table.column("value"), strict=True))


def test_norms_and_margins_by_hand() -> None:
    task, model, start = trained()
    found = values(sy.capacity(model, task, start=start))
    matrices = [model[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    spectral = [np.linalg.svd(w, compute_uv=False)[0] for w in matrices]
    assert found["weights"] == 24 + 30 + 15
    assert found["squares"] == pytest.approx(sum((w**2).sum() for w in matrices))
    assert found["distance"] == pytest.approx(
        sum(((w - start[f"{i}.weight"].array()) ** 2).sum() for w, i in zip(matrices, (0, 2, 4), strict=True))
    )
    assert found["Frobenius product"] == pytest.approx(math.log(np.prod([(w**2).sum() for w in matrices])))
    assert found["spectral product"] == pytest.approx(math.log(np.prod(spectral) ** 2))
    data: Any = task.batches
    with torch.no_grad():
        outputs = model.eval()(data.inputs["train"]).double().numpy()
    y = data.targets["train"].numpy()
    margins = np.array([o[c] - max(np.delete(o, c)) for o, c in zip(outputs, y, strict=True)])
    assert found["small margin"] == pytest.approx(np.quantile(margins, 0.1), rel=1e-5)
    assert found["normalised margin"] == pytest.approx(np.sort(margins)[29] / np.prod(spectral), rel=1e-5)
    ratios = sum((w**2).sum() / s**2 for w, s in zip(matrices, spectral, strict=True))
    small = found["small margin"]
    assert found["spectral complexity"] == pytest.approx(math.log(np.prod(spectral) ** 2 * ratios / small**2), rel=1e-5)
    gap = sy.evaluate(model, task, "train").rows[0]["value"] - sy.evaluate(model, task, "test").rows[0]["value"]
    assert found["gap in accuracy"] == pytest.approx(gap)
    assert list(found)[:15] == list(MEASURES)


@pytest.mark.parametrize("bias", [True, False])
def test_the_path_norm_is_the_sum_over_all_paths(bias: bool) -> None:
    torch.manual_seed(0)
    model = net(bias)
    a, b, c = (model[i].weight.detach().double().numpy() for i in (0, 2, 4))
    total = sum(
        (c[o, k] * b[k, j] * a[j, i]) ** 2 for i, j, k, o in itertools.product(range(4), range(6), range(5), range(3))
    )
    if bias:
        x, y, z = (model[i].bias.detach().double().numpy() for i in (0, 2, 4))
        total += sum((c[o, k] * b[k, j] * x[j]) ** 2 for j, k, o in itertools.product(range(6), range(5), range(3)))
        total += sum((c[o, k] * y[k]) ** 2 for k, o in itertools.product(range(5), range(3))) + (z**2).sum()
    assert path_norm(model, Batch(torch.zeros(2, 4), torch.zeros(2))) == pytest.approx(math.log(total))


class Functional(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.function(self.a(x)))
        return out


@pytest.mark.parametrize(
    ("model", "there"),
    [
        (Functional(torch.relu), True),
        (Functional(torch.tanh), False),
        (Functional(torch.nn.functional.gelu), False),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), False),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), True),  # a scaling, until it has seen data
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), False),
        (nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(3, 2)).eval(), True),
    ],
)  # fmt: skip
def test_a_path_norm_is_there_for_what_is_positively_homogeneous(model: nn.Module, there: bool) -> None:
    assert (path_norm(model, Batch(torch.zeros(2, 4), torch.zeros(2))) is not None) is there


def test_rescaling_layers_changes_norms_and_not_what_is_free_of_scale() -> None:
    task, model, _ = trained(bias=False)
    before = values(sy.capacity(model, task))
    with torch.no_grad():
        model[0].weight *= 8
        model[2].weight /= 4
        model[4].weight /= 2
    after = values(sy.capacity(model, task))
    same = ("weights", "Frobenius product", "spectral product", "path norm", "small margin", "normalised margin",
            "spectral complexity", "steepest ascent, adaptive", "random weights, by magnitude", "filter-normalised",
            "gap in accuracy", "gap in loss")  # fmt: skip
    for name in same:
        assert after[name] == pytest.approx(before[name], rel=1e-3), name
    for name in ("squares", "steepest ascent", "random weights", "Hessian trace"):
        assert abs(after[name] / before[name] - 1) > 0.05, name


def test_ascent_is_one_step_uphill() -> None:
    task, model, _ = trained()
    data: Any = task.batches
    x, y = data.inputs["train"], data.targets["train"]
    with differentiable(model):
        land = Landscape(model, task, [Batch(x, y)])
        found = ascent(land, land.measured()[0])
    loss = nn.functional.cross_entropy(model.eval()(x), y)
    g = torch.autograd.grad(loss, list(model.parameters()))
    w = [p.detach().clone() for p in model.parameters()]
    for name, radius, moves in (
        ("steepest ascent", RADIUS, g),
        ("steepest ascent, adaptive", ADAPTIVE, [a * b * b for a, b in zip(g, w, strict=True)]),
    ):
        size = (
            sum(
                float((m / (v.abs() if "adaptive" in name else 1)).square().sum())
                for m, v in zip(moves, w, strict=True)
            )
            ** 0.5
        )
        other = build_seeded(task).eval()
        with torch.no_grad():
            for p, v, m in zip(other.parameters(), w, moves, strict=True):
                p.copy_(v + radius * m / size)
            rise = float(nn.functional.cross_entropy(other(x), y) - loss)
        assert found[name] == pytest.approx(rise, rel=1e-3)
        assert rise > 0


def test_random_weights_go_as_far_as_was_told() -> None:
    task, model, _ = trained()
    data: Any = task.batches
    with differentiable(model):
        land = Landscape(model, task, [Batch(data.inputs["train"], data.targets["train"])])
        error = land.measured()[1]
        found = random_weights(land, error, 4)
        for name, shape in (("random weights", torch.ones_like), ("random weights, by magnitude", torch.abs)):
            sigma = found[name] ** -0.5
            assert 2 ** OCTAVES[0] < sigma < 2 ** OCTAVES[1]
            cost = {}
            for factor in (0.99, 1.01):
                missed = []
                for number in range(4):
                    with land.moved([factor * sigma * z for z in land.drawn(number, shape)]):
                        missed.append(land.measured()[1])
                cost[factor] = np.mean(missed) - error
            assert cost[0.99] <= TOLD + 1e-9 < cost[1.01] + 0.02


class Diagonal(nn.Module):
    """w² x, whose squared error has a diagonal Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def test_the_trace_of_the_hessian_is_exact_where_it_is_diagonal_and_close_where_not() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    data = Examples(dict.fromkeys(SPLITS, x), dict.fromkeys(SPLITS, x * 0), 7, 0)
    task = Task("lines", Diagonal, data, squared_error, {"error": squared_error})
    model = Diagonal()
    with differentiable(model):
        found = hessian_trace(Landscape(model, task, [Batch(x, x * 0)]), 1)
    assert found == pytest.approx(float(2 * x.square().mean()), rel=1e-5)
    task, small, _ = trained()
    held: Any = task.batches
    x, y = held.inputs["train"], held.targets["train"]
    names = [n for n, _ in small.named_parameters()]

    def loss(*tensors: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            torch.func.functional_call(small, dict(zip(names, tensors, strict=True)), (x,)), y
        )

    own = tuple(p.detach() for p in small.parameters())
    blocks = torch.autograd.functional.hessian(loss, own)
    exact = sum(float(blocks[i][i].reshape(p.numel(), p.numel()).trace()) for i, p in enumerate(own))
    with differentiable(small):
        found = hessian_trace(Landscape(small, task, [Batch(x, y)]), 400)
    assert found == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen: bool) -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)))
    model = build_seeded(task).requires_grad_(not frozen)
    before, chance = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    first = sy.capacity(model, task)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())
    assert torch.equal(chance, torch.get_rng_state())
    assert first.rows == sy.capacity(model, task).rows


def test_a_failure_on_the_way_leaves_the_weights() -> None:
    task, model, _ = trained()
    before = [p.detach().clone() for p in model.parameters()]

    calls = []

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 10:
            raise ValueError("enough")
        return cross_entropy(outputs, targets)

    with pytest.raises(ModelError, match="enough"):
        sy.capacity(model, replace(task, loss=fails))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_numbers_to_predict_have_no_margins() -> None:
    x = {s: torch.randn(20, 3, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SPLITS)}
    data = Examples(x, {s: v[:, :1] for s, v in x.items()}, 10, 0)
    task = Task(
        "lines",
        lambda: nn.Linear(3, 1),
        data,
        squared_error,
        {"squared error": squared_error},
        lower_is_better=("squared error",),
    )
    found = values(sy.capacity(build_seeded(task), task))
    assert [n for n, v in found.items() if v is None] == [
        "distance", "small margin", "normalised margin", "spectral complexity", "random weights", "random weights, by magnitude",
    ]  # fmt: skip
    assert found["gap in squared error"] == pytest.approx(found["gap in loss"])


def test_a_net_of_tokens_and_one_of_convolutions(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcabcabd" * 300, encoding="utf-8")
    text = sy.task(f"text:{path}", context=16)
    found = values(sy.capacity(build_seeded(text), text, examples=200, draws=1))
    assert found["path norm"] is None
    assert found["small margin"] < found["spectral product"]
    digits = sy.task("digits", augment=False, shots=5)
    found = values(sy.capacity(build_seeded(digits), digits, draws=1))
    assert all(v is not None for n, v in found.items() if n not in ("distance", "spectral complexity"))


def test_kendall_is_scipys_and_its_interval_covers() -> None:
    random, inside, chance = np.random.default_rng(0), [], []
    for _ in range(300):
        x = random.normal(size=30)
        y = 0.5 * x + math.sqrt(0.75) * random.normal(size=30)
        tau, low, high = kendall(x, y)
        assert tau == pytest.approx(kendalltau(x, y).statistic)
        inside.append(low <= 2 / math.pi * math.asin(0.5) <= high)
        _, low, high = kendall(x, random.normal(size=30))
        chance.append(low <= 0 <= high)
    assert 0.9 <= np.mean(inside) <= 0.985
    assert 0.9 <= np.mean(chance) <= 0.985
    assert kendall(np.arange(2.0), np.arange(2.0)) == (1.0, -1.0, 1.0)
    assert kendall(np.array([1.0, 1.0, 2.0, 3.0]), np.arange(4.0))[0] == pytest.approx(5 / 6)


def test_a_ranking_knows_its_direction_and_what_is_missing() -> None:
    task, model, _ = trained()
    table = sy.capacity(model, task)

    def with_gap(gap: float, spectral: float, margin: float | None) -> sy.Table:
        changed = {
            "gap in accuracy": gap,
            "gap in loss": -gap,
            "spectral product": spectral,
            "normalised margin": margin,
        }
        return replace(table, rows=tuple({**r, "value": changed.get(r["measure"], r["value"])} for r in table.rows))

    tables = [with_gap(0.1 * i, float(i), None if i == 2 else 5.0 - i) for i in range(6)]
    ranked = {r["measure"]: r for r in sy.rank_gaps(tables).rows}
    assert ranked["spectral product"]["tau"] == ranked["normalised margin"]["tau"] == 1.0
    assert (ranked["spectral product"]["models"], ranked["normalised margin"]["models"]) == (6, 5)
    assert ranked["weights"]["tau"] is None
    assert ranked["distance"]["models"] == 0
    turned = {r["measure"]: r for r in sy.rank_gaps(tables, "gap in loss").rows}
    assert turned["spectral product"]["tau"] == -1.0
    with pytest.raises(ModelError, match="at least 3"):
        sy.rank_gaps(tables[:2])
    with pytest.raises(ModelError, match="no 'gap in size'"):
        sy.rank_gaps(tables, "gap in size")


def test_wrong_use_is_told() -> None:
    task, model, start = trained()
    with pytest.raises(ModelError, match=r"start has no '0\.weight'"):
        sy.capacity(model, task, start=start.select(lambda w: w.name != "0.weight"))
    with pytest.raises(ModelError, match="draws=0"):
        sy.capacity(model, task, draws=0)
    none = task_of(lambda: nn.Sequential(nn.Identity()))
    with pytest.raises(ModelError, match="no layer with matrices"):
        sy.capacity(build_seeded(none), none)

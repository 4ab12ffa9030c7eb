"""The way of the weights: exact lengths, distances within their stated error, little memory, the same training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.errors import ModelError
from steelyard.kernels.sketch import sketch
from steelyard.learn.gauges import gradient_norm
from steelyard.learn.run import Run
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.trajectory import WHOLE
from steelyard.learn.treefile import read_tree, write_tree
from steelyard.report.plots import Line


def followed(task: Task, way: sy.Trajectory, **options: object) -> tuple[Run, list[dict[str, Tensor]]]:
    """A run with its gauge, and the weights before the first and after each step in float64."""
    run = Run(task, gauges=[way], epochs=4, rate=0.02, keep="last", **options)  # type: ignore[arg-type]
    places = [{n: p.detach().double().clone() for n, p in run.model.named_parameters()}]
    for _ in run:
        places.append({n: p.detach().double().clone() for n, p in run.model.named_parameters()})
    return run, places


def distance(a: dict[str, Tensor], b: dict[str, Tensor], layer: str) -> float:
    return math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a if layer == WHOLE or n.startswith(f"{layer}.")))


@pytest.mark.parametrize("size", [16, 512])
def test_path_and_net_are_exact_and_settling_is_what_it_says(task: Task, size: int) -> None:
    way = sy.Trajectory(size=size)
    run, places = followed(task, way)
    table = way.table()
    assert table.column("layer") == ["0", "3", WHOLE]
    assert table.column("weights") == [96, 51, 147]
    for row in table.rows:
        layer = str(row["layer"])
        steps = [distance(a, b, layer) for a, b in zip(places[1:], places, strict=False)]
        assert row["path"] == pytest.approx(sum(steps), rel=1e-12)
        assert row["net"] == pytest.approx(distance(places[0], places[-1], layer), rel=1e-12)
        assert row["path / net"] == pytest.approx(row["path"] / row["net"])
        away = [distance(p, places[-1], layer) for p in places]
        settled = 1 + max(t for t, d in enumerate(away) if d > 0.1 * row["net"])
        found = [r["to the end"] for r in way.history().rows if r["layer"] == layer]
        if size == 512:
            assert found == pytest.approx([d / row["net"] for d in away], rel=1e-5, abs=1e-6)
            assert row["settled"] == settled
            assert row["of the run"] == settled / len(run.log)
        else:  # 1 / sqrt(2 * 16) = 18 %; nine of ten within two of these
            wrong = np.abs(np.array(found[:-1]) * row["net"] / np.array(away[:-1]) - 1)
            assert np.quantile(wrong, 0.9) < 2 * way.table().meta["error of a distance"]
    assert run.log[-1]["path"] == table.rows[-1]["path"]
    assert len(Line(way.history(), "step", ("to the end",), by="layer").figure()["data"]) == 3


def test_a_run_is_the_same_with_and_without(task: Task) -> None:
    alone = sy.train(task, epochs=3, progress=False)
    together = sy.train(task, epochs=3, gauges=[sy.Trajectory()], progress=False)
    assert alone.history().column("valid loss") == together.history().column("valid loss")
    for a, b in zip(alone.model.parameters(), together.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_own_loop_gives_what_the_run_gives(task: Task) -> None:
    gauge, own = sy.Trajectory(), None
    model = build_seeded(task)
    own = sy.Trajectory(model)
    for _ in Run(task, model, gauges=[gauge], epochs=2):
        own.update()
    assert own.table().rows == gauge.table().rows


def test_points_are_dropped_and_memory_stays(task: Task) -> None:
    way = sy.Trajectory(keep=8)
    followed(task, way)
    steps = sorted(set(way.history().column("step")))
    assert steps == [0, 4, 8, 12, 16, 20]
    assert way.table().meta["resolution"] == 4
    held = 2 * 4 * 147 + 6 * 4 * 147
    assert way.table().meta["memory"] == held
    full = sy.Trajectory()
    followed(task, full)
    assert way.table().column("path") == full.table().column("path")
    assert all(s >= f for s, f in zip(way.table().column("settled"), full.table().column("settled"), strict=True))


def test_every_nth_update_gives_a_shorter_path_between_the_same_points(task: Task) -> None:
    way, full = sy.Trajectory(every=5), sy.Trajectory()
    _, places = followed(task, way)
    followed(task, full)
    chords = sum(distance(b, a, "0") for a, b in zip(places[::5], places[5::5], strict=False))
    assert way.table().rows[0]["path"] == pytest.approx(chords, rel=1e-12)
    assert way.table().rows[0]["path"] < full.table().rows[0]["path"]
    assert way.table().rows[0]["net"] == full.table().rows[0]["net"]


@pytest.mark.parametrize(("keep", "every", "size", "stop"), [(8, 1, 16, 9), (200, 3, 512, 10), (8, 2, 512, 0)])
def test_a_resumed_run_goes_on_with_the_way(
    task: Task, tmp_path: Path, keep: int, every: int, size: int, stop: int
) -> None:
    def way() -> sy.Trajectory:
        return sy.Trajectory(keep=keep, every=every, size=size)

    whole, first, second = way(), way(), way()
    followed(task, whole)
    options: dict[str, Any] = {"epochs": 4, "rate": 0.02, "keep": "last", "checkpoint": tmp_path / "c"}
    with Run(task, gauges=[gradient_norm(), first], **options) as run:
        for step in run:
            if step.index == stop:
                break
    sy.train(task, gauges=[gradient_norm(), second], progress=False, resume=True, **options)
    assert second.table() == whole.table()
    assert second.history() == whole.history()
    other = sy.Trajectory(keep=keep, every=every + 1, size=size)
    with pytest.raises(ModelError, match=f"'every' of the trajectory was {every} when the checkpoint was written"):
        Run(task, gauges=[gradient_norm(), other], resume=True, **options)
    late = way()  # where there was no such gauge, it begins with the next step
    assert Run(task, gauges=[late], resume=True, **options).gauges == (late,)
    assert late.model is None


def test_a_way_in_a_loop_of_ones_own_goes_on_from_its_state(task: Task, tmp_path: Path) -> None:
    model = build_seeded(task)
    way = sy.Trajectory(model, keep=8, size=16)

    def move(to: nn.Module, step: int) -> None:
        with torch.no_grad():
            for p in to.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(step))

    for step in range(30):
        if step == 13:
            write_tree(way.state(), tmp_path / "way.safetensors")
            again = copy.deepcopy(model)
            other = sy.Trajectory(again, keep=8, size=16)
            other.load(read_tree(tmp_path / "way.safetensors"))
        for one, to in ((way, model), *(((other, again),) if step >= 13 else ())):
            move(to, step)
            one.update()
    assert other.table() == way.table()
    assert other.history() == way.history()
    with pytest.raises(ModelError, match="give load the model"):
        sy.Trajectory().load(way.state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_ties_and_frozen_layers(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6, bias=False), "c": nn.Linear(3, 3)}).to(dtype)
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    way, start = sy.Trajectory(model), model["a"].weight.detach().double().clone()
    for _ in range(3):
        with torch.no_grad():
            model["a"].weight += 0.25
        way.update()
    table = way.table()
    assert table.column("layer") == ["a", "c", WHOLE]
    assert table.rows[0]["net"] == pytest.approx(float((model["a"].weight.detach().double() - start).norm()), rel=1e-6)
    still = table.rows[1]
    assert (still["path"], still["net"], still["path / net"], still["settled"]) == (0.0, 0.0, None, None)
    assert table.rows[0]["settled"] == 3


def test_a_layer_that_is_thawed_moves(task: Task) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    way = sy.Trajectory(model)
    way.update()
    model[1].requires_grad_()
    with torch.no_grad():
        model[1].weight += 1
    way.update()
    assert way.table().column("path") == pytest.approx([0.0, 2.0, 2.0])


def test_a_compiled_model_is_followed_by_its_plain_names(task: Task) -> None:
    model = build_seeded(task)
    way = sy.Trajectory(torch.compile(model))
    assert way.table().column("layer") == ["0", "3", WHOLE]


def test_a_long_vector_in_parts_has_the_sketch_of_the_whole() -> None:
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole, parts = np.zeros(64), np.zeros(64)
    sketch(x, 5, whole)
    sketch(x[:640], 5, parts)
    sketch(x[640:], 5, parts, 640)
    assert parts == pytest.approx(whole)
    other = np.zeros(64)
    sketch(x, 6, other)
    assert not np.allclose(whole, other)


@pytest.mark.parametrize("kind", ["normal", "few", "row", "same"])
def test_a_sketch_keeps_lengths_to_its_stated_error(kind: str) -> None:
    random, size, ratios = np.random.default_rng(1), 128, []
    for seed in range(400):
        x = np.zeros(5000, np.float32)
        if kind == "normal":
            x[:] = random.normal(size=5000)
        elif kind == "few":
            x[random.choice(5000, 30, replace=False)] = random.standard_t(2, 30)
        elif kind == "row":
            x[::128] = 1  # would all meet on one place without shifts
        else:
            x[:] = 1
        sums = np.zeros(size)
        sketch(x, 31 * seed, sums)
        ratios.append(np.square(sums).sum() / np.square(x.astype(float)).sum())
    spread = math.sqrt(2 / size)
    assert abs(np.mean(ratios) - 1) < 4 * spread / math.sqrt(400)
    assert np.std(ratios) < 1.25 * spread


def test_wrong_use_is_told(task: Task) -> None:
    with pytest.raises(ModelError, match="every=0"):
        sy.Trajectory(every=0)
    with pytest.raises(ModelError, match=r"share=1\.0"):
        sy.Trajectory(share=1.0)
    with pytest.raises(ModelError, match="keep=2"):
        sy.Trajectory(keep=2)
    with pytest.raises(ModelError, match="follows no model yet"):
        sy.Trajectory().update()
    with pytest.raises(ModelError, match="followed no step yet"):
        sy.Trajectory().table()
    with pytest.raises(ModelError, match="no parameters"):
        sy.Trajectory(nn.ReLU())
    with pytest.raises(ModelError, match="no values yet"):
        sy.Trajectory(nn.LazyLinear(3))
    with pytest.raises(ModelError, match="no values yet"):
        sy.Trajectory(nn.Linear(2, 2, device="meta"))
    way = sy.Trajectory()
    sy.train(task, epochs=1, gauges=[way], progress=False)
    with pytest.raises(ModelError, match="another model"):
        sy.train(task, epochs=1, gauges=[way], progress=False)

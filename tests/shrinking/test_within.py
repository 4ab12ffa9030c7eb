"""The smallest file within a tolerance: it is smaller, it is what was proven, or it is not there."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import ModelError, SteelyardError, VerdictError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.imitation import imitation
from steelyard.learn.measures import accuracy
from steelyard.learn.run import train
from steelyard.learn.task import SPLITS, Task, build_seeded
from steelyard.shrinking import account, within
from steelyard.shrinking import search as searching
from steelyard.shrinking.journal import Journal
from steelyard.shrinking.order import Chain
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.within import Shrunk
from steelyard.shrinking.within import shrink as shrinking

from blobs import blobs
from damage import damaged_safetensors


def shrink(*given: Any, epochs: int = 0, **options: Any) -> Shrunk:
    """Without training, which is slow, unless it is asked for."""
    return shrinking(*given, epochs=epochs, **options)


@pytest.fixture(scope="module")
def task() -> Task:
    return blobs()


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return train(task, epochs=4, progress=False).model


def test_the_file_is_smaller_and_is_what_was_proven(task: Task, model: nn.Module, tmp_path: Path) -> None:
    before = from_module(model).settle().arrays()
    found = shrink(model, task, tmp_path / "small.safetensors", tolerance=0.02)
    row = found.proof.rows[0]
    other = build_seeded(task, 7)
    into_module(formats.open(tmp_path / "small.safetensors"), other)
    after = outcomes(other, task, "test")["accuracy"].mean()
    assert row["bytes"] == (tmp_path / "small.safetensors").stat().st_size < row["bytes before"] / 2
    assert row["accuracy"] == after
    assert row["loss"] == pytest.approx(row["accuracy before"] - after)
    assert row["loss"] <= row["loss at most"] <= 0.02
    assert list(tmp_path.iterdir()) == [tmp_path / "small.safetensors"]
    assert all(np.array_equal(a, b) for a, b in zip(before.values(), from_module(model).arrays().values(), strict=True))
    assert sum(found.why.column("bytes")) < row["bytes"]
    assert row["loss at most"] in found.curve.column("loss at most")


def test_training_for_size_makes_it_smaller_still(task: Task, model: nn.Module, tmp_path: Path) -> None:
    plain, trained = (shrink(model, task, tolerance=0.02, epochs=epochs) for epochs in (0, 8))
    assert trained.proof.rows[0]["bytes"] < plain.proof.rows[0]["bytes"]
    assert trained.why.meta["candidate"].startswith("trained, ")
    asked = [row["candidate"] for row in trained.curve.rows if row.get("valid loss") is not None]
    assert len([name for name in asked if name.endswith(" bits a weight")]) == 2
    assert len([name for name in asked if "price of a bit ×" in name]) == 4
    moved = trained.why.meta["change"]
    assert "of training and rounding together" in moved
    assert {"error", "damage"} & {c.name for c in trained.why.columns} == set(), "squares foretell small errors alone"
    assert {"error", "damage"} <= {c.name for c in plain.why.columns}
    assert plain.proof.meta["aim"].startswith("file: smaller, and no faster; for that there is aim latency")
    errors = [row["error"] for row in plain.why.rows if row["error"] is not None]
    assert errors
    assert 0 < max(errors) < 1, "as the outputs mind them: less than without the tensor"
    splits = [found.proof.meta["splits"] for found in (trained, plain)]
    assert splits[0].startswith("train: training, sensitivities; valid: sensitivities, chooses"), "19 batches and 13"
    assert splits[1].startswith("train: sensitivities; valid: sensitivities, chooses")


def test_the_curve_says_what_came_of_each_and_bytes_are_those_of_files(task: Task, model: nn.Module) -> None:
    found = shrink(model, task, tolerance=0.02)
    chosen = [row for row in found.curve.rows if row["outcome"] == "chosen"]
    assert [row["candidate"] for row in chosen] == [found.why.meta["candidate"]]
    assert chosen[0]["bytes"] == found.proof.rows[0]["bytes"]
    for row in found.curve.rows:
        assert row["outcome"].startswith("not asked: ") == (row["loss"] is None)
        assert (row["outcome"] == "not asked: larger than the chosen one") == (
            row["loss"] is None and row["bytes"] > chosen[0]["bytes"]
        )
        assert row["bits"] == 8 * row["bytes"] / 1204
        assert (row["outcome"] == "fails") == (row["loss at most"] is not None and row["loss at most"] > 0.02)
    unlikely = [row for row in found.curve.rows if row["outcome"] == "not asked: likelier to fail, by validation data"]
    assert unlikely
    assert min(row["valid loss"] for row in unlikely) > 0.005


def test_each_file_is_written_once_and_no_data_are_read_for_a_caption(
    task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written, trained = formats.write, [], []

    def counted(weights: Weights, path: Path) -> int:
        if path.name == "small.safetensors":
            written.append(path)
        return write(weights, path)

    def served(split: Any, epoch: int) -> Any:
        trained.extend([epoch] * (split == "train"))
        return task.batches(split, epoch)

    monkeypatch.setattr(formats, "write", counted)
    found = shrink(model, replace(task, batches=served), tolerance=0.02)
    assert trained == list(range(len(trained))), "an epoch after the other, for sensitivities alone"
    assert len(written) == len(found.curve.rows) + 1, "that of the finished file"
    written.clear()
    assert found.choose(bytes=max(found.curve.column("bytes"))).curve.rows
    assert len(written) == 1


def test_nothing_is_said_of_how_far_it_is_before_anything_is_counted(task: Task, model: nn.Module) -> None:
    said: list[tuple[str, float]] = []
    shrink(model, task, tolerance=0.02, say=lambda what, share: said.append((what, share)))
    assert [share for what, share in said if what == "measuring the original"] == [0, 0]
    assert max(share for _, share in said[:-1]) < 1
    assert said[-1] == ("done", 1.0)


def test_the_default_is_one(task: Task) -> None:
    from inspect import signature

    from steelyard.cli.shrink import verb

    (option,) = [p for p in verb.params if p.name == "tolerance"]
    assert option.default == signature(shrinking).parameters["tolerance"].default == 0.005


@pytest.mark.parametrize(("epochs", "most"), [(0, 6), (0, 8), (0, 12), (0, 30), (2, 8), (2, 12), (2, 16)])
@pytest.mark.parametrize("tolerance", [0.01, 0.05])
def test_no_more_passes_over_a_split_than_are_allowed(
    task: Task, model: nn.Module, epochs: int, most: int, tolerance: float
) -> None:
    """Counted where examples are served, whoever asks; what is reported is what was served."""
    passes: list[str] = []

    def served(split: Any, epoch: int) -> Any:
        yield from task.batches(split, epoch)
        if not torch.is_grad_enabled():  # the sensitivities ask for gradients
            passes.append(split)

    counted = replace(task, batches=served)
    found = shrink(model, counted, tolerance=tolerance, epochs=epochs, evaluations=most)
    evaluations = [split for split in passes if split != "train"]
    assert len(evaluations) == found.proof.meta["evaluations"] <= most
    assert evaluations.count("valid") == 1 + len([r for r in found.curve.rows if r.get("valid loss") is not None])
    assert evaluations.count("test") == 2 + len([r for r in found.curve.rows if r.get("loss") is not None])


def test_more_evaluations_make_it_no_larger_here(task: Task, model: nn.Module) -> None:
    sizes = [shrink(model, task, tolerance=0.02, evaluations=n).proof.rows[0]["bytes"] for n in (6, 12, 30)]
    assert sizes[0] >= sizes[1] >= sizes[2]
    assert sizes[0] > sizes[2]


@pytest.mark.parametrize(("epochs", "least"), [(0, 6), (1, 7)])
def test_too_few_evaluations_are_refused(task: Task, model: nn.Module, epochs: int, least: int) -> None:
    with pytest.raises(ModelError, match=f"evaluations={least - 1}: expected at least {least}, of which 3 are those"):
        shrink(model, task, tolerance=0.02, epochs=epochs, evaluations=least - 1)


def test_more_tolerance_is_a_smaller_file(task: Task, model: nn.Module) -> None:
    sizes = [shrink(model, task, tolerance=t).proof.rows[0]["bytes"] for t in (0.01, 0.2)]
    assert sizes[0] > sizes[1]


def test_the_proof_examples_choose_nothing(task: Task, model: nn.Module) -> None:
    """With other proof examples the same candidates are asked, as far as both proofs go."""
    data = task.batches
    other = Examples(
        {**data.inputs, "test": data.inputs["train"]}, {**data.targets, "test": data.targets["train"]}, 64, 0
    )
    a, b = (shrink(model, t, tolerance=0.05) for t in (task, replace(task, batches=other)))
    asked = [[row["candidate"] for row in found.curve.rows if row.get("loss") is not None] for found in (a, b)]
    both = min(map(len, asked))
    assert both >= 2
    assert asked[0][:both] == asked[1][:both]
    seen = [[row["candidate"] for row in found.curve.rows if row.get("valid loss") is not None] for found in (a, b)]
    assert seen[0] == seen[1]


def test_the_proof_ends_at_the_first_that_fails(
    task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is smaller than a candidate that failed is not tried: else one of many would pass by luck."""
    worse, asked = searching.Search.worse, []

    def planted(self: searching.Search, weights: Weights, split: str) -> np.ndarray:
        found = worse(self, weights, split)
        if split == "test":
            asked.append(found)
            return np.ones_like(found) if len(asked) == 3 else found
        return found

    monkeypatch.setattr(searching.Search, "worse", planted)
    found = shrink(model, task, tolerance=0.02)
    assert len(asked) == 4  # three candidates, and the finished file once more
    assert [row["loss"] for row in found.curve.rows if row["loss"] is not None][-1] == 1
    assert found.proof.rows[0]["loss"] < 0.02


def test_a_second_chain_is_asked_with_the_error_that_is_left(
    task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = shrink(model, task, tolerance=0.02).search
    assert search is not None
    assert not search.reserved
    worse, asked = searching.Search.worse, []

    def planted(self: searching.Search, weights: Weights, split: str) -> np.ndarray:
        asked.append(split)
        found = worse(self, weights, split)
        return np.ones_like(found) if len(asked) == 1 else found

    monkeypatch.setattr(searching.Search, "worse", planted)
    search.tried, search.journal = [], Journal(None, {})
    steps = search.steps()
    found = search.proven([Chain((steps[12], steps[14]), 0.95), Chain((steps[0], steps[6]), 0.05)])
    assert asked == ["test"] * 3
    assert found.name == searching.sized(6)
    assert [tried.asked.level for tried in search.tried if tried.asked] == pytest.approx([0.9525, 0.9975, 0.9975])
    assert found.test is not None
    assert found.most == pytest.approx(Promise(0.02, 0.9975).bound(found.test))
    assert found.most > Promise(0.02).bound(found.test)
    told = account.curve(search, found, ".safetensors")
    assert "goes from the largest of all once more" in told.columns[-1].about
    assert {row["outcome"]: row["loss at most"] for row in told.rows}["chosen"] == found.most


class _Aside(nn.Module):
    """With most of its weights in a layer of which the outputs know nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.h = nn.Linear(8, 32), nn.Linear(32, 4)
        if width:
            self.unused = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.a(x).relu())


def test_an_unused_layer_takes_next_to_nothing_whatever_its_size(tmp_path: Path) -> None:
    g, files = torch.Generator().manual_seed(0), {}
    batches = [torch.randn(32, 8, generator=g) for _ in range(12)]
    for width in (0, 200):
        torch.manual_seed(0)
        model = _Aside(width).eval()
        alike = imitation(model, batches, "cosine")
        files[width] = shrink(model, alike, tmp_path / f"{width}.safetensors", tolerance=0.03).proof.rows[0]["bytes"]
    assert files[200] < files[0] + 300


def test_weights_that_are_too_few_to_be_packed_are_told() -> None:
    """Of eight bits for each of them most go into the heads of two tensors."""
    task = replace(blobs(), build=lambda: nn.Sequential(nn.AvgPool1d(5), nn.Linear(4, 4)))
    model = train(task, epochs=12, progress=False).model
    with pytest.raises(VerdictError, match="the 20 weights are so few that the heads of packed tensors take most of"):
        shrink(model, task, tolerance=0.02)


def test_nothing_is_written_where_the_safest_fails(
    task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(searching.Search, "worse", lambda self, _weights, split: np.repeat([0.0, 1.0], [1180, 20])
                        if split == "test" else np.zeros(1200))  # fmt: skip
    target = tmp_path / "small.safetensors"
    target.write_bytes(b"what was there")
    with pytest.raises(
        VerdictError, match=r"bytes without its header\) may lose 0\.02\d+ of accuracy .*would have"
    ) as said:
        shrink(model, task, target, tolerance=0.02)
    found = re.search(r"a tolerance of (\S+) would have been kept\. Nothing is", str(said.value))
    assert found
    worse = np.repeat([0.0, 1.0], [1180, 20])
    assert Promise(float(found[1])).kept(worse), "what is named is rounded up"
    assert not Promise(float(found[1]) - 1e-4).kept(worse)
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_with_a_folder_the_tolerance_of_the_next_look_is_named(
    task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worse = np.repeat([0.0, 1.0], [1180, 20])
    monkeypatch.setattr(
        searching.Search, "worse", lambda self, _weights, split: worse if split == "test" else 0 * worse
    )
    with pytest.raises(VerdictError, match=r"from now on .*: that would be look 2, .* 0\.975 instead of 0\.95") as said:
        shrink(model, task, tolerance=0.02, checkpoint=tmp_path)
    found = re.search(r"from now on (\S+):", str(said.value))
    assert found
    assert Promise(float(found[1]), look=2).kept(worse)
    assert not Promise(float(found[1]) - 1e-4, look=2).kept(worse)


def test_a_frozen_model_is_shrunk_without_training(task: Task, model: nn.Module) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ModelError, match=r"no parameter of Sequential is trainable.*epochs=0"):
        shrink(frozen, task, tolerance=0.02, epochs=2)
    assert shrink(frozen, task, tolerance=0.02).proof.rows[0]["smaller"] > 2


def nothing(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.full((len(targets),), torch.nan)


def once_infinite(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.where(torch.arange(len(targets)) == 7, torch.inf, accuracy(outputs, targets))


def drawn(outputs: Tensor, targets: Tensor) -> Tensor:
    return accuracy(outputs + torch.randn_like(outputs), targets)


def without(task: Task, split: str) -> Task:
    """The task, a split of which is empty."""
    served = task.batches
    return replace(task, batches=lambda asked, epoch: () if asked == split else served(asked, epoch))


WRONG: dict[str, tuple[Callable[[Task], Task], dict[str, Any], str]] = {
    "too little to prove it": (
        lambda t: t, {"tolerance": 0.002},
        r"1200 proof examples cannot prove a tolerance of 0\.002.*at least 0\.0025, or 1497 examples",
    ),
    "more examples than there are": (lambda t: t, {"tolerance": 1e-9}, "2.*, or more than 1,000,000,000 examples"),
    "true": (lambda t: t, {"tolerance": True}, "tolerance=True: expected a number above 0"),
    "not a number": (
        lambda t: replace(t, metrics={"nothing": nothing}), {}, "'nothing' of the original is nan for 1200 of 1200 valid"
    ),
    "infinite once in a batch": (
        lambda t: replace(t, metrics={"odd": once_infinite}), {}, r"'odd' of the original is inf for 5 of 1200 valid"
    ),
    "complex": (
        lambda t: replace(t, metrics={"odd": lambda o, y: accuracy(o, y) + 1j}), {},
        "'odd' returns complex numbers, expected real ones",
    ),
    "drawn at random": (lambda t: replace(t, metrics={"drawn": drawn}), {}, "comes out otherwise when it is measured again"),
    "a metric of no output": (
        lambda t: replace(t, metrics={"one": lambda o, y: torch.ones(len(y))}), {}, "no better than chance"
    ),
    "more than there is": (lambda t: t, {"tolerance": 5}, r"has forgotten everything may do.*take less than 0\.[67]"),
    "negative": (lambda t: t, {"tolerance": -1.0}, "tolerance=-1.0: expected a number above 0"),
    "a word": (lambda t: t, {"tolerance": "0.02"}, "tolerance='0.02': expected a number above 0"),
    "nan": (lambda t: t, {"tolerance": float("nan")}, "tolerance=nan: expected a number above 0"),
    "percent": (lambda t: t, {"confidence": 95}, "confidence=95: expected 0.5 or more and less than 1"),
    "half an epoch": (lambda t: t, {"epochs": 0.5}, "epochs=0.5: expected a whole number, 0 or more"),
    "half an evaluation": (lambda t: t, {"evaluations": 12.5}, "evaluations: expected a whole number, found 12.5"),
    "nothing to validate": (lambda t: without(t, "valid"), {}, "the valid split of the task 'blobs' is empty"),
    "nothing to prove": (lambda t: without(t, "test"), {}, "the test split of the task 'blobs' is empty"),
    "nothing to train": (lambda t: without(t, "train"), {"epochs": 2}, "no training examples: shrink it without"),
    "no folder": (lambda t: t, {"target": "no/such/small.safetensors"}, "the folder 'no/such' is not there"),
    "several files": (lambda t: t, {"target": "small.safetensors.index.json"}, "expected a name that ends in .safetensors"),
    "unknown": (lambda t: t, {"target": "small.bin"}, "expected a name that ends in .safetensors or .npz or .gguf"),
    "an aim as target": (lambda t: t, {"target": "latency"}, r"said by aim='latency', with a target such as 'small\.onnx'"),
    "no path": (lambda t: t, {"target": 3}, "target: expected a path, found 3"),
    "nobody to tell": (lambda t: t, {"say": 3}, "say: expected a function"),
    "a name": (lambda t: "digits", {}, "task: expected a Task, such as sy.task"),  # type: ignore[dict-item, return-value]
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_end_well_is_said_before_the_search(
    task: Task, model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(searching, "sensitivity", None)
    monkeypatch.chdir(tmp_path)
    change, options, match = WRONG[name]
    with pytest.raises(SteelyardError, match=match):
        shrink(model, change(task), **{"tolerance": 0.05, **options})
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_refused(task: Task) -> None:
    broken = build_seeded(task, 0)
    with torch.no_grad():
        broken[2].bias[1] = torch.nan
    with pytest.raises(ModelError, match=r"'2\.bias' holds values that are not finite"):
        shrink(broken, task, tolerance=0.05)


@pytest.mark.parametrize("task_given", [True, False])
def test_a_task_and_a_model_that_are_none_are_told(task: Task, model: nn.Module, task_given: bool) -> None:
    with pytest.raises(
        ModelError, match="model: expected a" if task_given else "task: expected a Task; the model comes"
    ):
        shrink(*(("model.pt", task) if task_given else (task, model)), tolerance=0.05)


def test_examples_in_the_order_of_their_classes_are_no_chance(task: Task, model: nn.Module) -> None:
    """The next example has the same target nearly everywhere; what counts are targets of any other example."""
    data = task.batches
    order = data.targets["valid"].argsort()
    ordered = Examples({**data.inputs, "valid": data.inputs["valid"][order]},
                       {**data.targets, "valid": data.targets["valid"][order]}, 64, 0)  # fmt: skip
    assert shrink(model, replace(task, batches=ordered), tolerance=0.05).proof.rows[0]["smaller"] > 2


def test_a_model_at_chance_is_refused(task: Task) -> None:
    constant = build_seeded(task, 0)
    with torch.no_grad():
        constant[2].weight.zero_()
    with pytest.raises(ModelError, match="no better than chance"):
        shrink(constant, task, tolerance=0.05)


def test_a_model_that_is_above_chance_by_luck_is_refused(task: Task) -> None:
    """Some untrained nets are right on more of 1200 examples than on others' targets, as many as a tolerance bears."""
    for seed in range(40):
        untrained = build_seeded(task, seed)
        right = outcomes(untrained, task, "valid")["accuracy"].mean()
        if 0.27 < right < 0.33:
            break
    with pytest.raises(ModelError, match=r"no better than chance|has forgotten everything may do"):
        shrink(untrained, task, tolerance=0.02)


def test_a_model_that_is_worse_than_who_knows_nothing_is_refused(task: Task, model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"who has learned nothing has 0\.99: any file would do"):
        shrink(model, replace(task, baselines={"accuracy": 0.99}), tolerance=0.02)


def test_what_the_original_is_beside_chance_is_said(task: Task, model: nn.Module) -> None:
    told = shrink(model, task, tolerance=0.02).proof.meta["the original"]
    assert told.startswith("accuracy 0.9")
    assert "on 1,200 validation examples, and 0.2" in told


def test_a_metric_of_which_less_is_better(task: Task) -> None:
    g = torch.Generator().manual_seed(0)
    x = {split: torch.randn(600, 8, generator=g) for split in SPLITS}
    y = {split: (x[split][:, :1] - 2 * x[split][:, 1:2]).clone() for split in SPLITS}

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(1)

    build = lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))  # noqa: E731
    line = Task("line", build, Examples(x, y, 32, 0), squared, {"squared error": squared},
                lower_is_better=("squared error",))  # fmt: skip
    row = shrink(train(line, epochs=15, progress=False).model, line, tolerance=0.05).proof.rows[0]
    assert row["squared error"] == pytest.approx(row["squared error before"] + row["loss"])
    assert row["bytes"] < row["bytes before"]


@pytest.fixture(scope="module")
def made(task: Task, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search to go on from."""
    folder = tmp_path_factory.mktemp("search")
    shrink(model, task, tolerance=0.02, checkpoint=folder)
    return folder


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(s, marks=pytest.mark.slow) for s in range(10, 50))])
def test_a_file_that_holds_something_else_never_gets_the_name(
    task: Task, model: nn.Module, made: Path, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = formats.write

    def damaging(weights: Weights, path: Path) -> int:
        size = write(weights, path)
        if path.name == "small.safetensors":
            path.write_bytes(damaged_safetensors(path.read_bytes(), seed))
        return size

    monkeypatch.setattr(within.formats, "write", damaging)
    with pytest.raises(SteelyardError):
        shrink(model, task, tmp_path / "small.safetensors", tolerance=0.02, checkpoint=made)
    assert not list(tmp_path.iterdir())


def test_a_search_goes_on_where_it_was_broken_off(
    task: Task, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shrink(model, task, tmp_path / "whole.safetensors", tolerance=0.02)
    steps = whole_steps = 0
    for stop in range(1, 90, 6):
        calls: list[str] = []

        def say(what: str, _done: float, stop: int = stop, calls: list[str] = calls) -> None:
            calls.append(what)
            if len(calls) == stop:
                raise KeyboardInterrupt

        try:
            found = shrink(
                model, task, tmp_path / "parts.safetensors", tolerance=0.02, checkpoint=tmp_path / "kept", say=say
            )
        except KeyboardInterrupt:
            steps += len(calls)
            continue
        whole_steps = len(calls)
        break
    assert whole_steps
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert found.curve.rows == whole.curve.rows
    assert found.proof.meta["evaluations"] < whole.proof.meta["evaluations"]


def test_a_search_that_is_killed_goes_on_to_the_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    """SIGKILL in the first making, within an epoch and after a price of training, and in the proof."""
    formats.write(from_module(model), tmp_path / "model.safetensors")
    places = ("making sensitivity", "training, ", "trained, price", "proving", "none")
    ends = [killed(tmp_path, "small", place) for place in places]
    assert ends == [-signal.SIGKILL] * 4 + [0]
    assert killed(tmp_path, "whole", "none") == 0
    assert (tmp_path / "small.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def killed(folder: Path, name: str, place: str) -> int:
    """The exit code of a process of its own that shrinks until it says what it is to be killed at."""
    code = f"import test_within; test_within.shrink_until({str(folder)!r}, {name!r}, {place!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def shrink_until(folder: str, name: str, place: str) -> None:
    """What that process does."""
    task, small = blobs(), Path(folder) / f"{name}.safetensors"
    model = task.build()
    into_module(formats.open(Path(folder) / "model.safetensors"), model)

    def say(what: str, _done: float) -> None:
        if what.startswith(place):
            os.kill(os.getpid(), signal.SIGKILL)

    shrink(model, task, small, tolerance=0.03, epochs=2, checkpoint=Path(folder) / f"{name} kept", say=say)


def test_another_search_in_the_folder_is_refused(task: Task, model: nn.Module, made: Path) -> None:
    other = build_seeded(task, 3)
    before = {path: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(ModelError, match="another search, which differs in its model"):
        shrink(train(task, other, epochs=1, progress=False).model, task, tolerance=0.02, checkpoint=made)
    assert {path: path.read_bytes() for path in made.iterdir()} == before


def test_another_tolerance_goes_on_from_what_was_measured(task: Task, model: nn.Module, made: Path) -> None:
    found = shrink(model, task, tolerance=0.021, checkpoint=made)
    assert found.proof.meta["evaluations"] <= 8, "no look is new"


@pytest.mark.parametrize("metric", ["agreement", "cosine"])
def test_without_labels_the_outputs_are_kept(model: nn.Module, metric: Any) -> None:
    g = torch.Generator().manual_seed(6)
    unlabelled = imitation(model, [torch.randn(64, 20, generator=g) for _ in range(40)], metric)
    found = shrink(model, unlabelled, tolerance=0.05)
    row = found.proof.rows[0]
    assert row[f"{metric} before"] == pytest.approx(1)
    assert 0.95 <= row[metric] < 1
    assert row["smaller"] > 2

"""A run that is broken off, by whatever means, goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steelyard import formats
from steelyard.errors import FormatError, ModelError
from steelyard.formats.module import from_module
from steelyard.learn.checkpoint import STATE, STEPS
from steelyard.learn.run import Run, train
from steelyard.learn.state import model_state, tensors_of
from steelyard.learn.task import Batch, Split, Task
from steelyard.learn.treefile import read_tree, write_tree


class Noisy(nn.Module):
    """Random in every way that a model can be: dropout, batch norm, a buffer that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.layers(x) + 0.01 * torch.sin(self.calls)


def drawn(task: Task) -> Task:
    """The task with noise and an order from the global generators of Python, numpy and torch."""
    source = task.batches

    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for batch in source(split, epoch):
            if split == "train":
                noise = random.gauss(0, 1) * torch.tensor(np.random.randn(5), dtype=torch.float32)
                batch = Batch(batch.inputs + noise * torch.randn(batch.inputs.shape), batch.targets)
            yield batch

    return replace(task, build=Noisy, batches=batches)


def loaded(task: Task, own: bool) -> Task:
    """The task, its training data from a DataLoader that shuffles by its own generator, or by the global one."""
    parts = list(task.batches("train", 0))
    data = TensorDataset(torch.cat([b.inputs for b in parts]), torch.cat([b.targets for b in parts]))
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3) if own else None)
    source = task.batches
    return replace(task, build=Noisy, batches=lambda s, e: loader if s == "train" else source(s, e))


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def outcome(run: Run) -> dict[str, object]:
    """Everything that must be the same, to the bit."""
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in (*run.log, *run.epoch_log)]
    tensors = {name: t.detach().numpy().tobytes() for name, t in tensors_of(run.model).items()}
    moments = {
        f"{i}.{k}": torch.as_tensor(v).numpy().tobytes()
        for i, kept in run.optimizer.state_dict()["state"].items()
        for k, v in kept.items()
    }
    generators = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    return {"log": log, "tensors": tensors, "moments": moments, "generators": generators}


def unbroken(make: Callable[[], Task], folder: Path, **options: object) -> dict[str, object]:
    seed_all()
    return outcome(train(make(), checkpoint=folder, progress=False, **options))


@pytest.mark.parametrize("stop", [0, 4, 7, 14])
@pytest.mark.parametrize("kind", ["drawn", "own generator", "global generator"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_that_is_left_goes_on_bit_for_bit(task: Task, tmp_path: Path, stop: int, kind: str, keep: str) -> None:
    make = (lambda: drawn(task)) if kind == "drawn" else (lambda: loaded(task, kind == "own generator"))
    options = {"epochs": 3, "keep": keep, "optimizer": "adamw", "seed": 4}
    whole = unbroken(make, tmp_path / "whole", **options)
    seed_all()
    with Run(make(), checkpoint=tmp_path / "a", **options) as run:
        for step in run:
            if step.index == stop:
                break
    random.seed(8), np.random.seed(8), torch.manual_seed(8)
    assert outcome(train(make(), checkpoint=tmp_path / "a", resume=True, progress=False, **options)) == whole


def test_a_checkpoint_within_an_epoch_changes_nothing(task: Task, tmp_path: Path) -> None:
    whole = unbroken(lambda: drawn(task), tmp_path / "a", epochs=2)
    assert unbroken(lambda: drawn(task), tmp_path / "b", epochs=2, every=1) == whole


def test_a_finished_run_resumes_to_its_result(task: Task, tmp_path: Path) -> None:
    whole = unbroken(lambda: drawn(task), tmp_path, epochs=2)
    assert outcome(train(drawn(task), epochs=2, checkpoint=tmp_path, resume=True, progress=False)) == whole


def test_float32_moments_of_bfloat16_weights_come_back_as_they_were(task: Task, tmp_path: Path) -> None:
    class Wide(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    kept = self.state[p].setdefault("mean", torch.zeros(p.shape, dtype=torch.float32))
                    kept.mul_(0.9).add_(p.grad.float())
                    p.data.sub_((group["lr"] * kept).to(p.dtype))

    def half() -> Task:
        def batches(split: Split, epoch: int) -> list[Batch]:
            return [Batch(b.inputs.bfloat16(), b.targets) for b in task.batches(split, epoch)]

        return replace(task, build=lambda: nn.Linear(5, 3).bfloat16(), batches=batches)

    options = {"optimizer": Wide, "epochs": 2, "keep": "last", "rate": 0.01}
    runs = []
    for stop in (None, 3):
        with Run(half(), checkpoint=tmp_path / str(stop), **options) as run:
            for step in run:
                if step.index == stop:
                    break
        if stop:
            run = train(half(), checkpoint=tmp_path / str(stop), resume=True, progress=False, **options)
        runs.append([t.detach().float().numpy().tobytes() for t in run.model.parameters()])
        assert all(kept["mean"].dtype == torch.float32 for kept in run.optimizer.state.values())
    assert runs[0] == runs[1]


PROGRAM = """
import os, random, signal, sys, numpy, torch
from torch import nn
from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.run import train
from steelyard.learn.task import Task
torch.set_num_threads(1), random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
x, y = torch.randn(60, 5), torch.arange(60) % 3
data = Examples({"train": x[:40], "valid": x[40:]}, {"train": y[:40], "valid": y[40:]}, 8, 0)
build = lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
task = Task("noise", build, data, cross_entropy, {"accuracy": accuracy})
def kill(run):
    if len(run.log) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(task, epochs=6, seed=1, checkpoint=sys.argv[1], every=3, resume=True, progress=kill)
"""


def test_killed_with_sigkill_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: str, stop: int) -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / folder), str(stop)]
        return subprocess.run(command, check=False).returncode

    assert run("whole", -1) == 0
    for stop in (4, 19):
        assert run("killed", stop) == -signal.SIGKILL
    assert run("killed", -1) == 0
    files = [(tmp_path / folder / STATE).read_bytes() for folder in ("whole", "killed")]
    trees = [read_tree(tmp_path / folder / STATE) for folder in ("whole", "killed")]
    for tree in trees:
        for row in tree["epochs"]:
            del row["seconds"]
        del tree["steps"]
    for i, tree in enumerate(trees):
        write_tree(tree, tmp_path / f"{i}.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert len(files[0]) > 1000
    rows = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / folder / STEPS).read_text().splitlines()]
        for folder in ("whole", "killed")
    ]
    assert rows[0] == rows[1]


def test_ctrl_c_leaves_a_whole_checkpoint(task: Task, tmp_path: Path) -> None:
    def stop(run: Run) -> None:
        if len(run.log) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    whole = unbroken(lambda: drawn(task), tmp_path / "whole", epochs=3)
    seed_all()
    with pytest.raises(KeyboardInterrupt):
        train(drawn(task), epochs=3, checkpoint=tmp_path / "a", progress=stop)
    assert len((tmp_path / "a" / STEPS).read_text().splitlines()) == 7
    assert outcome(train(drawn(task), epochs=3, checkpoint=tmp_path / "a", resume=True, progress=False)) == whole


def test_a_failing_step_leaves_the_last_good_checkpoint(task: Task, tmp_path: Path) -> None:
    def broken(split: Split, epoch: int) -> Iterator[Batch]:
        for i, batch in enumerate(task.batches(split, epoch)):
            yield Batch(batch.inputs * float("nan"), batch.targets) if (split, epoch, i) == ("train", 1, 2) else batch

    with pytest.raises(ModelError, match="not finite"):
        train(replace(task, batches=broken), epochs=3, checkpoint=tmp_path, every=1, progress=False)
    mended = train(task, epochs=3, checkpoint=tmp_path, resume=True, progress=False)
    whole = train(task, epochs=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(mended.model.parameters(), whole.model.parameters(), strict=True))


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(task: Task, tmp_path: Path) -> None:
    def poison(model: nn.Module) -> None:
        if (calls := calls_of.pop() + 1) == 4:
            model[0].weight.data[0, 0] = float("inf")
        calls_of.append(calls)

    calls_of = [0]
    with pytest.raises(ModelError, match=r"not finite after step 3, in 0.weight"):
        train(task, epochs=1, checkpoint=tmp_path, every=1, after_step=poison, progress=False)
    assert all(t.isfinite().all() for t in read_tree(tmp_path / STATE)["model"]["tensors"].values())


def test_what_does_not_fit_is_refused_and_changes_nothing(task: Task, tmp_path: Path) -> None:
    train(task, epochs=2, checkpoint=tmp_path, progress=False)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ModelError, match="go on with it"):
        Run(task, epochs=2, checkpoint=tmp_path)
    with pytest.raises(ModelError, match=r"'epochs' of the run was 2 .* and is 3 now"):
        Run(task, epochs=3, checkpoint=tmp_path, resume=True)
    model = nn.Linear(5, 3)
    kept = model_state(model)["tensors"]["weight"].clone()
    with pytest.raises(ModelError, match=r"of the model was 'float32\[16, 5\]'"):
        Run(task, model, epochs=2, checkpoint=tmp_path, resume=True)
    assert torch.equal(model.weight, kept)
    with pytest.raises(ModelError, match="name the folder"):
        Run(task, resume=True)
    with pytest.raises(ModelError, match="every=0"):
        Run(task, checkpoint=tmp_path, every=0)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_damaged_checkpoint_is_named(task: Task, tmp_path: Path) -> None:
    train(task, epochs=1, checkpoint=tmp_path, progress=False)
    whole = (tmp_path / STEPS).read_bytes()
    (tmp_path / STEPS).write_bytes(b"\x00" + whole[1:])
    with pytest.raises(
        FormatError, match=r"steps.jsonl: a row is damaged; put back a whole copy of the folder, or begin"
    ):
        Run(task, epochs=1, checkpoint=tmp_path, resume=True)
    (tmp_path / STEPS).write_bytes(whole[:-9])
    with pytest.raises(FormatError, match=r"steps.jsonl.*a part is missing; put back a whole copy"):
        Run(task, epochs=1, checkpoint=tmp_path, resume=True)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"state\.safetensors"):
        Run(task, epochs=1, checkpoint=tmp_path, resume=True)
    formats.write(from_module(nn.Linear(2, 2)), tmp_path / STATE)
    with pytest.raises(FormatError, match="expected the state of a training"):
        Run(task, epochs=1, checkpoint=tmp_path, resume=True)


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(3, dtype=torch.bfloat16)
    tree = {"a": [1, 2.5, None, True, "x", (1, (2, [3]))], 7: {"t": shared, "u": shared, "e": torch.zeros(0, 2)}}
    tree["nan"], tree["inf"] = float("nan"), -float("inf")
    write_tree(tree, tmp_path / "t.safetensors")
    found = read_tree(tmp_path / "t.safetensors")
    assert repr(found) == repr(tree)
    assert len(formats.open(tmp_path / "t.safetensors")) == 2
    with pytest.raises(ModelError, match=r"b.c is a set"):
        write_tree({"b": {"c": {1}}}, tmp_path / "t.safetensors")
    assert repr(read_tree(tmp_path / "t.safetensors")) == repr(tree)


def test_a_flipped_bit_of_a_tree_is_named(tmp_path: Path) -> None:
    """Or does no harm, as one in the spaces between the parts of a header."""
    path, tree = tmp_path / "t.safetensors", {"w": torch.arange(40.0), "n": [7, {"k": torch.tensor([2])}]}
    write_tree(tree, path)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert repr(read_tree(path)) == repr(tree), at
        except FormatError:
            refused += 1
    assert refused > 0.95 * len(whole)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match="is damaged: its checksum does not hold; put back a whole copy"):
        read_tree(path)

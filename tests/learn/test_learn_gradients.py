"""Accumulation, clipping, precision, processes: the mathematics of one batch; and what a bad batch is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from steelyard.errors import ModelError
from steelyard.learn.data import Examples
from steelyard.learn.examples import ExampleLoss
from steelyard.learn.run import Run, train
from steelyard.learn.schedules import Scheduler
from steelyard.learn.task import Batch, Split, Task


def plain(task: Task) -> Task:
    return replace(task, build=lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)))


def weighted(task: Task, pieces: int, weights: bool) -> Task:
    """The same batches of 8 examples, each cut into pieces of unequal weight."""
    source = task.batches

    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for batch in source(split, epoch):
            weight = (batch.inputs[:, 0] * 10).abs() if weights and split == "train" else None
            size = -(-len(batch) // pieces) if split == "train" else len(batch)
            for i in range(0, len(batch), size):
                rows = slice(i, i + size)
                yield Batch(batch.inputs[rows], batch.targets[rows], None if weight is None else weight[rows])

    return replace(plain(task), batches=batches)


def gradients(run: Run) -> list[Tensor]:
    return [p.grad.clone() for p in next(iter(run)).model.parameters()]


@pytest.mark.parametrize("pieces", [2, 3, 8])
@pytest.mark.parametrize("weights", [False, True])
def test_accumulated_batches_have_the_gradient_of_one(task: Task, pieces: int, weights: bool) -> None:
    whole = gradients(Run(weighted(task, 1, weights)))
    parts = gradients(Run(weighted(task, pieces, weights), accumulate=pieces))
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1, a.abs().max())


def test_accumulation_takes_the_same_steps_and_says_the_same_losses(task: Task) -> None:
    whole = train(weighted(task, 1, True), epochs=3, keep="last", progress=False)
    parts = train(weighted(task, 2, True), epochs=3, keep="last", accumulate=2, progress=False)
    assert len(parts.log) == len(whole.log) == 15
    assert parts.table().column("rate") == whole.table().column("rate")
    assert parts.table().column("loss") == pytest.approx(whole.table().column("loss"), abs=1e-6)
    assert parts.history().column("train loss")[1:] == pytest.approx(whole.history().column("train loss")[1:], abs=1e-6)


def test_the_batch_of_an_accumulated_step_is_all_of_it(task: Task) -> None:
    whole, parts = next(iter(Run(weighted(task, 1, True)))), next(iter(Run(weighted(task, 2, True), accumulate=2)))
    assert torch.equal(whole.batch.inputs, parts.batch.inputs)
    assert torch.equal(whole.batch.weight, parts.batch.weight)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_of_an_update_is_clipped_as_a_whole(task: Task, accumulate: int) -> None:
    free = torch.cat([g.flatten() for g in gradients(Run(weighted(task, accumulate, False), accumulate=accumulate))])
    run = Run(weighted(task, accumulate, False), accumulate=accumulate, clip=0.1)
    clipped = torch.cat([g.flatten() for g in gradients(run)])
    assert free.norm() > 0.1
    assert torch.allclose(clipped, free * (0.1 / free.norm()), rtol=1e-4, atol=1e-8)


def test_bfloat16_runs_the_model_and_leaves_weights_and_loss_alone(task: Task) -> None:
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    half, full = (
        train(replace(plain(task), loss=loss), epochs=4, precision=p, keep="last", progress=False)
        for p in ("bfloat16", "full")
    )
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.log[0]["loss"] != full.log[0]["loss"]
    assert half.log[-1]["loss"] == pytest.approx(full.log[-1]["loss"], rel=0.05)


def test_a_compiled_model_trains_the_model_itself(task: Task) -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        calls.append(1)
        return graph.forward

    compiled = train(plain(task), epochs=2, compiled={"backend": backend}, progress=False)
    whole = train(plain(task), epochs=2, progress=False)
    assert calls
    assert list(compiled.model.state_dict()) == list(whole.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(compiled.model.parameters(), whole.model.parameters(), strict=True))


def test_patience_ends_a_run_that_gets_no_better(task: Task, tmp_path: Path) -> None:
    options = {"epochs": 40, "rate": 1.0, "optimizer": "sgd", "schedule": "constant", "patience": 3}
    run = train(task, progress=False, checkpoint=tmp_path, **options)
    losses = run.history().column("valid loss")
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    assert len(losses) < 41
    assert len(train(task, progress=False, checkpoint=tmp_path, resume=True, **options).epoch_log) == len(losses)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Scheduler(partial(StepLR, step_size=1, gamma=0.1)), [0.1] * 5 + [0.01] * 5 + [0.001] * 5),
        (Scheduler(partial(StepLR, step_size=3, gamma=0.5), each="step"), [0.1 * 0.5 ** (i // 3) for i in range(15)]),
    ],
)
def test_schedulers_of_torch_set_the_rate_and_go_on(
    task: Task, tmp_path: Path, schedule: Scheduler, rates: list[float]
) -> None:
    options = {"epochs": 3, "rate": 0.1, "schedule": schedule, "keep": "last"}
    assert train(task, progress=False, **options).table().column("rate") == pytest.approx(rates)
    with Run(task, checkpoint=tmp_path, **options) as run:
        for step in run:
            if step.index == 6:
                break
    run = train(task, checkpoint=tmp_path, resume=True, progress=False, **options)
    assert run.table().column("rate") == pytest.approx(rates)


def test_one_cycle_of_torch_goes_on_bit_for_bit(task: Task, tmp_path: Path) -> None:
    schedule = Scheduler(partial(OneCycleLR, max_lr=0.1, total_steps=10), each="step")
    options = {"epochs": 2, "optimizer": "sgd", "schedule": schedule, "keep": "last"}
    whole = train(task, progress=False, **options)
    with Run(task, checkpoint=tmp_path, **options) as run:
        for step in run:
            if step.index == 3:
                break
    parts = train(task, checkpoint=tmp_path, resume=True, progress=False, **options)
    assert parts.table().column("rate") == whole.table().column("rate")
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))


def test_the_rate_falls_on_a_plateau(task: Task) -> None:
    run = train(task, epochs=20, rate=2.0, optimizer="sgd", schedule="plateau", progress=False)
    rates, losses = run.table().column("rate"), run.history().column("valid loss")
    assert rates[0] == 2.0
    assert rates[-1] < 2.0
    assert min(losses) < losses[0]


def test_an_optimizer_that_is_made_already(task: Task) -> None:
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    run = train(task, model, optimizer=optimizer, schedule="constant", epochs=1, progress=False)
    assert run.optimizer is optimizer
    assert run.table().column("rate") == [0.25] * 5
    with pytest.raises(ModelError, match=r"holds 4 of 4 parameters that the model does not have.*\(16, 5\)"):
        Run(task, task.build(), optimizer=optimizer)
    with pytest.raises(ModelError, match=r"does not hold 3\.weight"):
        Run(task, model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ModelError, match=r"holds 2 of 6"):
        Run(task, model, optimizer=lambda groups: torch.optim.SGD([*groups, {"params": nn.Linear(2, 2).parameters()}]))


def spoiled(task: Task, spoil: Callable[[Batch], Batch], when: int = 2) -> Task:
    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for i, batch in enumerate(task.batches(split, epoch)):
            yield spoil(batch) if (split, epoch, i) == ("train", 1, when) else batch

    return replace(task, batches=batches)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda b: Batch(b.inputs[:0], b.targets[:0]), "its batch is empty"),
        (
            lambda b: Batch(b.inputs, b.targets + 2),
            "labels 3, 4, the first in example . of the batch; the model has outputs for the classes 0 to 2",
        ),
        (lambda b: Batch(b.inputs, b.targets - 1), "labels -1, the first in example . of the batch"),
        (lambda b: Batch(b.inputs[:5], b.targets), "has 5 inputs and 8 targets"),
        (lambda b: Batch(b.inputs / 0, b.targets), "40 of the 40 numbers in the inputs .* in example 0 of the batch"),
    ],
)
def test_a_bad_batch_is_named_with_its_cause_and_harms_nothing(
    task: Task, tmp_path: Path, spoil: Callable[[Batch], Batch], said: str
) -> None:
    with pytest.raises(ModelError, match=rf"^step 7 \(batch 2 of epoch 1\): .*{said}"):
        train(spoiled(task, spoil), epochs=3, checkpoint=tmp_path, every=1, progress=False)
    mended = train(task, epochs=3, checkpoint=tmp_path, resume=True, progress=False)
    whole = train(task, epochs=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(mended.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_weights_below_zero_or_of_another_shape_are_refused(task: Task, named: bool) -> None:
    def served(weight: Tensor) -> Task:
        whole = task.batches
        mine = lambda split, epoch: [Batch(b.inputs, b.targets, weight[: len(b)]) for b in whole(split, epoch)]  # noqa: E731
        return replace(plain(task), batches=mine, **({"loss": ExampleLoss("cross_entropy")} if named else {}))

    for wrong, said in ((-1.0, "-1.0"), (torch.nan, "nan")):
        weight = torch.ones(32)
        weight[3] = wrong
        with pytest.raises(
            ModelError, match=rf"step 0 \(batch 0 of epoch 0\): the weight of example 3 .* is {said}: exp"
        ):
            train(served(weight), epochs=1, progress=False)
    with pytest.raises(ModelError, match=r"weights of shape \[8, 1\]: expected one for each example, \[8\]"):
        train(served(torch.ones(32, 1)), epochs=1, progress=False)


class Gated(Examples):
    """Examples of which some weigh nothing, in batches that do not mix them; `removed`: those are not served."""

    def __call__(self, split: Split, epoch: int) -> Sequence[Batch]:
        found = list(super().__call__(split, epoch))
        if split != "train":
            return found
        heavy = [i % 3 != 1 for i in range(len(found))]
        if self.augment is not None:  # stands for: removed
            return [batch for batch, counts in zip(found, heavy, strict=True) if counts]
        return [
            Batch(b.inputs if counts else b.inputs * torch.inf, b.targets, torch.full((len(b),), float(counts)))
            for b, counts in zip(found, heavy, strict=True)
        ]


def gated(task: Task, removed: bool, named: bool) -> Task:
    data = task.batches
    examples = Gated(data.inputs, data.targets, 4, 0, augment=(lambda x, _: x) if removed else None)
    loss = {"loss": ExampleLoss("cross_entropy")} if named else {}
    build = {"build": lambda: nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))}
    return replace(task, batches=examples, **loss, **build)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("accumulate", [1, 10])
def test_a_batch_without_weight_is_as_if_it_were_removed(task: Task, named: bool, accumulate: int) -> None:
    """Ten batches of which 1, 4 and 7 weigh nothing: no step with momentum and decay, no statistics of batch norm."""
    options = {"epochs": 3, "schedule": "constant", "keep": "last", "average": "ema", "weight_decay": 0.1}
    found, wanted = (
        train(gated(task, removed, named), accumulate=accumulate, progress=False, **options)
        for removed in (False, True)
    )
    assert len(found.log) == len(wanted.log) == (21 if accumulate == 1 else 3)
    assert [row["loss"] for row in found.log] == pytest.approx([row["loss"] for row in wanted.log], abs=1e-6)
    assert found.done == 1.0
    for a, b in zip(found.model.state_dict().values(), wanted.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_run_without_any_weight_is_refused_and_one_with_gaps_goes_on(task: Task, tmp_path: Path) -> None:
    data = task.batches
    nothing = replace(data, weight={"train": torch.zeros(40)})
    with pytest.raises(ModelError, match="epoch 0 has no example of a weight above 0: nothing to learn from"):
        train(replace(task, batches=nothing), epochs=1, progress=False)
    options = {"epochs": 3, "keep": "last"}
    whole = train(gated(task, False, False), progress=False, **options)
    with Run(gated(task, False, False), checkpoint=tmp_path, every=1, **options) as run:
        for step in run:
            if step.index == 9:
                break
    parts = train(gated(task, False, False), checkpoint=tmp_path, every=1, resume=True, progress=False, **options)
    assert [row["rate"] for row in parts.log] == [row["rate"] for row in whole.log]
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))


def test_a_loss_of_one_number_is_named(task: Task) -> None:
    single = replace(task, loss=nn.CrossEntropyLoss())
    with pytest.raises(ModelError, match=r"expected one number per example: shape \(20,\)"):
        train(single, progress=False)
    trained = replace(single, batches=lambda split, epoch: task.batches(split, epoch) if split == "train" else [])
    with pytest.raises(ModelError, match=r"^step 0 \(batches 0 to 1 of epoch 0\): .*expected one number per example"):
        train(trained, keep="last", accumulate=2, progress=False)


PROGRAM = """
import atexit, os, sys, torch
from torch import nn
from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.run import Run, train
from steelyard.learn.task import Task
torch.set_num_threads(1)
def last():  # of what is done at exit: a thread that is left may abort the process
    print("left at exit:", len(os.listdir("/proc/self/task")) - 1)
atexit.register(last)
g = torch.Generator().manual_seed(0)
x, y = torch.randn(59, 5, generator=g), torch.arange(59) % 3
class Weighted(Examples):
    def __call__(self, split, epoch):
        for i, batch in enumerate(super().__call__(split, epoch)):
            weight = batch.inputs[:, 0].abs() * (i not in (2, 3, 4)) if split == "train" else None
            yield type(batch)(batch.inputs, batch.targets, weight)
data = Weighted({"train": x[:41], "valid": x[41:]}, {"train": y[:41], "valid": y[41:]}, 8, 0)
build = lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
task = Task("noise", build, data, lambda o, t: cross_entropy(o.float(), t), {"accuracy": accuracy})
data.inputs["train"], data.inputs["valid"] = x[:41].double(), x[41:].double()
folder, accumulate, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = dict(epochs=3, keep="last", accumulate=accumulate, checkpoint=folder, resume=True)
if stop:
    with Run(task, **options) as run:
        for step in run:
            if step.index == stop:
                break
run = train(task, progress=False, **options)
"""


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """41 examples in batches of 8: the last batch has 1 example for 2 processes. One of the runs is broken off.

    Of the three updates in an epoch the second has no weight, and the first batch of the third has none.
    """
    from steelyard.learn.treefile import read_tree

    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for who, launch, stop in (("one", [sys.executable], 0), ("two", both, 4)):
        command = [*launch, str(tmp_path / "program.py"), str(tmp_path / who), "2", str(stop)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["left", "at", "exit:", "0"] * 2
    one, two = (read_tree(tmp_path / who / "state.safetensors") for who in ("one", "two"))
    for name, tensor in one["model"]["tensors"].items():
        assert (tensor - two["model"]["tensors"][name]).abs().max() <= 1e-6
    assert one["done"] == two["done"] == 1.0
    assert [len((tmp_path / who / "steps.jsonl").read_text().splitlines()) for who in ("one", "two")] == [6, 6]
    assert [r["train loss"] for r in one["epochs"][1:]] == pytest.approx([r["train loss"] for r in two["epochs"][1:]])

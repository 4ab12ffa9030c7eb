"""Wrong arguments of what trains: one line that says what was expected, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import steelyard as sy
from steelyard.errors import SteelyardError, WeightsError
from steelyard.learn.evaluate import evaluate, outcomes
from steelyard.learn.examples import ExampleLoss, class_weights
from steelyard.learn.rate import find_lr
from steelyard.learn.run import Run, train
from steelyard.learn.schedules import Scheduler
from steelyard.learn.task import Batch, Task, build_seeded
from steelyard.learn.watch.session import watch


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def nothing(step: sy.Step) -> None:
    """A gauge that forgets to return."""


MODULE = r"expected a torch\.nn\.Module, found"
LISTED = "expected a list, found a"
WRONG: dict[str, tuple[Callable[[Task, nn.Module], Any], str]] = {
    "a name for a task": (
        lambda t, m: train("digits"),  # type: ignore[arg-type]
        r"task: expected a Task, such as sy\.task\('digits'\), found 'digits'",
    ),
    "model and task swapped": (
        lambda t, m: train(m, t),
        r"task: expected a Task; the model comes after it, found a Seq",
    ),
    "a number for a model": (lambda t, m: train(t, 3), f"model: {MODULE} 3"),
    "a class for a model": (lambda t, m: train(t, nn.ReLU), f"model: {MODULE} the class ReLU: call it, to make one"),
    "the class Task": (lambda t, m: train(Task), "task: expected a Task, found the class Task: call it"),
    "no optimizer": (lambda t, m: Run(t, optimizer=None), "optimizer: expected a name, a function .*, found None"),
    "a function that makes none": (lambda t, m: Run(t, optimizer=lambda p: 3), "expected a torch optimizer, found 3"),
    "a function that fails": (
        lambda t, m: Run(t, optimizer=lambda p: torch.optim.SGD(p, speed=1)),
        "making the optimizer fails, .*unexpected keyword argument 'speed'",
    ),
    "a closure": (
        lambda t, m: Run(t, m, optimizer=torch.optim.LBFGS(m.parameters())),
        "LBFGS evaluates the loss several times in a step, .*: use it in a loop of your own",
    ),
    "a scheduler": (
        lambda t, m: Run(t, m, schedule=StepLR(sgd(m), 3)),
        r"StepLR belongs to one optimizer: give .*, sy\.Scheduler\(lambda optimizer: StepLR\(optimizer, \.\.\.\)\)",
    ),
    "the class of a scheduler": (lambda t, m: Run(t, schedule=StepLR), "StepLR belongs to one optimizer"),
    "no schedule": (lambda t, m: Run(t, schedule=3), "schedule: expected a name, a function .*, found 3"),
    "a schedule that makes none": (
        lambda t, m: Run(t, schedule=Scheduler(lambda o: 3)),
        "a scheduler of torch, found 3",
    ),
    "a schedule in words": (
        lambda t, m: train(t, schedule=lambda done: "a"),
        "gives 'a' at 0 of the run: expected a f",
    ),
    "a schedule below 0": (lambda t, m: train(t, schedule=lambda done: -done), r"gives -0\.01 at 0\.01 of the run"),
    "a schedule of NaN": (lambda t, m: train(t, schedule=lambda done: math.nan), "gives nan at 0 of the run"),
    "a penalty alone": (
        lambda t, m: Run(t, penalties=sy.L1(1e-3)),
        rf"penalties: {LISTED} L1: .*, penalties=\[\.\.\.\]",
    ),
    "a gauge alone": (lambda t, m: Run(t, gauges=sy.Trajectory()), f"gauges: {LISTED} Trajectory"),
    "a gauge that returns None": (
        lambda t, m: train(t, gauges=[nothing]),
        "what the gauge nothing returns: expected numbers by name, {} for none, found None",
    ),
    "every without a checkpoint": (lambda t, m: Run(t, every=3), r"every=3 .*: name its folder \(checkpoint=\)"),
    "every as a text": (lambda t, m: watch(m, sgd(m), every="5"), "every='5': expected a positive whole number"),
    "a sink alone": (lambda t, m: watch(m, sgd(m), to="terminal"), r"to: expected a list, found 'terminal': .*, to=\["),
    "classes in words": (
        lambda t, m: sy.weigh_classes(t, "balance"),
        "class weights 'balance': expected \"balanced\", or",
    ),
    "classes without numbers": (
        lambda t, m: sy.weigh_classes(t, ["a", 1, 2]),
        r"class weights \['a', 1, 2\]: expected",
    ),
    "classes of no task": (lambda t, m: sy.weigh_classes(m, "balanced"), "task: expected a Task"),
    "classes with fractions": (lambda t, m: class_weights([0.5, 1.0]), "expected class numbers, whole and from 0"),
    "classes below 0": (lambda t, m: class_weights(torch.tensor([0, -1])), "expected class numbers"),
    "a loader for a model": (lambda t, m: find_lr([(1, 2)], m), rf"model: {MODULE} a list"),
    "a module for batches": (
        lambda t, m: find_lr(m, nn.ReLU(), loss=len),
        "data: expected a Task, or batches .* a ReLU",
    ),
    "a model for an optimizer": (lambda t, m: sy.penalize(sgd(m), m, sy.L1(1.0)), rf"model: {MODULE} a SGD"),
    "no optimizer to penalize": (lambda t, m: sy.penalize(m, m, sy.L1(1.0)), "optimizer: expected a torch optimizer"),
    "evaluate swapped": (evaluate, "task: expected a Task; the model comes after it, found a Seq"),
    "less of no metric is better": (
        lambda t, m: evaluate(m, replace(t, lower_is_better=("acuracy",))),
        "no metric of the task .*, in lower_is_better, 'acuracy'; did you mean 'accuracy'",
    ),
    "less of a text is better": (
        lambda t, m: evaluate(m, replace(t, lower_is_better="accuracy")),
        "lower_is_better: expected the names of metrics, such as .'accuracy',., found 'accuracy'",
    ),
    "groups of no task": (lambda t, m: sy.group_dro(m), "task: expected a Task"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told_in_one_line(task: Task, name: str) -> None:
    use, said = WRONG[name]
    with pytest.raises(SteelyardError, match=said) as caught:
        use(task, build_seeded(task))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_class_weights_of_a_list() -> None:
    assert torch.equal(class_weights([0, 0, 0, 1]), class_weights(torch.tensor([0, 0, 0, 1])))


def test_a_log_is_not_named_as_a_folder(task: Task, tmp_path: Path) -> None:
    model = build_seeded(task)
    with pytest.raises(WeightsError, match=r"is a folder: name a file in it for the log, such as .*run\.sqlite"):
        watch(model, sgd(model), path=tmp_path)


SAID = {"lr": 0.1, "weight_decay": 0.5}


@pytest.mark.parametrize("key", SAID)
def test_what_an_optimizers_function_says_is_not_lost(task: Task, key: str) -> None:
    option = "rate" if key == "lr" else key
    with pytest.raises(SteelyardError, match=f"function says {key}={SAID[key]}, .*: leave it out there, .*{option}="):
        Run(task, optimizer=partial(torch.optim.SGD, **{key: SAID[key]}))
    run = Run(task, optimizer=partial(torch.optim.SGD, **{key: SAID[key]}), **{option: SAID[key]})
    assert run.optimizer.param_groups[0][key] == pytest.approx(SAID[key])
    for silent in (torch.optim.SGD, partial(torch.optim.AdamW, betas=(0.8, 0.9)), torch.optim.AdamW):
        assert Run(task, optimizer=silent, rate=0.02).optimizer.param_groups[0]["lr"] == 0.02
    own = torch.optim.SGD((model := build_seeded(task)).parameters(), lr=0.1)
    assert Run(task, model, optimizer=own).optimizer.param_groups[0]["lr"] == 0.1


def test_another_decay_does_not_go_on(task: Task, tmp_path: Path) -> None:
    train(task, epochs=1, weight_decay=0.01, checkpoint=tmp_path, progress=False)
    with pytest.raises(
        SteelyardError, match=r"'weight_decay' of the run was \[0\.01, 0\.0\] .* and is \[0\.5, 0\.0\] now"
    ):
        train(task, epochs=1, weight_decay=0.5, checkpoint=tmp_path, resume=True, progress=False)


def test_a_penalty_is_attached_once(task: Task) -> None:
    model = build_seeded(task)
    optimizer, l1, weight = sgd(model), sy.L1(0.5), torch.ones(())
    first = sy.penalize(model, optimizer, l1, sy.L1(0.5, where="0.bias"), sy.L1(0.25), sy.Decay(0.1))
    sy.penalize(model, optimizer, sy.L1(0.5, factors=weight), sy.L1(0.5, factors=weight.clone())).remove()
    for again, said in ((l1, r"L1\(0\.5\)"), (sy.L1(0.5), r"L1\(0\.5\)"), (sy.Decay(0.1), r"Decay\(0\.1\)")):
        with pytest.raises(SteelyardError, match=rf"{said} acts on this optimizer already: remove\(\) it first"):
            sy.penalize(model, optimizer, again)
    with pytest.raises(SteelyardError, match=r"L1\(0\.5\) acts on this optimizer already"):
        Run(task, penalties=[sy.L1(0.5), l1])
    first.remove()
    sy.penalize(model, optimizer, l1)
    sy.penalize(model, sgd(model), l1)


def labelled(task: Task, split: str, change: Callable[[Tensor], Tensor]) -> Task:
    """The task in batches of 8, with the targets of each batch of a split changed."""

    def batches(where: str, epoch: int) -> list[Batch]:
        found = []
        for b in task.batches(where, epoch):
            for start in range(0, len(b), 8):
                y = b.targets[start : start + 8]
                found.append(Batch(b.inputs[start : start + 8], change(y.clone()) if where == split else y))
        return found

    return replace(task, batches=batches)


def seventh(y: Tensor) -> Tensor:
    y[3] = 7
    return y


def by_torch(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


HEAVY = ExampleLoss("cross_entropy", {"weight": torch.tensor([1.0, 2.0, 3.0])})


@pytest.mark.parametrize("loss", [None, ExampleLoss("cross_entropy"), HEAVY, ExampleLoss("focal"), by_torch])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_label_that_is_no_class_is_named_with_its_example(task: Task, split: str, loss: Any) -> None:
    wrong = labelled(task if loss is None else replace(task, loss=loss), split, seventh)
    place = r"step 0 \(batch 0 of epoch 0\)" if split == "train" else f"batch 0 of the {split} split"
    said = (
        f"{place}: .*labels 7, the first in example 3 of the batch; the model has outputs for the classes 0 to 2: num"
    )
    with pytest.raises(SteelyardError, match=said):
        train(wrong, epochs=1, progress=False) if split != "test" else outcomes(build_seeded(task), wrong)


@pytest.mark.parametrize("loss", [None, ExampleLoss("cross_entropy"), ExampleLoss("nll"), by_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_labels_of_another_type_have_a_remedy(task: Task, dtype: torch.dtype, loss: Any) -> None:
    wrong = labelled(task if loss is None else replace(task, loss=loss), "train", lambda y: y.to(dtype))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        SteelyardError, match=rf"step 0 .*the targets are {kind}, and class numbers are int64: give targets"
    ):
        train(wrong, epochs=1, progress=False)


def test_a_run_that_fails_or_ends_leaves_no_penalty_on_the_optimizer() -> None:
    task = sy.task("digits", batch_size=512)
    model = build_seeded(task, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SteelyardError):
        Run(task, model, optimizer=optimizer, penalties=[sy.L1(1e-3)], schedule="cosin")
    for _ in Run(task, model, optimizer=optimizer, penalties=[sy.L1(1e-3)], epochs=1):
        pass
    train(task, model, optimizer=optimizer, penalties=[sy.L1(1e-3)], epochs=1)
    assert not optimizer._optimizer_step_pre_hooks


def test_two_modules_with_one_optimizer_may_have_the_same_penalty() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    sy.penalize(first, optimizer, sy.L1(1e-4))
    sy.penalize(second, optimizer, sy.L1(1e-4))
    with pytest.raises(SteelyardError, match="acts on this optimizer already"):
        sy.penalize(nn.Sequential(first, second), optimizer, sy.L1(1e-4))


def test_a_mean_is_no_sum_of_each_example() -> None:
    model = nn.Linear(3, 2)
    loss = nn.functional.cross_entropy(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long))
    with pytest.raises(SteelyardError, match="expected one of each for every example"):
        sy.GlobalMean(model).backward(loss, torch.ones(5))


def test_a_function_may_make_groups_of_its_own() -> None:
    task = sy.task("digits", batch_size=512)
    model = build_seeded(task, 0)
    run = Run(task, model, optimizer=lambda groups: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.5

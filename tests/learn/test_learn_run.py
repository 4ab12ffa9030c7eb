"""The loop: exact, repeatable, interruptible, and it leaves the caller's randomness alone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.gauges import gradient_norm, update_ratio, weight_norm
from steelyard.learn.run import Run, train
from steelyard.learn.task import Batch, Split, Task, build_seeded
from steelyard.learn.tasks import task as find_task


def bits(model: nn.Module) -> bytes:
    return b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_the_loss_falls(task: Task, optimizer: str, schedule: str) -> None:
    run = train(task, optimizer=optimizer, schedule=schedule, epochs=6, rate=0.01, progress=False)
    losses = run.history().column("valid loss")
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_printed_is_the_loss_recomputed(task: Task) -> None:

    def batches(split: Split, epoch: int) -> list[Batch]:
        return [Batch(b.inputs.double(), b.targets) for b in task.batches(split, epoch)]

    plain = replace(task, build=lambda: nn.Linear(5, 3).double(), batches=batches)
    kept = build_seeded(plain, 0).state_dict()
    with Run(plain, epochs=3) as run:
        model = run.model
        for step in run:
            with torch.no_grad():
                now = {name: p.clone() for name, p in model.named_parameters()}
                model.load_state_dict(kept)
                again = nn.functional.cross_entropy(model(step.batch.inputs), step.batch.targets)
                model.load_state_dict(now)
            assert abs(again.item() - step.loss) < 1e-12
            kept = now


def test_weights_of_examples_count_like_copies() -> None:
    inputs, targets = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    copies = torch.tensor([0, 1, 2, 3])

    def batches(weighted: bool) -> Callable[[Split, int], Iterator[Batch]]:
        def serve(split: Split, epoch: int) -> Iterator[Batch]:
            if weighted:
                yield Batch(inputs, targets, copies.float())
            else:
                yield Batch(inputs.repeat_interleave(copies, 0), targets.repeat_interleave(copies))

        return serve

    from steelyard.learn.measures import accuracy, cross_entropy

    gradients = []
    for weighted in (True, False):
        task = Task("weighted", lambda: nn.Linear(5, 3), batches(weighted), cross_entropy, {"accuracy": accuracy})
        step = next(iter(Run(task, epochs=1)))
        gradients.append(step.model.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(task: Task) -> None:
    a, b, c = (train(task, epochs=3, seed=seed, progress=False).model for seed in (1, 1, 2))
    assert bits(a) == bits(b) != bits(c)


def test_digits_with_augmentation_and_dropout_repeat_bit_for_bit() -> None:
    models = [
        train(find_task("digits", shots=4, classes=(3, 8), seed=1), epochs=2, seed=1, progress=False).model
        for _ in range(2)
    ]
    assert bits(models[0]) == bits(models[1])


def test_bits_do_not_depend_on_who_watches(task: Task) -> None:
    a = train(task, epochs=2, progress=False)
    b = train(task, epochs=2, progress=False, gauges=[update_ratio(), gradient_norm(), weight_norm()])
    assert bits(a.model) == bits(b.model)


def test_global_randomness_is_untouched(task: Task) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()
    find_task("digits")
    train(task, epochs=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_batches_are_a_function_of_seed_split_and_epoch(blobs: Callable[..., Task]) -> None:
    def order(seed: int, epoch: int) -> list[float]:
        return torch.cat([b.inputs for b in blobs(seed=seed).batches("train", epoch)]).flatten().tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == sorted(order(0, 2))


def test_update_ratio_is_exactly_what_moved(task: Task) -> None:
    model = build_seeded(task)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Run(task, model, epochs=1, gauges=[update_ratio()]) as run:
        for step in run:
            for name, after in model.named_parameters():
                key = f"update ratio {name}"
                if before[name].norm() > 0:
                    expected = ((after.detach() - before[name]).norm() / before[name].norm()).item()
                    assert run.log[step.index][key] == pytest.approx(expected, rel=1e-6)
                    assert expected > 0
            before = {n: p.detach().clone() for n, p in model.named_parameters()}


def test_gradient_norm_is_the_norm_of_all_gradients(task: Task) -> None:
    run = Run(task, epochs=1, gauges=[gradient_norm(), weight_norm()])
    step = next(iter(run))
    whole = torch.cat([p.grad.flatten() for p in step.model.parameters()]).norm().item()
    assert run.log[0]["gradient norm"] == pytest.approx(whole, rel=1e-6)
    assert run.log[0]["norm 0.weight"] == pytest.approx(step.model[0].weight.norm().item(), rel=1e-6)
    assert "gradient norm 0.weight" in [c.name for c in run.table().columns]


def test_best_ends_with_the_epoch_of_the_lowest_validation_loss(task: Task) -> None:
    run = Run(task, epochs=6, rate=1.0, optimizer="sgd", schedule="constant")
    for _ in run:
        pass
    losses = run.history().column("valid loss")
    assert min(losses) < losses[-1]
    assert mean_outcomes(run.model, task, "valid")["loss"] == min(losses)


def test_the_epoch_that_is_kept_is_told(task: Task) -> None:
    run = train(task, epochs=5, rate=0.05, progress=False)
    losses = run.history().column("valid loss")
    assert run.kept_epoch == losses.index(min(losses))
    assert train(task, epochs=2, keep="last", progress=False).kept_epoch == 2
    assert train(task, epochs=2, optimizer="sgd", rate=50.0, progress=False).kept_epoch == 0


def test_last_ends_with_the_last_epoch(task: Task) -> None:
    run = train(task, epochs=6, rate=1.0, optimizer="sgd", schedule="constant", keep="last", progress=False)
    assert mean_outcomes(run.model, task, "valid")["loss"] == run.history().column("valid loss")[-1]


def test_frozen_layers_keep_their_bits_and_statistics(blobs: Callable[..., Task]) -> None:
    task = blobs(build=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    model = build_seeded(task)
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    before = bits(model[0]) + bits(model[1]), bits(model[3])
    train(task, model, epochs=2, keep="last", progress=False)
    assert bits(model[0]) + bits(model[1]) == before[0]
    assert bits(model[3]) != before[1]


def test_ctrl_c_takes_effect_between_steps(task: Task) -> None:
    inside: list[bool] = []

    def after_step(model: nn.Module) -> None:
        if not inside:
            os.kill(os.getpid(), signal.SIGINT)
        inside.append(True)

    previous = signal.getsignal(signal.SIGINT)
    model = build_seeded(task)
    with pytest.raises(KeyboardInterrupt), Run(task, model, epochs=5, after_step=after_step, keep="last") as run:
        for _ in run:
            pass
    assert len(inside) == len(run.log) == 1  # the step was finished and recorded, and none followed
    assert signal.getsignal(signal.SIGINT) is previous
    clean = Run(task, epochs=5, keep="last")
    next(iter(clean))
    assert bits(clean.model) == bits(model)


def test_ctrl_c_while_the_last_epoch_is_measured_is_not_forgotten(task: Task) -> None:
    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if run.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return (outputs.argmax(1) == targets).float()

    run = Run(replace(task, metrics={"accuracy": metric}), epochs=1)
    with pytest.raises(KeyboardInterrupt), run:
        for _ in run:
            pass
    assert len(run.epoch_log) == 2


def test_a_loop_that_is_left_can_be_taken_up_again(task: Task) -> None:
    run = Run(task, epochs=2, keep="last")
    for step in run:
        if step.index == 3:
            break
    assert next(iter(run)).index == 4
    for _ in run:
        pass
    assert bits(run.model) == bits(train(task, epochs=2, keep="last", progress=False).model)
    assert run.done == 1


def test_progress_is_called_after_each_step_and_silent_in_a_pipe(task: Task, capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[float] = []
    train(task, epochs=2, progress=lambda run: calls.append(run.done))
    assert len(calls) == 10
    assert calls == sorted(calls)
    train(task, epochs=1)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(task: Task, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(task, epochs=1)
    assert "blobs" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adamv"}, UnknownNameError, "did you mean 'adam"),
        ({"schedule": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
        ({"keep": "first"}, UnknownNameError, "way to keep"),
        ({"epochs": 0}, ModelError, "at least one"),
        ({"rate": 0.0}, ModelError, "positive rate"),
    ],
)
def test_wrong_options_are_named(task: Task, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Run(task, **options)


def test_bad_tasks_and_models_are_refused(task: Task, blobs: Callable[..., Task]) -> None:
    with pytest.raises(ModelError, match="train split of the task 'blobs' is empty"):
        train(blobs(sizes=(0, 5, 5)), progress=False)
    with pytest.raises(ModelError, match="keep='last'"):
        train(blobs(sizes=(9, 0, 5)), progress=False)
    assert (
        train(blobs(sizes=(9, 0, 5)), epochs=1, keep="last", progress=False).history().column("valid loss")[-1] is None
    )
    with pytest.raises(ModelError, match="nothing to train"):
        Run(task, nn.Flatten())
    with pytest.raises(ModelError, match="expected a torch"):
        build_seeded(replace(task, build=lambda: 3))
    with pytest.raises(ModelError, match="one number per example"):
        train(replace(task, loss=nn.CrossEntropyLoss()), progress=False)
    with pytest.raises(ModelError, match="lower the learning rate"):
        train(task, optimizer="sgd", rate=1e30, epochs=3, progress=False)
    with pytest.raises(ModelError, match="no metric"):
        replace(task, metrics={})

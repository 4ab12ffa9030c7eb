"""Numbers that stop being finite where the loss of a step does not tell: in the validation data, in the last step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.checkpoint import STATE
from steelyard.learn.rate import find_lr
from steelyard.learn.run import Run, train
from steelyard.learn.task import Batch, Split, Task, build_seeded


def spoiled(task: Task, what: str, value: float = torch.nan) -> Task:
    """One validation example, the fourth of the second batch of 8, is not finite."""

    def batches(split: Split, epoch: int) -> list[Batch]:
        if split != "valid":
            return list(task.batches(split, epoch))
        whole = next(iter(task.batches("valid", 0)))
        x, y = whole.inputs.clone(), whole.targets.clone()
        y = y.double() if what == "targets" else y
        (x if what == "inputs" else y)[11] = value
        return [Batch(x[i : i + 8], y[i : i + 8]) for i in range(0, 20, 8)]

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    return replace(task, batches=batches, **({"loss": squared} if what == "targets" else {}))


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    ("what", "said"),
    [("inputs", "5 of the 40 numbers in the inputs"), ("targets", "1 of the 8 numbers in the targets")],
)
def test_validation_data_that_are_not_finite_are_named(task: Task, what: str, said: str, keep: str) -> None:
    wrong = rf"validation loss before the first step is nan: {said} of batch 1 of the valid split .* in example 3 of"
    with pytest.raises(ModelError, match=wrong):
        train(spoiled(task, what), epochs=1, keep=keep, patience=2, progress=False)
    with pytest.raises(ModelError, match=rf"{said} of batch 1 of the valid split"):
        find_lr(None, spoiled(task, what), epochs=1, effort="quick")


def test_an_infinite_validation_loss_is_the_worst_one(task: Task) -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        values = nn.functional.cross_entropy(outputs, targets, reduction="none")
        if not torch.is_grad_enabled():
            calls.append(1)
            return values * (torch.inf if len(calls) == 1 else 1.0)
        return values

    losses = train(replace(task, loss=loss), epochs=3, progress=False).history().column("valid loss")
    assert losses[0] == torch.inf
    assert max(losses[1:]) < 10


class Rooted(nn.Module):
    """Its outputs are finite, and the derivative of the root of zero is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (self.layer.weight * 0).sum().abs().sqrt()


@pytest.mark.parametrize(("keep", "valid"), [("best", True), ("last", True), ("last", False)])
def test_a_last_step_that_breaks_the_weights_is_named(
    blobs: Callable[..., Task], tmp_path: Path, keep: str, valid: bool
) -> None:
    task = blobs(build=Rooted, batch_size=40)  # a step in an epoch
    if not valid:
        whole = task.batches
        task = replace(task, batches=lambda split, epoch: [] if split == "valid" else whole(split, epoch))
    said = r"not finite after step 0, in layer.weight: the gradient of that step is not, in layer.weight, though its lo"
    with pytest.raises(ModelError, match=said) as caught:
        train(task, epochs=1, keep=keep, progress=False)
    assert "checkpoint" not in str(caught.value)
    with pytest.raises(ModelError, match=f"{said}.*; the checkpoint is left as it was before"):
        train(task, epochs=1, keep=keep, checkpoint=tmp_path, progress=False)
    assert (tmp_path / STATE).exists()
    run = Run(task, build_seeded(task), epochs=1, keep=keep)
    start = run.model.layer.weight.detach().clone()
    with pytest.raises(ModelError), run:
        for _ in run:
            pass
    assert torch.equal(run.model.layer.weight, start) == (keep == "best")


def test_a_step_that_breaks_the_weights_from_a_finite_gradient(task: Task) -> None:
    def overflow(model: nn.Module) -> None:
        model[0].weight.data[0] = torch.inf

    whole = replace(task, batches=replace(task.batches, batch_size=40))
    with pytest.raises(ModelError, match=r"not finite after step 0, in 0\.weight: lower the learning rate$"):
        train(whole, epochs=1, after_step=overflow, progress=False)


def test_a_frozen_mask_of_infinities_is_no_fault(task: Task) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * (self.mask == 0))

    train(replace(task, build=Masked), epochs=1, progress=False)

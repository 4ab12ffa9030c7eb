"""Why numbers of a training are not finite: the data, the weights, or a step; each found and named with its place.

Decides what is looked at first, and what is to be done. Changes nothing. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steelyard.formats._sharded import is_sharded
from steelyard.learn.task import Batch, Split, Task


def of_step(model: nn.Module, batches: Sequence[Batch], index: int) -> str:
    """Why the loss of a step is not finite, as far as the batches and the weights tell, and what to do."""
    for batch in batches:
        if found := _in_data(batch):
            return found
    name = broken_weight(model)
    if name is not None and index == 0:
        return f"the model starts with weights that are not finite, in {name}: start it from others"
    found = f"the weights are not finite any more, in {name}: " if name is not None else ""
    return f"{found}lower the learning rate"


def of_split(task: Task, split: Split) -> str:
    """Why the mean loss over a split is not a number, while the weights are finite, and what to do."""
    for number, batch in enumerate(task.batches(split, 0)):
        if found := _in_data(batch, f"batch {number} of the {split} split"):
            return found
    return f"the weights and the {split} data are finite, what the model makes of them is not: lower the learning rate"


def of_weights(model: nn.Module, steps: int) -> str:
    """What made weights not finite in the last of so many steps, whose gradients are on the model; '' if all are."""
    name = broken_weight(model, trained=True)
    if name is None:
        return ""
    if not steps:
        return f"step 0 (before it): the model starts with weights that are not finite, in {name}: start it from others"
    found = f"the weights are not finite after step {steps - 1}, in {name}"
    slope = next((n for n, p in model.named_parameters() if p.grad is not None and not_finite(p.grad)), None)
    if slope is None:
        return f"{found}: lower the learning rate"
    return (f"{found}: the gradient of that step is not, in {slope}, though its loss is: look for a root, a logarithm "
            "or a division at 0, or lower the learning rate")  # fmt: skip


def broken_weight(model: nn.Module, *, trained: bool = False) -> str | None:
    """The name of the first parameter (trained: of those that are to be trained) that is not finite; None for none."""
    return next((n for n, p in model.named_parameters() if (p.requires_grad or not trained) and not_finite(p)), None)


def not_finite(x: Tensor) -> int:
    """How many elements are NaN or infinite."""
    wrong = (~torch.isfinite(x.detach())).sum()
    return int(wrong.full_tensor() if is_sharded(wrong) else wrong)


def _in_data(batch: Batch, which: str = "its batch") -> str:
    for what, tensors in (("inputs", batch.arguments), ("targets", (batch.targets,)), ("weights", _weights(batch))):
        wrong, numbers = sum(map(not_finite, tensors)), sum(x.numel() for x in tensors)
        if wrong:
            row = next(_first_row(x) for x in tensors if not_finite(x))
            return (f"{wrong} of the {numbers} numbers in the {what} of {which} are not finite, the first in "
                    f"example {row} of the batch: mend the data")  # fmt: skip
    return ""


def _weights(batch: Batch) -> tuple[Tensor, ...]:
    return () if batch.weight is None else (batch.weight,)


def _first_row(x: Tensor) -> int:
    return int((~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()[0])

"""From batches to gradients: accumulation, mixed precision, compilation, clipping and several processes.

Decides that all of them have the mathematics of one batch in one process: the loss of every example is divided by the
weight of all examples of the update. Knows nothing of optimizers or of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.formats._sharded import is_sharded
from steelyard.learn.calling import calling
from steelyard.learn.examples import ExampleLoss
from steelyard.learn.processes import Processes
from steelyard.learn.robust import GroupDRO
from steelyard.learn.task import Batch, Task, apply, per_example

Precision = Literal["full", "bfloat16"]


class Gradients:
    """Called with the batches of one update, it leaves their gradients on the model and returns their mean loss."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        device: torch.device,
        clip: float | None,
        precision: Precision,
        compiled: bool | Mapping[str, Any],
        processes: Processes,
    ):
        self.task, self.model, self.device, self.clip = task, model, device, clip
        self.precision, self.processes = precision, processes
        forward = model
        if compiled:
            forward = torch.compile(model, **(compiled if isinstance(compiled, Mapping) else {}))
        self._forward = processes.wrapped(forward, device)
        self._what = f"loss of {task.name}"
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Batch]) -> float:
        """The (weighted) mean loss over the examples of all batches. Raises ModelError for batches without weight."""
        for batch in batches:
            check_batch(batch)
        alone = len(batches) == 1 and self.processes.count == 1
        whole = isinstance(self.task.loss, GroupDRO)
        if whole and not alone:
            raise ModelError("GroupDRO weighs the groups of a whole batch: one process, and accumulate=1")
        plain = alone and batches[0].weight is None and not isinstance(self.task.loss, ExampleLoss)
        total = None if plain or whole else _weight(batches, self.task)
        found = 0.0
        for i, batch in enumerate(batches):
            with self._unsynchronised() if i < len(batches) - 1 else nullcontext():
                found += self._backward(self.processes.share(batch), total)
        found = self.processes.total(found, self.device)
        if not math.isfinite(found):
            raise NotFiniteLoss(found)
        return found

    def release(self) -> None:
        """Let go of what synchronises the model: while it lives, so do the threads of the process group."""
        self._forward = self.model

    def clipped(self) -> None:
        """Scale the gradients so that their norm over all parameters is at most ``clip``."""
        if self.clip is not None:
            norm = clip(self._parameters, self.clip)
            if not torch.isfinite(norm):
                raise ModelError(f"the gradient has norm {float(norm)}: lower the learning rate")

    def _backward(self, batch: Batch, total: float | None) -> float:
        """Add the gradients of one batch; ``total`` is the weight of all examples of the update, None their number."""
        if self.precision == "full":
            outputs = apply(self._forward, batch)
        else:
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = apply(self._forward, batch)
            outputs = outputs.float()
        if isinstance(self.task.loss, ExampleLoss):
            values = self.task.loss.terms(outputs, batch.targets)[0]
        else:
            values = per_example(self.task.loss, outputs, batch, self._what)
        if isinstance(self.task.loss, GroupDRO):
            loss = self.task.loss.mean(values, batch.groups)
        elif total is None:
            loss = values.mean()
        else:
            loss = (values if batch.weight is None else values * batch.weight).sum() / total
        with calling("the gradient of the loss"):
            # DistributedDataParallel takes the mean over processes, and `total` is that of all
            (loss if self.processes.count == 1 else loss * self.processes.count).backward()
        return loss.item()

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        wrapped = self._forward
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients so that their norm is at most `most`; the norm that they had.

    Sharded ones are taken as the whole that they are parts of, together with those that every process has.
    """
    if not any(map(is_sharded, parameters)):
        return nn.utils.clip_grad_norm_(parameters, most)
    kinds = [[p for p in parameters if p.grad is not None and is_sharded(p) is sharded] for sharded in (True, False)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if is_sharded(n) else n for n in norms]))
    for kind in filter(None, kinds):
        nn.utils.clip_grads_with_norm_(kind, most, total)
    return total


class NotFiniteLoss(Exception):
    """The loss of an update is NaN or infinite; the weights are as they were before."""

    def __init__(self, loss: float):
        self.loss = loss


def _weight(batches: Sequence[Batch], task: Task) -> float:
    """The weight of all examples together; each as often as the loss counts it."""
    total = 0.0
    for batch in batches:
        weight = torch.ones(len(batch), device=batch.targets.device) if batch.weight is None else batch.weight
        counts = task.loss.counts(batch.targets) if isinstance(task.loss, ExampleLoss) else torch.ones_like(weight)
        total += float((weight * counts).sum())
    if total == 0:
        raise ModelError("the weights of all its examples are 0: leave such a batch out")
    return total


def check_batch(batch: Batch) -> None:
    """Raise ModelError for a batch without examples, or with inputs and targets that do not go together."""
    if not len(batch):
        raise ModelError("its batch is empty: leave it out, or mend what serves the batches")
    for x in batch.arguments:
        if x.ndim and x.shape[0] != len(batch):
            raise ModelError(f"its batch has {x.shape[0]} inputs and {len(batch)} targets: expected one for each")


def reason(model: nn.Module, batches: Sequence[Batch], index: int) -> str:
    """Why the loss is not finite, as far as the batches and the weights tell, and what to do."""
    for batch in batches:
        for what, tensors in (("inputs", batch.arguments), ("targets", (batch.targets,)), ("weights", _weights(batch))):
            wrong, numbers = sum(map(not_finite, tensors)), sum(x.numel() for x in tensors)
            if wrong:
                row = next(_first_row(x) for x in tensors if not_finite(x))
                return (f"{wrong} of the {numbers} numbers in the {what} of its batch are not finite, the first in "
                        f"example {row} of the batch: mend the data")  # fmt: skip
    names = [name for name, p in model.named_parameters() if not_finite(p)]
    if names and index == 0:
        return f"the model starts with weights that are not finite, in {names[0]}: start it from others"
    found = f"the weights are not finite any more, in {names[0]}: " if names else ""
    return f"{found}lower the learning rate"


def not_finite(x: Tensor) -> int:
    """How many elements are NaN or infinite."""
    wrong = (~torch.isfinite(x.detach())).sum()
    return int(wrong.full_tensor() if is_sharded(wrong) else wrong)


def _weights(batch: Batch) -> tuple[Tensor, ...]:
    return () if batch.weight is None else (batch.weight,)


def _first_row(x: Tensor) -> int:
    return int((~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()[0])

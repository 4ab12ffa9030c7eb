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
from steelyard.learn.examples import ExampleLoss, checked_weight
from steelyard.learn.processes import Processes
from steelyard.learn.robust import GroupDRO
from steelyard.learn.task import Batch, Task, apply, inner_loss, terms

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
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Batch]) -> float | None:
        """The (weighted) mean loss over the examples of all batches; None, and no gradients, if none has a weight.

        Raises ModelError for weights below 0. A batch of which no example has a weight is left out, as if it were not
        there: the model does not see it.
        """
        for batch in batches:
            check_batch(batch)
        alone = len(batches) == 1 and self.processes.count == 1
        whole = isinstance(self.task.loss, GroupDRO)
        if whole and not alone:
            raise ModelError("GroupDRO weighs the groups of a whole batch: one process, and accumulate=1")
        total = None
        if not alone or batches[0].weight is not None or isinstance(inner_loss(self.task), ExampleLoss):
            weights = [_weight(batch, self.task) for batch in batches]  # the same in every process
            batches = [batch for batch, weight in zip(batches, weights, strict=True) if weight > 0]
            total = sum(weights)
        if not batches:
            return None
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
        values, counts = terms(self.task, outputs, batch)
        if isinstance(self.task.loss, GroupDRO):
            loss = self.task.loss.mean(values, batch.groups, batch.weight, counts)
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


def _weight(batch: Batch, task: Task) -> float:
    """The weight of all its examples together; each as often as the loss counts it."""
    weight = torch.ones(len(batch), device=batch.targets.device) if batch.weight is None else batch.weight
    loss = inner_loss(task)
    counts = loss.counts(batch.targets) if isinstance(loss, ExampleLoss) else torch.ones_like(weight)
    return float((weight * counts).sum())


def check_batch(batch: Batch) -> None:
    """Raise ModelError for a batch without examples, or with inputs, targets and weights that do not go together."""
    if not len(batch):
        raise ModelError("its batch is empty: leave it out, or mend what serves the batches")
    for x in batch.arguments:
        if x.ndim and x.shape[0] != len(batch):
            raise ModelError(f"its batch has {x.shape[0]} inputs and {len(batch)} targets: expected one for each")
    if batch.weight is not None:
        checked_weight(batch.weight, batch.targets.new_empty(len(batch), dtype=batch.weight.dtype))

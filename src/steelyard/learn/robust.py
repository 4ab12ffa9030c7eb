"""GroupDRO: a loss that weighs groups of examples by how badly they do. Knows nothing of tasks or loops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steelyard.errors import ModelError


class GroupDRO:
    """sum_g q_g L_g with L_g the mean loss of group g, and q raised where L is high (Sagawa et al. 2020).

    Before each use in training q_g <- q_g exp(step (L_g + adjustment / sqrt(n_g))), normalised: an online step towards
    the worst group, for the groups that the batch has. It needs strong L2 or early stopping where a network can fit
    every example: then all L_g are 0 and q says nothing (section 3 of the paper).

    loss: (outputs, targets) -> one number for each example. counts: (groups,) training examples of each group, or
    how many groups there are. step: of q. adjustment: C of the paper, which raises small groups; needs counts.
    It is the ``loss`` of a `Task` whose training batches have ``groups``; elsewhere it is the plain loss. q belongs to
    this object: a run that goes on from a checkpoint starts with equal q again.

    >>> dro = GroupDRO(lambda outputs, targets: (outputs - targets).square(), 2, step=1.0)
    >>> losses = torch.tensor([0.0, 2.0, 2.0])
    >>> round(float(dro.mean(losses, torch.tensor([0, 1, 1]))), 4)  # 2 e^2 / (1 + e^2)
    1.7616
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        counts: Tensor | int,
        *,
        step: float = 0.01,
        adjustment: float = 0.0,
    ):
        groups = counts if isinstance(counts, int) else len(counts)
        if groups < 1 or not step > 0:
            raise ModelError(f"GroupDRO: {groups} groups, step={step!r}: expected one or more, and a positive number")
        if adjustment and isinstance(counts, int):
            raise ModelError("GroupDRO: an adjustment needs the number of examples of each group: torch.bincount")
        self.loss, self.step = loss, step
        self.weights = torch.full((groups,), 1 / groups, dtype=torch.float64)  # q
        self._extra = torch.zeros(groups, dtype=torch.float64)
        if not isinstance(counts, int):
            self._extra = adjustment / counts.double().clamp_min(1).sqrt().cpu()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, without groups."""
        return self.loss(outputs, targets)

    def mean(self, values: Tensor, groups: Tensor | None) -> Tensor:
        """The weighted loss of a training batch, after q has been raised; values and groups are (examples,)."""
        if groups is None:
            raise ModelError("GroupDRO: the training batches have no groups: give Examples(..., groups=...)")
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(self.weights):
            raise ModelError(f"GroupDRO: a batch has group {int(groups.max())}, there are {len(self.weights)} from 0")
        count = torch.bincount(groups, minlength=len(self.weights))
        means = torch.zeros(len(self.weights), dtype=values.dtype, device=values.device).index_add(0, groups, values)
        means = means / count.clamp_min(1)
        present = (count > 0).cpu()
        raised = self.weights * (self.step * (means.detach().double().cpu() + self._extra) * present).exp()
        self.weights = raised / raised.sum()
        return (self.weights.to(means) * means).sum()

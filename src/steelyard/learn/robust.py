"""GroupDRO: a loss that weighs groups of examples by how badly they do. Knows nothing of tasks or loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.examples import checked_weight


class GroupDRO:
    """sum_g q_g L_g with L_g the (weighted) mean loss of group g, and q raised where L is high (Sagawa et al. 2020).

    Before each use in training q_g <- q_g exp(step (L_g + adjustment / sqrt(n_g))), normalised: an online step towards
    the worst group, for the groups that the batch has. It needs strong L2 or early stopping where a network can fit
    every example: then all L_g are 0 and q says nothing (section 3 of the paper).

    loss: (outputs, targets) -> one number for each example, or an ExampleLoss, whose class weights count. counts:
    (groups,) training examples of each group (the sum of their weights, if they have some), or how many groups there
    are. step: of q. adjustment: C of the paper, which raises small groups; needs counts.
    It is the ``loss`` of a `Task` whose training batches have ``groups``; elsewhere it is the plain loss. q belongs to
    this object, and to the checkpoint of a run.

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

    def mean(
        self, values: Tensor, groups: Tensor | None, weight: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """The weighted loss of a training batch, after q has been raised. All are (examples,).

        L_g = sum_i w_i values_i / sum_i w_i counts_i over its examples; without counts each counts as one.
        """
        if groups is None:
            raise ModelError("GroupDRO: the training batches have no groups: give Examples(..., groups=...)")
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(self.weights):
            raise ModelError(f"GroupDRO: a batch has group {int(groups.max())}, there are {len(self.weights)} from 0")
        w = checked_weight(weight, values)
        none = torch.zeros(len(self.weights), dtype=values.dtype, device=values.device)
        count = none.index_add(0, groups, w if counts is None else w * counts)
        means = none.index_add(0, groups, w * values) / count.where(count > 0, 1.0)
        present = (count > 0).cpu()
        raised = self.weights * (self.step * (means.detach().double().cpu() + self._extra) * present).exp()
        self.weights = raised / raised.sum()
        return (self.weights.to(means) * means).sum()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"weights": self.weights}

    def load(self, state: dict[str, Any], model: nn.Module) -> None:  # noqa: ARG002 - as every state that goes on
        """Go on from a `state`."""
        self.weights = state["weights"]

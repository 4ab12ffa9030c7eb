"""A Step: the plain record of one update of the weights, and the functions of it that watch a training.

Decides what is known of a step. Knows nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steelyard.learn.options import check_kind
from steelyard.learn.task import Batch, joined


@dataclass(frozen=True)
class Step:
    """One update of the weights, as it was made. The gradients of its batch are still on the model."""

    index: int  # counts from 0 over the whole run
    epoch: int  # counts from 0
    loss: float  # the data term: the mean over the batch, before the update
    rate: float  # the learning rate of the first parameter group
    seconds: float  # spent on this update
    batches: tuple[Batch, ...]  # several with accumulate
    model: nn.Module
    optimizer: torch.optim.Optimizer
    before: Mapping[str, Tensor] = field(default_factory=dict)  # the parameters before the update, if a gauge watches
    penalties: Mapping[str, float] = field(default_factory=dict)  # what each adds to the loss, before the update

    @property
    def objective(self) -> float:
        """What the update lowers: the data term and every penalty."""
        return self.loss + sum(self.penalties.values())

    @property
    def batch(self) -> Batch:
        """Its examples; those of several batches put together."""
        return joined(self.batches)


Gauge = Callable[[Step], Mapping[str, float]]


def readings(gauges: Sequence[Gauge], step: Step) -> dict[str, float]:
    """What the gauges say of a step, together; raises ModelError for one that says anything but numbers by name."""
    found: dict[str, float] = {}
    for gauge in gauges:
        said = gauge(step)
        if not isinstance(said, Mapping):
            name = getattr(gauge, "__qualname__", type(gauge).__qualname__)
            check_kind(f"what the gauge {name} returns", said, Mapping, "numbers by name, {} for none")
        found.update(said)
    return found

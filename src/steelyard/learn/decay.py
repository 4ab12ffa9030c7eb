"""Decoupled weight decay: exactly the factor that its formula says, under any optimizer and any schedule.

Decides the formulas. Knows nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from steelyard.core.where import Where
from steelyard.errors import UnknownNameError
from steelyard.learn.parameters import choose_parameters
from steelyard.learn.penalties import checked

Per = Literal["rate", "schedule", "step", "corrected"]

SHARES: Mapping[str, Callable[[float, float], float]] = {  # (rate now, peak rate) -> c is 1 - share * strength
    "rate": lambda rate, _peak: rate,
    "schedule": lambda rate, peak: rate / peak,
    "step": lambda _rate, _peak: 1.0,
    "corrected": lambda rate, peak: rate * rate / peak,
}


@dataclass(frozen=True, eq=False)
class Shrinking:
    """A decay of the parameters of one model under one optimizer."""

    name: str
    parameters: frozenset[int]  # their id()
    factor: Callable[[Mapping[str, Any]], float]  # parameter group -> what its weights are multiplied by


@dataclass(frozen=True, eq=False)
class Decay:
    """Decoupled weight decay: before each step w <- c w, whatever the gradient (Loshchilov & Hutter 2019).

    It is no term of an objective. With g the learning rate of the step and G its peak, per says what c is:

    - "rate": 1 - g * strength, as torch's AdamW: halving the rate halves the decay
    - "schedule": 1 - g / G * strength, as in the paper: the schedule scales it, the peak rate does not
    - "step": 1 - strength, whatever the schedule
    - "corrected": 1 - g^2 / G * strength, which keeps the size of normalised weights steady to the end of a schedule
      (AdamC; Defazio 2025)

    peak: G; None: a group's ``max_lr`` or ``initial_lr`` if a scheduler has set them, else its rate when attached.
    where: None: what decays by `decay_groups`. Set the optimizer's own weight_decay to 0 beside it.
    """

    strength: float
    per: Per = "rate"
    where: Where | str | None = None
    peak: float | None = None

    def bind(self, model: nn.Module, optimizer: Optimizer) -> Shrinking:
        """The decay on this model; raises ModelError if it concerns none of its parameters."""
        strength = checked(self.strength, "Decay")
        if self.per not in SHARES:
            raise UnknownNameError("formula of decay", str(self.per), SHARES)
        chosen = choose_parameters(model, self.where, "Decay")
        share = SHARES[self.per]
        attached = {id(w): float(group["lr"]) for group in optimizer.param_groups for w in group["params"]}

        def factor(group: Mapping[str, Any]) -> float:
            first = attached.get(id(group["params"][0]), float(group["lr"]))
            peak = self.peak or float(group.get("max_lr", group.get("initial_lr", first)))
            return 1 - share(float(group["lr"]), peak) * strength

        return Shrinking(f"Decay({strength:g}, {self.per})", frozenset(id(p.parameter) for p in chosen), factor)

"""How the learning rate goes over a run: functions from the fraction done, in [0, 1], to a factor; torch's schedulers.

Decides when a rate is set. Knows nothing of models or data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.calling import calling
from steelyard.learn.options import check_kind

Schedule = Callable[[float], float]


def constant(done: float) -> float:  # noqa: ARG001 - a schedule is a function of the fraction done
    """1 throughout."""
    return 1.0


def cosine(done: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017).

    >>> [round(cosine(x), 2) for x in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(done: float) -> float:
    """From 1/25 up to 1 in the first quarter, then down to 0, both as half a cosine (Smith 2018).

    >>> [round(one_cycle(x), 2) for x in (0, 0.25, 1)]
    [0.04, 1.0, 0.0]
    """
    if done < 0.25:
        return 1 - 0.96 * cosine(4 * done)
    return cosine((done - 0.25) / 0.75)


def warm_up(done: float) -> float:
    """A straight line from 0 to 1 in the first twentieth, then 1 (Goyal et al. 2017).

    >>> [round(warm_up(x), 2) for x in (0, 0.025, 0.05, 1)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return min(20.0 * done, 1.0)


def warm_up_cosine(done: float) -> float:
    """`warm_up`, then half a cosine from 1 to 0 over the rest.

    >>> [round(warm_up_cosine(x), 2) for x in (0, 0.025, 0.05, 1)]
    [0.0, 0.5, 1.0, 0.0]
    """
    return warm_up(done) * cosine(max(done - 0.05, 0) / 0.95)


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of torch for a run: how it is made, and whether it is stepped after each step or each epoch.

    One that wants a metric (ReduceLROnPlateau) gets the validation loss, after each epoch.

    >>> from torch.optim.lr_scheduler import StepLR
    >>> halved = Scheduler(partial(StepLR, step_size=10, gamma=0.5))
    """

    make: Callable[[Optimizer], LRScheduler]
    each: Literal["step", "epoch"] = "epoch"


SCHEDULES: Mapping[str, Schedule | Scheduler] = {
    "constant": constant,
    "cosine": cosine,
    "one-cycle": one_cycle,
    "warm-up": warm_up,
    "warm-up-cosine": warm_up_cosine,
    "plateau": Scheduler(partial(ReduceLROnPlateau, factor=0.5, patience=3)),
}


class Pace:
    """A schedule at work on an optimizer."""

    def __init__(self, schedule: str | Schedule | Scheduler, optimizer: Optimizer):
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise UnknownNameError("schedule", schedule, SCHEDULES)
            schedule = SCHEDULES[schedule]
        _check_schedule(schedule)
        self.schedule, self.optimizer = schedule, optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self._scheduler = _made(schedule, optimizer) if isinstance(schedule, Scheduler) else None

    @property
    def name(self) -> str:
        """What tells this schedule from others."""
        made = self.schedule if self._scheduler is None else type(self._scheduler)
        return str(getattr(made, "__qualname__", type(made).__qualname__))

    def before_step(self, done: float) -> None:
        """Set the rate for the step that begins when the fraction ``done`` of the run is over."""
        if isinstance(self.schedule, Scheduler):
            return
        factor = self.schedule(min(done, 1.0))
        if not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
            raise ModelError(f"the schedule gives {factor!r:.100} at {done:.3g} of the run: expected a factor of the "
                             "rate, a finite number, 0 or more")  # fmt: skip
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def after_step(self) -> None:
        """A step of the optimizer was made."""
        if self._scheduler is not None and isinstance(self.schedule, Scheduler) and self.schedule.each == "step":
            self._scheduler.step()

    def after_epoch(self, valid: float | None) -> None:
        """An epoch is over; ``valid`` is the validation loss after it. Raises ModelError if it is needed and absent."""
        if self._scheduler is None or not isinstance(self.schedule, Scheduler) or self.schedule.each != "epoch":
            return
        if not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        elif valid is None:
            raise ModelError("the schedule looks at the validation loss, and the task has no validation examples")
        else:
            self._scheduler.step(valid)

    def state(self) -> dict[str, Any] | None:
        """What the scheduler of torch remembers; None for a function."""
        return None if self._scheduler is None else _plain(self._scheduler.state_dict())

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a state that `state` gave."""
        if self._scheduler is not None and state is not None:
            self._scheduler.load_state_dict(state)


def _check_schedule(schedule: object) -> None:
    """Raise ModelError for what is neither a function of the fraction done nor a Scheduler."""
    kind = schedule if isinstance(schedule, type) else type(schedule)
    if issubclass(kind, LRScheduler):
        raise ModelError(f"schedule: {kind.__name__} belongs to one optimizer: give a function that makes it of the "
                         f"run's, sy.Scheduler(lambda optimizer: {kind.__name__}(optimizer, ...))")  # fmt: skip
    if not isinstance(schedule, Scheduler) and not callable(schedule):
        expected = "a name, a function from the fraction done to a factor of the rate, or a Scheduler"
        check_kind("schedule", schedule, Scheduler, expected)


def _made(schedule: Scheduler, optimizer: Optimizer) -> LRScheduler:
    with calling("making the scheduler"):
        made = schedule.make(optimizer)
    check_kind("what makes the scheduler returns", made, LRScheduler, "a scheduler of torch")
    return made


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only belongs to the scheduler of this process: functions, and torch's notes on its own calls."""
    return {key: value for key, value in state.items() if not callable(value) and key != "_is_initial"}

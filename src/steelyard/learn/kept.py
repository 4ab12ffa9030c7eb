"""What a run ends with: the last weights or the best, as they are or averaged. Knows nothing of steps or files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from steelyard.learn.average import Average, Ema, Swa, update_batch_norm
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.state import State, copied, model_state, set_model_state
from steelyard.learn.task import Task

Keep = Literal["best", "last"]


class Kept:
    """The best weights so far and the running average, of one model on one task."""

    def __init__(self, task: Task, model: nn.Module, keep: Keep, kind: Ema | Swa | None):
        self.task, self.model, self.keep, self.kind = task, model, keep, kind
        self._average = None if kind is None else Average(model, kind)
        self._best: tuple[float, State, bool, int] | None = None  # its loss, state, whether an average, its epoch
        self._finished = False

    def after_step(self) -> None:
        """The optimizer made a step."""
        if self._average is not None and isinstance(self.kind, Ema):
            self._average.update()

    @property
    def epoch(self) -> int | None:
        """That of the best weights; None if the last ones are kept."""
        return None if self._best is None else self._best[3]

    def after_epoch(self, done: float, epoch: int, *, required: bool) -> dict[str, float]:
        """Measure what the run would end with now on the validation split, and remember the best."""
        if self._average is not None and isinstance(self.kind, Swa) and done > self.kind.start:
            self._average.update()
        averaged = self._average is not None and self._average.count > 0
        with self._applied():
            found = mean_outcomes(self.model, self.task, "valid", required=required or self.keep == "best")
            if self.keep == "best" and self._is_best(found.get("loss"), averaged):
                self._best = found["loss"], copied(model_state(self.model)), averaged, epoch
        return found

    def _is_best(self, loss: float | None, averaged: bool) -> bool:
        """Whether these are the weights to keep: the first average is, as one was asked for, then the lowest loss."""
        if loss is None or math.isnan(loss):
            return False
        return self._best is None or (averaged and not self._best[2]) or loss < self._best[0]

    def finish(self) -> None:
        """Give the model what the run ends with."""
        if self._finished:
            return
        self._finished = True
        if self._best is not None:
            set_model_state(self.model, self._best[1])
        elif self._average is not None and self._average.count:
            self._average.copy_to(self.model)
            if isinstance(self.kind, Swa):
                update_batch_norm(self.model, self.task.batches("train", 0))

    @contextmanager
    def _applied(self) -> Iterator[None]:
        if self._average is None or not self._average.count:
            yield
            return
        with self._average.applied(self.task.batches("train", 0)):
            yield

    def state(self) -> State:
        """What goes on with `load`, bit for bit."""
        names = ("loss", "model", "averaged", "epoch")
        best = None if self._best is None else dict(zip(names, self._best, strict=True))
        return {"best": best, "average": None if self._average is None else self._average.state()}

    def load(self, state: State) -> None:
        """Go on from a `state`."""
        best = state["best"]
        self._best = None if best is None else (best["loss"], best["model"], best["averaged"], best["epoch"])
        if self._average is not None:
            self._average.load(state["average"])

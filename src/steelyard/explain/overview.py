"""One question about a trained model, answered with the tables that belong together: the answer and its check."""

from __future__ import annotations

from torch import nn

from steelyard.core.table import Table
from steelyard.errors import UnknownNameError
from steelyard.explain.coefficients import coefficients, last_dense, removal
from steelyard.explain.contributions import contributions
from steelyard.explain.filters import filter_removal, filters
from steelyard.explain.signal import signal
from steelyard.learn.seeding import derive, seeded
from steelyard.learn.task import Task, device_of, first_batch

QUESTIONS = ("coefficients", "filters", "contributions", "signal")


def explain(model: nn.Module, task: Task, what: str, layer: str | None = None, example: int = 0) -> list[Table]:
    """The tables that answer `what`, one of QUESTIONS; raises UnknownNameError for another question."""
    if what == "coefficients":
        return [coefficients(model, task, layer), removal(model, task, layer)]
    if what == "filters":
        return [filters(model, task, layer), filter_removal(model, task, layer)]
    if what == "contributions":
        batch = first_batch(task, "test")
        return [contributions(model, batch.inputs, layer or last_dense(model, task), sample=example)]
    if what == "signal":
        return [signal_of(model, task)]
    raise UnknownNameError("question", what, QUESTIONS)


def signal_of(model: nn.Module, task: Task, rate: float = 1e-3, seed: int = 0) -> Table:
    """The signal of the task's first training batch through a model, in the mode that it is in; `seed`: of dropout."""
    batch = first_batch(task, "train")
    with seeded(derive(seed, "signal"), device_of(model)):
        return signal(model, batch.to(device_of(model)), task.loss, rate=rate)

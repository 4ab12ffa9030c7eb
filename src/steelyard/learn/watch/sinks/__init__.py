"""Where a watch also sends what it reads: a terminal, and the trackers that people use, each in a file of its own.

Decides what a sink is and how one is named: "tensorboard:runs/first". Imports none of them before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from steelyard.core.registry import Registry, Row
from steelyard.errors import MissingExtraError, ModelError


class Sink(ABC):
    """Takes numbers by name and step, and faults as text; a sink of your own implements these three."""

    @abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""

    @abstractmethod
    def fault(self, step: int, text: str) -> None:
        """A fault that was found."""

    @abstractmethod
    def close(self) -> None:
        """The watch has ended."""


_HERE = "steelyard.learn.watch.sinks"
SINKS: Registry[Any] = Registry(
    "sink",
    "sinks",
    {
        "terminal": Row(f"{_HERE}.terminal:Terminal", "a live view on a terminal: terminal:TENSORS"),
        "tensorboard": Row(
            f"{_HERE}.tensorboard:TensorBoard", "event files in a folder: tensorboard:FOLDER", "tensorboard"
        ),
        "wandb": Row(f"{_HERE}.wandb:WandB", "the current run, or one of a project: wandb:PROJECT", "wandb"),
        "mlflow": Row(
            f"{_HERE}.mlflow:MLflow", "the current run, or one of an experiment: mlflow:EXPERIMENT", "mlflow"
        ),
    },
)


def sink(given: str | Sink) -> Sink:
    """A sink as it is, or the one of that name, with what stands after the first colon.

    Raises UnknownNameError for a name that is not there, MissingExtraError for one that is not installed.

    >>> sink("tensorbord:runs")
    Traceback (most recent call last):
    steelyard.errors.UnknownNameError: there is no sink 'tensorbord'; did you mean 'tensorboard'?
    """
    if isinstance(given, Sink):
        return given
    if not isinstance(given, str):
        raise ModelError(f"watch: to={given!r}: expected names such as 'tensorboard:runs', or Sinks")
    name, _, where = given.partition(":")
    made = SINKS[name]
    try:
        result: Sink = made(where) if where else made()
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the sink {name!r}", error.name or "?", SINKS.rows[name].extra) from error
    return result

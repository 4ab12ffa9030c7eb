"""What the verbs that train share: what is penalised, averaged, weighed and watched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from torch import nn

    from steelyard.core.table import Table
    from steelyard.learn.run import Run
    from steelyard.learn.task import Task
    from steelyard.learn.watch.session import Watch

F = TypeVar("F", bound=Callable[..., Any])
QUICK = (
    "Find the rate by short runs first: about three runs more, up to twenty where a run has few steps. Within half a "
    "point of the best rate in 25 of 40 tasks, and far off in some."
)
FULL = "The same with whole runs at the end, about eight runs more: 37 of 40 tasks."


@dataclass(frozen=True)
class Training:
    """The options as the user gave them."""

    penalties: tuple[str, ...]
    average: str | None
    class_weights: str | None
    balanced: bool
    log: Path | None
    live: bool

    @property
    def watched(self) -> bool:
        """Whether a watch is wanted."""
        return self.log is not None or self.live

    def of(self, task: Task) -> Task:
        """The task, with its classes weighed or balanced if that was asked for."""
        from steelyard.learn.classes import balance_classes, weigh_classes

        if self.class_weights is not None:
            words = self.class_weights.split(",")
            task = weigh_classes(task, "balanced" if words == ["balanced"] else [_number(word) for word in words])
        return balance_classes(task) if self.balanced else task

    def options(self, *, sharded: bool = False) -> dict[str, Any]:
        """The keywords of `train`; sharded: whether each process holds a share of the weights."""
        from steelyard.learn.average import kind_of
        from steelyard.learn.named import penalty
        from steelyard.learn.processes import first

        return {
            "penalties": [penalty(text) for text in self.penalties],
            "average": None if self.average is None else kind_of(self.average),
            "within": self._watch if self.watched and (sharded or first()) else None,
        }

    def _watch(self, run: Run) -> Watch:
        from steelyard.learn.processes import first
        from steelyard.learn.watch.session import watch

        if not first():  # all processes put the norms of sharded weights together, one writes them
            return watch(run)
        return watch(run, path=self.log, page=self.live, tell=lambda fault: click.echo(f"fault, {fault}", err=True))


def training_options(function: F) -> F:
    """Add ``--penalty``, ``--average``, ``--class-weights``, ``--balanced``, ``--watch`` and ``--live``.

    The verb receives ``training: Training``.
    """

    @click.option("--penalty", "penalties", metavar="NAME=STRENGTH[@GLOB]", multiple=True,
                  help="l1, l2, elastic-net, group-l1 (neurons, filters), group-l1-inputs, group-l1-heads, l2-sp, "
                       "spectral or decay, on matrices or on the tensors that match; repeatable.")  # fmt: skip
    @click.option("--average", metavar="ema[=DECAY]|swa[=START]", help="End with an average of the weights.")
    @click.option("--class-weights", metavar="balanced|W,W,...",
                  help="How much each class counts in training; balanced makes up for how rare it is.")  # fmt: skip
    @click.option("--balanced", is_flag=True, help="Serve every class as often as every other in training.")
    @click.option("--watch", "log", type=click.Path(path_type=Path), metavar="LOG",
                  help="Log what each step does to each tensor; steelyard watch LOG shows it.")  # fmt: skip
    @click.option("--live", is_flag=True, help="Watch it in a browser on this machine while it runs.")
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        penalties: tuple[str, ...],
        average: str | None,
        class_weights: str | None,
        balanced: bool,
        log: Path | None,
        live: bool,
        **options: Any,
    ) -> Any:
        training = Training(penalties, average, class_weights, balanced, log, live)
        return function(*args, training=training, **options)

    return wrapped  # type: ignore[return-value]


def rate_options(function: F) -> F:
    """Add ``--find-lr`` and ``--find-lr-full``: the verb receives ``find_lr``, the effort or None."""
    full = click.option("--find-lr-full", "find_lr", flag_value="full", help=FULL)
    return click.option("--find-lr", "find_lr", flag_value="quick", help=QUICK)(full(function))


def find_rate(net: nn.Module, task: Task, **options: Any) -> Table:
    """The rates that were tried, and the best of them, which is said on standard error."""
    from steelyard.learn.rate import find_lr

    found = find_lr(net, task, **options)
    click.echo(f"learning rate {found.meta['rate']:.3g}, found by {len(found.rows)} short runs", err=True)
    return found


def tell_of_start(run: Run) -> None:
    """Say on standard error if the weights that a run ends with are those that it began with."""
    if run.kept_epoch == 0:
        text = (
            "no epoch lowered the validation loss: the weights are those of the start; lower --rate, or use --find-lr"
        )
        click.echo(text, err=True)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        text = f"--class-weights: {word!r} is no number; expected balanced, or a number for each class: 1,1,5"
        raise click.UsageError(text, click.get_current_context()) from None

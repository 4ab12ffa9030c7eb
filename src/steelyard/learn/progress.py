"""The progress of a run on a terminal; silent in a pipe. Knows nothing of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from steelyard.learn.processes import first
from steelyard.learn.seeding import python_unmoved

with python_unmoved():  # rich draws from Python's generator when it is imported
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from steelyard.learn.run import Run


@contextmanager
def progress_bar(title: str, wanted: bool | Callable[[Run], None]) -> Iterator[Callable[[Run], None] | None]:
    """What to call after each step: the function given, a bar on standard error if that is a terminal, or nothing."""
    if callable(wanted):
        yield wanted
        return
    console = Console(stderr=True)
    if not wanted or not console.is_terminal or not first():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task(title, total=None, state="")
        yield lambda run: bar.update(line, completed=run.done, total=1.0, state=_state(run))


def _state(run: Run) -> str:
    last, epoch = run.log[-1], run.epoch_log[-1]
    headline = epoch[run.task.headline]
    shown = "" if headline is None else f"  {run.task.headline} {headline:.4f}"
    return f"epoch {last['epoch'] + 1}/{run.epochs}  loss {last['loss']:.4f}{shown}"

"""A bar for work that moves bytes: how far, how fast, how long yet. Silent where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def watching() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """What to call when a part of the work begins, with its name and bytes; it returns what to call on the way."""
    import sys

    if not sys.stderr.isatty():
        yield lambda _what, _total: lambda _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    shown = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*shown, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:

        def begin(what: str, total: int) -> Callable[[int], None]:
            line = bar.add_task(what, total=total)
            return lambda count: bar.update(line, advance=count)

        yield begin


@contextmanager
def stating(title: str) -> Iterator[Callable[[str, float], None]]:
    """What to call with what is being done and the share of the time of the whole that is gone."""
    import sys
    import time

    if not sys.stderr.isatty():
        yield lambda _what, _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[yet]}"))
    began = time.monotonic()
    with Progress(*shown, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(title, total=1.0, what="", yet="")
        yield lambda what, done: bar.update(line, completed=done, what=what, yet=yet(time.monotonic() - began, done))


@contextmanager
def warning() -> Iterator[None]:
    """Within the block a warning of ours is a line on standard error, as errors are."""
    import warnings

    from steelyard.errors import ProofWarning

    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ProofWarning):
                click.echo(f"steelyard: {message}", err=True)
            else:
                shown(message, category, *where, **more)

        warnings.simplefilter("always", ProofWarning)
        warnings.showwarning = show
        yield


def yet(gone: float, share: float) -> str:
    """How long it will take from now, where `gone` seconds are a share of the whole; nothing before a fiftieth.

    >>> yet(10, 0.25), yet(60, 0.1), yet(1, 0.01)
    ('30 s left', '9 min left', '')
    """
    if share < 0.02:
        return ""
    left = gone * (1 - share) / share
    if left < 90:
        return f"{left:.0f} s left"
    return f"{left / 60:.0f} min left" if left < 5400 else f"{left / 3600:.1f} h left"

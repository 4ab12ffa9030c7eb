"""A bar for work that moves bytes: how far, how fast, how long yet. Silent where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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

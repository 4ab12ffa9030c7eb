"""``steelyard watch LOG``: what the log of a watched training says, as tables, as a page, or live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from steelyard.cli.options import Output, output, show

if TYPE_CHECKING:
    from steelyard.learn.watch.reading import LogFile


@click.command("watch")
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--table", "name", help="Only this table of the log, whole: faults, steps, norms, values, layers, ...")
@click.option("--tensor", help="Only this tensor of the table.")
@click.option(
    "--parquet", type=click.Path(path_type=Path), metavar="FOLDER", help="Write each table there, as Parquet."
)
@click.option("--live", is_flag=True, help="Show it in a browser on this machine, renewed while it grows.")
@click.option("--port", type=click.IntRange(0, 65535), help="Of the live page. Default: one that is free.")
@output
def verb(
    log: Path,
    name: str | None,
    tensor: str | None,
    parquet: Path | None,
    live: bool,
    port: int | None,
    output: Output,
) -> None:
    """Show what the log of a watched training says: how it goes, and which faults were named in which layer.

    LOG is the SQLite file that sy.watch(..., path=LOG) or steelyard train --watch LOG writes, finished or still
    growing, or a folder of Parquet files that was made of one. The live page ends with Ctrl-C.

    \b
    Example:
      steelyard watch run.sqlite
    """
    from steelyard.learn.watch.reading import read_log

    if tensor is not None and name is None:
        name = "norms"
    if port is not None and not live:
        raise click.UsageError("--port is of the page of --live", click.get_current_context())
    found = read_log(log)
    if parquet is not None:
        found.to_parquet(parquet)
        click.echo(f"wrote {parquet}", err=True)
    if name is not None:
        show(found.table(name, tensor=tensor), output)
        return
    if live:
        _serve(found, port or 0)
        return
    from steelyard.learn.watch.course import Course

    course = Course(found)
    course.update()
    page = None
    if output.html is not None:
        from steelyard.report.watched import page as page_of

        page = page_of(course)
    show([course.summary(), course.faults(), course.tensors(), course.looked()], output, page)


def _serve(log: LogFile, port: int) -> None:
    """Show the live page until Ctrl-C; here nobody trains, and it may take what it needs."""
    from contextlib import suppress

    from steelyard.report.live import serve

    with serve(log, port, share=0.25) as served:
        click.echo(f"live page: {served.url} (Ctrl-C ends it)", err=True)
        with suppress(KeyboardInterrupt):
            served.wait()

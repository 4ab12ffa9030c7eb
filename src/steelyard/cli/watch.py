"""``steelyard watch LOG``: what the log of a watched training says, as tables, as a page, or live."""

from __future__ import annotations

from pathlib import Path

import click

from steelyard.cli.options import Output, output, show


@click.command("watch")
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--table", "name", help="Only this table of the log, whole: faults, steps, norms, values, layers, ...")
@click.option("--tensor", help="Only this tensor of the table.")
@click.option(
    "--parquet", type=click.Path(path_type=Path), metavar="FOLDER", help="Write each table there, as Parquet."
)
@output
def verb(log: Path, name: str | None, tensor: str | None, parquet: Path | None, output: Output) -> None:
    """Show what the log of a watched training says: how it goes, and which faults were named in which layer.

    LOG is the SQLite file that sy.watch(..., path=LOG) writes, finished or still growing, or a folder of Parquet
    files that was made of one.

    \b
    Example:
      steelyard watch run.sqlite
    """
    from steelyard.learn.watch.reading import read_log

    if tensor is not None and name is None:
        name = "norms"
    found = read_log(log)
    if parquet is not None:
        found.to_parquet(parquet)
        click.echo(f"wrote {parquet}", err=True)
    if name is not None:
        show(found.table(name, tensor=tensor), output)
        return
    from steelyard.learn.watch.course import Course

    course = Course(found)
    course.update()
    page = None
    if output.html is not None:
        from steelyard.report.watched import page as page_of

        page = page_of(course)
    show([course.summary(), course.faults(), course.tensors(), course.looked()], output, page)

"""``steelyard claims [ID ...]``: every claim of the field about weights, measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from steelyard.cli.options import Output, output, show
from steelyard.errors import VerdictError

if TYPE_CHECKING:
    from steelyard.claims.run import Progress
    from steelyard.core.table import Table
    from steelyard.report.html import Page


@click.command("claims")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--chapter", "chapters", multiple=True, metavar="LETTER", help="Only this chapter; repeatable.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=2, show_default=True, help="How many claims at a time."
)
@output
def verb(ids: tuple[str, ...], chapters: tuple[str, ...], processes: int, output: Output) -> None:
    """Measure what is said of weights, on real data, and compare each number with its bar.

    Without an ID all claims are measured. The exit status is 1 if one of them fails. Each figure stands beside its
    bar; a figure without one is told for its own sake, and --json has more of them.

    \b
    Example:
      steelyard claims A1 A2
    """
    from steelyard.claims.run import by_claim, run_claims, verdicts

    with _progress() as progress:
        table = run_claims(ids or None, chapters=chapters or None, processes=processes, progress=progress)
    claims, overview = by_claim(table), verdicts(table)
    show([*claims.values(), overview] if output.form == "text" else table, output, _page(claims, overview))
    failed = [row["id"] for row in table.rows if row["verdict"] != "pass"]
    if failed:
        raise VerdictError(f"{len(failed)} of {len(table.rows)} claims failed: {', '.join(map(str, failed))}")


def _page(claims: Mapping[str, Table], overview: Table) -> Page:
    """The verdicts, and a section for each chapter."""
    from steelyard.claims import CHAPTERS
    from steelyard.report.html import Page, Section

    sections = [Section("Verdicts", tables=[overview])]
    for letter, about in CHAPTERS.items():
        tables = [table for name, table in claims.items() if name.startswith(letter)]
        if tables:
            sections.append(Section(f"{letter}: {about}", tables=tables))
    return Page(overview.title[:1].upper() + overview.title[1:], sections)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        line = bar.add_task("measuring", total=None)
        yield lambda done, total, name: bar.update(line, completed=done, total=total, description=f"{name} done")

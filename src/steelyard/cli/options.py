"""What verbs share: the options for output and selection, and the one way to show tables.

Decides how results leave the program. Computes nothing.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from steelyard.cli.entry import explain
from steelyard.core.table import Table
from steelyard.core.where import Where, where
from steelyard.errors import SteelyardError, printable

if TYPE_CHECKING:
    from steelyard.core.packed import Plan
    from steelyard.core.transform import Step
    from steelyard.core.weights import Weights
    from steelyard.report.html import Page

F = TypeVar("F", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite number within bounds: of all options that are numbers, since float() also takes 'nan' and 'inf'."""

    name = "number"

    def _describe_range(self) -> str:
        """For the help; nothing where there are no bounds."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return found


@dataclass(frozen=True)
class Output:
    """How the user wants the tables."""

    form: Literal["text", "json", "csv"] = "text"
    html: Path | None = None


def output(function: F) -> F:
    """Add ``--json``, ``--csv`` and ``--html FILE``; the verb receives them as ``output: Output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per table, each on a line.")
    @click.option("--csv", "as_csv", is_flag=True, help="Print the first table as CSV.")
    @click.option(
        "--html", type=click.Path(path_type=Path), callback=_new_file, help="Write a self-contained page as well."
    )
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, as_csv: bool, html: Path | None, **options: Any) -> Any:
        if as_json and as_csv:
            raise click.UsageError("--json and --csv exclude each other", click.get_current_context())
        form: Literal["text", "json", "csv"] = "json" if as_json else "csv" if as_csv else "text"
        return function(*args, output=Output(form, html), **options)

    return wrapped  # type: ignore[return-value]


def _new_file(ctx: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """A path that can be written to, found out before the work rather than after it."""
    if path is None:
        return None
    if path.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{str(path)!r} would receive a page; name a file ending in .html", ctx, option)
    folder = path.parent
    if path.is_dir():
        raise click.BadParameter(f"{str(path)!r} is a folder; name a file in it", ctx, option)
    if not folder.is_dir():
        raise click.BadParameter(f"there is no folder {str(folder)!r}; make it first", ctx, option)
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"the folder {str(folder)!r} cannot be written to; choose another", ctx, option)
    return path


def where_option(function: F) -> F:
    """Add ``--where GLOB``, repeatable; the verb receives ``where: Where | None``."""
    return click.option(
        "--where",
        metavar="GLOB",
        multiple=True,
        callback=_where,
        help="Only tensors of which a name matches; repeatable, and '!' before a glob excludes.",
    )(function)


def _where(_ctx: click.Context, _option: click.Parameter, globs: tuple[str, ...]) -> Where | None:
    return where(",".join(globs)) if globs else None


def source_and_target(function: F) -> F:
    """Add the arguments SOURCE and TARGET and the flag ``--force``."""
    force = click.option("--force", is_flag=True, help="Replace TARGET if it exists; SOURCE is never replaced.")
    return click.argument("source")(click.argument("target")(force(function)))


def codec_option(default: str | None, about: str) -> Callable[[F], F]:
    """Add ``--codec CALL``; the verb receives a Pack, or None."""
    return click.option("--codec", metavar="CALL", default=default, show_default=True, callback=_pack, help=about)


def plan_option(name: str, about: str) -> Callable[[F], F]:
    """Add an option that takes a codec as a call, such as ``entropy``; the verb receives a Plan, None without it."""
    return click.option(name, metavar="CALL", callback=_plan, help=about)


def by_option(function: F) -> F:
    """Add ``--by FILE``; the verb receives ``by: Weights | None``."""
    return evidence_option("--by", "Evidence from the verb score, of these weights.")(function)


def evidence_option(name: str, text: str) -> Callable[[F], F]:
    """An option that names a file of evidence; the verb receives Weights or None."""
    return click.option(name, metavar="FILE", callback=_by, help=text)


def _plan(_ctx: click.Context, option: click.Parameter, call: str | None) -> Plan:
    if call is None:
        return None
    from steelyard.codecs import CODECS
    from steelyard.core.recipe import Reader, parse_call

    data = parse_call(call)
    for name in _words(data):
        if name in CODECS and not CODECS[name].encodes:  # its settings would be told wrong before
            from steelyard.codecs._blocks import unwritten

            raise unwritten(name)
    return Reader(CODECS, {}).plan(data, option.opts[0])


def _words(data: Any) -> list[str]:
    """The names and texts in the data of a call."""
    if isinstance(data, dict):
        return [word for name, below in data.items() for word in (name, *_words(below))]
    if isinstance(data, (list, tuple)):
        return [word for below in data for word in _words(below)]
    return [data] if isinstance(data, str) else []


def _by(_ctx: click.Context, _option: click.Parameter, path: str | None) -> Weights | None:
    if path is None:
        return None
    from steelyard import formats

    return formats.open(path)


def _pack(ctx: click.Context, option: click.Parameter, call: str | None) -> Step | None:
    if call is None:
        return None
    from steelyard.edit.pack import Pack

    return Pack(_plan(ctx, option, call))


def show(tables: Table | Sequence[Table], output: Output, page: Page | None = None) -> None:
    """Print `tables` as the user wants them, and write the HTML file if one was asked for.

    ``page`` is the page to write; without one, it is made of the tables alone.
    """
    tables = [tables] if isinstance(tables, Table) else list(tables)
    if output.form == "json":
        from steelyard.report.data import json_lines

        click.echo(json_lines(tables), nl=False, color=True)  # data goes out as it is
    elif output.form == "csv":
        from steelyard.report.data import csv_text

        click.echo(csv_text(tables[0]), nl=False, color=True)
    else:
        from steelyard.report.text import text

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        click.echo("\n".join(text(table, width, colour) for table in tables), nl=False)
    if output.html is not None:
        write_page(page or tables, output.html)


def write_page(page: Page | Sequence[Table], path: Path) -> None:
    """Write a page, or one that is made of tables alone, and say so on standard error."""
    from steelyard.report.html import Page, write_html

    write_html(page if isinstance(page, Page) else Page.of(page), path)
    click.echo(f"wrote {path}", err=True)


def each(sources: Sequence[str], work: Callable[[str], None]) -> int:
    """Do `work` for each source in turn, and the exit status of all.

    Of several, one that fails is a line on standard error, and the next one follows; an only one raises.
    """
    status = 0
    for source in sources:
        try:
            work(source)
        except BrokenPipeError:
            raise
        except (SteelyardError, OSError, MemoryError) as error:
            if len(sources) == 1:
                raise
            failed, line = explain(error)
            named = line if printable(source) in line else f"{printable(source)}: {line}"
            click.echo(f"steelyard: {named}", err=True)
            status = max(status, failed)
    return status

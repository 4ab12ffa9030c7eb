"""``steelyard inspect SOURCE...``: what is in each file, from its header."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from steelyard.cli.options import Output, each, output, show, where_option, write_page
from steelyard.cli.progress import watching
from steelyard.core.table import Table
from steelyard.core.where import Where

if TYPE_CHECKING:
    from steelyard.core.weights import Weights
    from steelyard.report.html import Page

LONGEST = 200  # characters of a value of the metadata that are shown as text


@click.command("inspect")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@where_option
@click.option(
    "--sort",
    type=click.Choice(["name", "elements", "bytes", "stored", "dtype"]),
    help="Order of the rows; sizes largest first. Default: as in the file.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    help="One row for each dotted prefix of so many components; 0: for each tensor, however many there are.",
)
@click.option("--stats", is_flag=True, help="Read the values: exact statistics, quantiles, rows and columns of each.")
@click.option("--health", is_flag=True, help="Read the values: what is wrong with them, the worst first.")
@click.option("--spectra", is_flag=True, help="Read the values: singular values of every matrix, in figures.")
@output
def verb(
    sources: tuple[str, ...],
    where: Where | None,
    sort: str | None,
    depth: int | None,
    stats: bool,
    health: bool,
    spectra: bool,
    output: Output,
) -> None:
    """Show what is in SOURCE: tensors, types, roles, layers, architecture, metadata and totals.

    Only the header is read, unless --stats, --health or --spectra ask for values. Bytes are those of the plain
    values; stored bytes are those of tensors in the file, and file is the size of all of it. As text, more than 200
    tensors are shown with repeated layers in one row; --json and --csv have a row for each. Of several sources, each is
    shown (as CSV in one table, with a column for the source); one that cannot be read is named, and the next one
    follows.

    \b
    Example:
      steelyard inspect model.safetensors --depth 1 --sort stored
      steelyard inspect model.safetensors --stats --where "*.weight"
      steelyard inspect model.safetensors --health
    """
    from steelyard import formats
    from steelyard.explain.inventory import summary

    pages: list[Table] = []
    firsts: dict[str, Table] = {}  # of several sources as CSV: one header, and a column that says the source

    def one(source: str) -> None:
        opened = formats.open(source)
        weights, file = opened.choose(where), formats.nbytes(opened, source)
        if stats or health or spectra:
            tables = [*_of_values(weights, stats, health, spectra), summary(weights, file=file)]
        else:
            tables = _of_header(weights, sort, depth, output, file)
        if len(sources) > 1:
            tables = [replace(table, meta={"source": source, **table.meta}) for table in tables]
        pages.extend(tables)
        if output.form == "csv" and len(sources) > 1:
            firsts[source] = tables[0]
            return
        shown = [table for table in tables if table.title != "histogram" or output.form == "json"]
        show(shown, replace(output, html=None))

    status = each(sources, one)
    if firsts:
        show(Table.joined(firsts, "source"), replace(output, html=None))
    if output.html is not None and pages:
        write_page(_page(pages), output.html)
    click.get_current_context().exit(status)


def _of_header(weights: Weights, sort: str | None, depth: int | None, output: Output, file: int | None) -> list[Table]:
    from steelyard.explain.architecture import architecture, metadata
    from steelyard.explain.inventory import inventory, kinds, summary
    from steelyard.explain.repeats import ROWS, repeats
    from steelyard.explain.roles import layers, roles, roles_of
    from steelyard.explain.wanted import wanted

    said = roles_of(weights)
    if depth is None and output.form == "text" and len(weights) > ROWS:
        first = repeats(weights, sort=sort)
    else:
        first = inventory(weights, depth=depth or None, sort=sort)
    tables = [first, kinds(weights), roles(weights, said), layers(weights), architecture(weights, said)]
    tables += [
        metadata(weights, LONGEST if output.form == "text" else None),
        summary(weights, file=file),
        wanted(weights),
    ]
    return [table for table in tables if table is not None]


def _page(tables: list[Table]) -> Page:
    """The tables, and a picture in the place of each histogram."""
    from steelyard.explain.statistics import distributions
    from steelyard.report.html import Page, Section
    from steelyard.report.plots import Histogram

    sections = list(Page.of(tables).sections)
    for i, table in enumerate(tables):
        if table.title == "histogram":
            bars = distributions(table)
            title = "Distribution of the values"
            picture = Histogram(bars, "from", "to", "share per unit", facet="name", title=title)
            text = "The values of the largest tensors, from minimum to maximum."
            sections[i] = Section("Distributions", text, pictures=[picture] if bars.rows else [])
    return Page(Page.of(tables).title, sections)


def _of_values(weights: Weights, stats: bool, health: bool, spectra: bool) -> list[Table]:
    """The histogram is data or a picture, not text: it has 65 numbers for each tensor."""
    from steelyard.explain.health import health as findings
    from steelyard.explain.statistics import bytes_to_read, statistics

    found: list[Table] = []
    with watching() as begin:
        if stats:
            found += statistics(weights, progress=begin("statistics", bytes_to_read(weights)))
        if health:
            found.append(findings(weights, progress=begin("health", bytes_to_read(weights))))
        if spectra:
            from steelyard.explain.spectra import spectra as singular

            found.append(singular(weights, progress=begin("singular values", weights.nbytes)))
    return found

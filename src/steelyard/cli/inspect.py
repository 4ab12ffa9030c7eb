"""``steelyard inspect SOURCE``: what is in a file, from its header."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, output, show, where_option
from steelyard.core.where import Where


@click.command("inspect")
@click.argument("source")
@where_option
@click.option(
    "--sort",
    type=click.Choice(["name", "elements", "bytes", "stored", "dtype"]),
    help="Order of the rows; sizes largest first. Default: as in the file.",
)
@click.option("--depth", type=click.IntRange(min=1), help="One row for each dotted prefix of so many components.")
@click.option(
    "--spectra", "wanted", is_flag=True, help="Singular values of every matrix, in figures; reads the values."
)
@output
def verb(source: str, where: Where | None, sort: str | None, depth: int | None, wanted: bool, output: Output) -> None:
    """Show what is in SOURCE: its tensors, their types and sizes, and the totals.

    Only the header is read, unless values are asked for. Bytes are those of the plain values; stored bytes are
    those in the file.

    \b
    Example:
      steelyard inspect model.safetensors --depth 1 --sort stored
    """
    from steelyard import formats
    from steelyard.explain.inventory import inventory, kinds, summary

    weights = formats.open(source)
    tables = [inventory(weights, where, depth, sort), kinds(weights, where), summary(weights, where)]
    if wanted:
        from steelyard.explain.spectra import spectra

        tables.append(spectra(weights, where))
    show(tables, output)

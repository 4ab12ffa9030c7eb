"""``steelyard diff A B``: what changed between two files of weights; which of several is nearest to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from steelyard.cli.options import Output, output, show, where_option
from steelyard.cli.progress import watching
from steelyard.core.table import Table
from steelyard.core.where import Where
from steelyard.errors import FormatError, VerdictError

if TYPE_CHECKING:
    from steelyard.report.html import Page

_RANK = (
    "The numerical rank, up to 64, of b - a of each floating-point matrix with the verdict 'values'; no other verdict "
    "has one. Reads them thrice."
)
_DRAWN = 200  # layers of which a picture can be read


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("others", metavar="B...", nargs=-1, required=True)
@where_option
@click.option("--all", "everything", is_flag=True, help="List identical tensors, too.")
@click.option("--rank", is_flag=True, help=_RANK)
@click.option("--ancestor", is_flag=True, help="Rank B... by how likely A descends from each.")
@click.option("--exit-code", is_flag=True, help="Exit with status 1 if anything differs but files and order.")
@output
def verb(
    first: str,
    others: tuple[str, ...],
    where: Where | None,
    everything: bool,
    rank: bool,
    ancestor: bool,
    exit_code: bool,
    output: Output,
) -> None:
    """Show which tensors of A changed in B, how, and by how much.

    Names, dtypes, codecs, order, files and formats may differ: the values are compared. Every tensor gets a verdict,
    such as renamed, same values (another dtype, without loss), rounded (with loss), permuted rows, transposed, joined
    (q, k and v in one), scaled, sign flips or values. With more than one B, each is compared with A, and the nearest
    comes first.

    \b
    Example:
      steelyard diff model.safetensors trained.safetensors
      steelyard diff model.safetensors trained.safetensors model.safetensors --ancestor
    """
    if ancestor or len(others) > 1:
        same = _several(first, others, where, ancestor, output)
    else:
        same = _two(first, others[0], where, everything, rank, output)
    if exit_code and not same:
        raise VerdictError(f"{first} and {', '.join(others)} differ")


def _two(first: str, second: str, where: Where | None, everything: bool, rank: bool, output: Output) -> bool:
    from steelyard import formats
    from steelyard.explain.diff import difference

    a, b = formats.open(first), formats.open(second)
    with watching() as begin:
        found = difference(a, b, where, rank, begin("comparing", b.nbytes))
    tables = found.tables(everything)
    show(tables, output, None if output.html is None else _page(tables, first, second))
    if found.unreadable:
        one = found.unreadable[0]
        raise FormatError(f"{len(found.unreadable)} of the tensors could not be read: {'; '.join(one.notes)}")
    return found.same


def _several(first: str, others: Sequence[str], where: Where | None, ancestor: bool, output: Output) -> bool:
    from steelyard import formats
    from steelyard.explain.diff.lineage import ancestor as find_ancestor
    from steelyard.explain.diff.lineage import ranking

    opened = {name: formats.open(name) for name in others}
    table = (
        (find_ancestor(opened, formats.open(first), where)) if ancestor else ranking(formats.open(first), opened, where)
    )
    show(table, output)
    return all(row["ancestor"] == "the same" for row in table.rows)


def _page(tables: Sequence[Table], first: str, second: str) -> Page:
    """The summary, a picture of how far each layer moved, and the tables."""
    from steelyard.report.html import Page, Section
    from steelyard.report.plots import Bars

    *listed, last = tables
    layers = [t for t in listed if t.title == "layers" and len(t.rows) <= _DRAWN]
    text = "The relative change ||b - a|| / ||a|| of each layer, over its tensors whose values changed."
    drawn = [
        Section(
            "Change by layer", text, tables=[t], pictures=[Bars(t, "layer", ("relative",), "Relative change by layer")]
        )
        for t in layers
    ]
    others = [t for t in listed if t not in layers]
    sections = [Section("Summary", tables=[last]), *drawn, *(Section(t.title.capitalize(), tables=[t]) for t in others)]
    return Page(f"{first} and {second}", sections)

"""``steelyard diff A B``: what changed between two files of weights."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, output, show, where_option
from steelyard.core.where import Where
from steelyard.errors import FormatError, VerdictError


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@where_option
@click.option("--all", "everything", is_flag=True, help="List identical tensors, too.")
@click.option("--rank", is_flag=True, help="The numerical rank of every difference of matrices; reads them thrice.")
@click.option("--exit-code", is_flag=True, help="Exit with status 1 if anything differs but files and order.")
@output
def verb(
    first: str, second: str, where: Where | None, everything: bool, rank: bool, exit_code: bool, output: Output
) -> None:
    """Show which tensors of A changed in B, how, and by how much.

    Names, dtypes, codecs, order, files and formats may differ: the values are compared. Every tensor gets a verdict,
    such as renamed, same values (another dtype), permuted rows, transposed, scaled, sign flips or values.

    \b
    Example:
      steelyard diff model.safetensors trained.safetensors
    """
    from steelyard import formats
    from steelyard.explain.diff import difference

    found = difference(formats.open(first), formats.open(second), where, rank)
    show(found.tables(everything), output)
    if found.unreadable:
        one = found.unreadable[0]
        raise FormatError(f"{len(found.unreadable)} of the tensors could not be read: {'; '.join(one.notes)}")
    if exit_code and not found.same:
        raise VerdictError(f"{first} and {second} differ")

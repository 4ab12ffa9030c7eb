"""What verbs that rewrite a file share: the bar, the tables, and a line about what nobody would want in the result."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, show
from steelyard.cli.progress import watching
from steelyard.core.table import Table
from steelyard.core.transform import Step
from steelyard.core.where import Where
from steelyard.errors import quoted


def rewritten(
    source: str, target: str, step: Step, where: Where | None, force: bool, output: Output, *, resumed: bool = False
) -> None:
    """Apply `step` to what `where` chooses of `source`, write `target`, and show the account of it."""
    from steelyard.explain.rewrite import rewrite

    with watching() as watch:
        tables = rewrite(source, target, step, where, force, resumed=resumed, watch=watch)
    show(tables, output)
    _tell_odd(tables[0])


def _tell_odd(tensors: Table) -> None:
    """Say on standard error which values that were copied are no numbers, and where nothing changed or is left."""
    odd = [(row["name"], row["not finite"]) for row in tensors.rows if row.get("not finite")]
    if odd:
        name, first = odd[0]
        what = "1 tensor that was copied has" if len(odd) == 1 else f"{len(odd)} tensors that were copied have"
        text = f"{what} NaN or infinite values, the first in {quoted(str(name))} ({first})"
        click.echo(f"{text}; steelyard inspect --health says more", err=True)
    changed = [row for row in tensors.rows if row["error"]]
    if not changed and all(row["before"] == row["after"] for row in tensors.rows):
        click.echo("nothing changed: what was chosen would not become smaller, and all was copied", err=True)
    if changed and all(row["zeros"] == 1 for row in changed):
        click.echo("nothing is left of what was chosen: every weight became 0", err=True)

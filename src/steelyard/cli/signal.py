"""``steelyard signal TASK [WEIGHTS]``: the scale of every layer, forwards and backwards, with cause and cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from steelyard.cli.models import loaded, model_option, task_argument
from steelyard.cli.options import Number, Output, output, show
from steelyard.errors import VerdictError
from steelyard.life.recipe import Named

if TYPE_CHECKING:
    from steelyard.core.table import Table


@click.command("signal")
@task_argument
@click.argument("weights", required=False)
@model_option
@click.option("--start", metavar="SCHEME", help="auto, data, he, xavier, ... Default: as the model is built.")
@click.option("--rate", type=Number(min=0), default=1e-3, show_default=True, help="For the expected steps.")
@output
def verb(
    task: Named, weights: str | None, model: Named | None, seed: int, start: str | None, rate: float, output: Output
) -> None:
    """Follow one training batch of TASK through the model and back, and say of every layer how it fares.

    The weights are those that the model is built with, those of a --start, or those in the file WEIGHTS. The text
    shows the scale against depth; --json, --csv and --html have every number: activations and their gradients, dead
    and saturated units, weights and their gradients, expected steps. The exit status is 1 if the model is not healthy.

    \b
    Example:
      steelyard signal digits --model 'mlp(widths=(64, 64))' --start he
    """
    from steelyard import formats
    from steelyard.explain.overview import signal_of
    from steelyard.learn.start import init_
    from steelyard.learn.task import first_batch

    if weights is not None and start is not None:
        raise click.UsageError(
            "--start draws new weights and WEIGHTS reads them: give one", click.get_current_context()
        )
    made, module = loaded(task, model, seed, None if weights is None else formats.open(weights))
    if start is not None:
        init_(module, start, first_batch(made, "train"), seed=seed)
    table = signal_of(module, made, rate, seed)
    show_signal(table, output)
    if table.meta["verdict"] != "healthy":
        said = f"{table.meta['verdict']}, first at the layer {table.meta['first']!r}"
        raise VerdictError(f"{said}: {table.meta['cause']}; {table.meta['cure']}")


def show_signal(table: Table, output: Output) -> None:
    """The picture as text; all numbers as data, and on a page together with the picture."""
    from steelyard.explain.depth import against_depth
    from steelyard.life.page import signal_picture
    from steelyard.report.html import Page, Section

    depth = against_depth(table)
    told = [table.meta[key] for key in ("verdict", "cause", "cure") if table.meta[key]]
    page = Page(
        "Signal through the layers", [Section("Signal", f"{'; '.join(told)}.", [table], [signal_picture(depth)])]
    )
    show(depth if output.form == "text" else table, output, page)

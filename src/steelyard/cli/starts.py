"""``steelyard starts TASK``: which start of a model will train best, by one batch or by short training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from steelyard.cli.models import model_option, task_argument
from steelyard.cli.options import Output, output, show
from steelyard.life.recipe import Named

if TYPE_CHECKING:
    from steelyard.core.table import Table


@click.command("starts")
@task_argument
@model_option
@click.option(
    "--start", "schemes", metavar="SCHEME", multiple=True, help="One to compare, repeatable: he, data, 'as given', ..."
)
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True, help="Compare an mlp of so many; repeatable.")
@click.option("--width", type=click.IntRange(1), default=64, show_default=True, help="Of the layers with --depth.")
@click.option("--train", type=click.IntRange(0), default=0, show_default=True, help="Rank by training, so many steps.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How often each start is drawn.")
@click.option("--examples", type=click.IntRange(8), default=64, show_default=True, help="Samples the score is made of.")
@output
def verb(
    task: Named,
    model: Named | None,
    seed: int,
    schemes: tuple[str, ...],
    depths: tuple[int, ...],
    width: int,
    train: int,
    seeds: int,
    examples: int,
    output: Output,
) -> None:
    """Rank the starts of a model for TASK, the best first, and say why.

    The score, between 0 and 1, is found on one training batch before anything is trained: what the samples would teach
    each other, and how steady signal and gradient keep their scales. With --train each start is trained for so many
    steps, and the rank is that of the metric on the validation split. Without --start these are compared: as given,
    default (torch's own), xavier, he, lecun, orthogonal, data and auto. The text shows a bar for each start; --json,
    --csv and --html have every number.

    \b
    Example:
      steelyard starts breast-cancer --depth 2 --depth 20 --start default --start he --start auto --seeds 1
    """
    from steelyard.explain.starts import SCHEMES, compare_starts
    from steelyard.learn.models import model as make_model
    from steelyard.life.record import make_task

    if depths and model is not None:
        raise click.UsageError("--depth builds an mlp of that depth: leave --model out", click.get_current_context())
    made = make_task(task, model, seed)
    interface = made.interface
    if depths and interface is None:
        raise click.UsageError("the task does not say its interface, so --depth cannot build a model for it",
                               click.get_current_context())  # fmt: skip
    table = compare_starts(
        made,
        schemes or (*SCHEMES, "auto"),
        depths or None,
        model=(lambda depth: make_model("mlp", interface, widths=(width,) * depth)) if depths else None,
        examples=examples,
        seeds=seeds,
        seed=seed,
        train=train,
    )
    show_starts(table, output)


def show_starts(table: Table, output: Output) -> None:
    """The bars as text; all numbers as data, and on a page together with the picture."""
    from steelyard.explain.bars import in_bars
    from steelyard.life.page import starts_picture
    from steelyard.report.html import Page, Section

    best = table.meta["best"]
    told = best if isinstance(best, str) else "; ".join(f"{start} at depth {depth}" for depth, start in best.items())
    page = Page("Starts compared", [Section("Starts", f"The best: {told}.", [table], [starts_picture(table)])])
    show(in_bars(table) if output.form == "text" else table, output, page)

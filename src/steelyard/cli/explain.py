"""``steelyard explain TASK WEIGHTS``: what trained weights mean."""

from __future__ import annotations

import click

from steelyard.cli.models import loaded, model_option, task_argument
from steelyard.cli.options import Output, output, show
from steelyard.cli.signal import show_signal
from steelyard.life.recipe import Named


@click.command("explain")
@task_argument
@click.argument("weights")
@model_option
@click.option(
    "--what",
    type=click.Choice(["coefficients", "filters", "contributions", "signal"]),
    default="coefficients",
    show_default=True,
    help="Linear weights, first filters, the sum behind one output, or the scale of every layer.",
)
@click.option("--layer", help="The name of the layer. Default: the last linear one; the first for filters.")
@click.option("--example", type=click.IntRange(min=0), default=0, help="For contributions: which test example.")
@output
def verb(
    task: Named,
    weights: str,
    model: Named | None,
    seed: int,
    what: str,
    layer: str | None,
    example: int,
    output: Output,
) -> None:
    """Say what the weights in the file WEIGHTS mean for TASK, and check it by removal on held-out examples.

    Large weights count for an output, negative ones against it, those near zero hardly at all; the effect
    corrects a weight for the scale of its input.

    \b
    Example:
      steelyard explain breast-cancer trained.safetensors
    """
    from steelyard import formats
    from steelyard.explain.overview import explain

    made, module = loaded(task, model, seed, formats.open(weights))
    if what == "signal":
        show_signal(*explain(module, made, what), output)
        return
    show(explain(module, made, what, layer, example), output)

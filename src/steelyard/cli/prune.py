"""``steelyard prune SOURCE TARGET``: the smallest weights become zero, and the zeros are stored cheaply."""

from __future__ import annotations

import click

from steelyard.cli.options import Number, Output, codec_option, output, show, source_and_target, where_option
from steelyard.cli.progress import watching
from steelyard.core.transform import Step, on
from steelyard.core.where import Where
from steelyard.core.where import where as choose

_HELD = "smallest(bitmask(mask=entropy, values=entropy), delta(gaps=entropy, values=entropy), plain)"


@click.command("prune")
@source_and_target
@click.option("--fraction", type=Number(), required=True, help="How many of the weights become zero: 0 to 1.")
@click.option(
    "--scope",
    type=click.Choice(["global", "tensor"]),
    default="global",
    show_default=True,
    help="Rank the weights of all tensors together, or of each by itself.",
)
@codec_option(_HELD, "How to hold the pruned tensors.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    fraction: float,
    scope: str,
    codec: Step,
    where: Where | None,
    output: Output,
) -> None:
    """Set the weights of SOURCE with the least magnitude to zero, and write TARGET.

    Matrices and filters are pruned; biases and other vectors are copied.

    \b
    Example:
      steelyard prune model.safetensors pruned.safetensors --fraction 0.9
    """
    from steelyard.edit.prune import Prune
    from steelyard.explain.rewrite import rewrite

    step = on(choose(kind="float", min_ndim=2), Prune(fraction, scope), codec)  # type: ignore[arg-type]
    with watching() as watch:
        tables = rewrite(source, target, step, where, force, watch=watch)
    show(tables, output)

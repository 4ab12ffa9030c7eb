"""``steelyard quantize SOURCE TARGET``: weights rounded to uniform levels of few bits."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, output, show, source_and_target, where_option
from steelyard.cli.progress import watching
from steelyard.core.where import Where


@click.command("quantize")
@source_and_target
@click.option("--bits", type=click.IntRange(1, 8), default=8, show_default=True, help="Bits for each weight.")
@click.option("--axis", type=int, help="A scale for each index along this axis; 0 is each output channel.")
@click.option("--group", type=click.IntRange(min=1), help="A scale for so many consecutive elements of the last axis.")
@click.option("--asymmetric", is_flag=True, help="Levels from the least to the greatest weight, with a zero point.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    bits: int,
    axis: int | None,
    group: int | None,
    asymmetric: bool,
    where: Where | None,
    output: Output,
) -> None:
    """Round the weights of SOURCE to 2^bits uniform levels, and write TARGET.

    Matrices and filters are quantized; biases and other vectors are copied.

    \b
    Example:
      steelyard quantize model.safetensors int4.safetensors --bits 4 --axis 0
    """
    from steelyard.edit.quantize import Quantize
    from steelyard.explain.rewrite import rewrite

    step = Quantize(bits=bits, symmetric=not asymmetric, axis=axis, group=group)
    with watching() as watch:
        tables = rewrite(source, target, step, where, force, watch=watch)
    show(tables, output)

"""``steelyard share SOURCE TARGET``: few distinct values for each tensor, a codebook and indices into it."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, by_option, codec_option, output, source_and_target, where_option
from steelyard.cli.rewriting import rewritten
from steelyard.core.transform import Step, chain, on
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.core.where import where as choose

# 65,536 is the bound of the palette: it holds whatever sharing left exactly, and stores only the values in use.
_HELD = (
    "smallest(palette(k=65536, codes=entropy), bitmask(mask=entropy, values=palette(k=65536, codes=entropy)), plain)"
)


@click.command("share")
@source_and_target
@click.option("-k", type=click.IntRange(1, 65_535), default=16, show_default=True, help="Values besides zero.")
@click.option(
    "--scope",
    type=click.Choice(["global", "tensor"]),
    default="tensor",
    show_default=True,
    help="One set of values for all tensors, or one for each.",
)
@by_option
@codec_option(_HELD, "How to hold the shared tensors.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    k: int,
    scope: str,
    by: Weights | None,
    codec: Step,
    where: Where | None,
    output: Output,
) -> None:
    """Move the weights of SOURCE to k shared values with the least squared error, and write TARGET.

    Matrices and filters are shared; biases and other vectors are copied. Zeros stay zero.

    \b
    Example:
      steelyard share model.safetensors shared.safetensors -k 16
      steelyard share model.safetensors weighed.safetensors -k 16 --by fisher.safetensors
    """
    from steelyard.edit.share import Share

    step = chain(Share(k, scope, by=by), on(choose(kind="float", min_ndim=2), codec))  # type: ignore[arg-type]
    rewritten(source, target, step, where, force, output)

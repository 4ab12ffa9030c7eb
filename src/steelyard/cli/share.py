"""``steelyard share SOURCE TARGET``: few distinct values for each tensor, a codebook and indices into it."""

from __future__ import annotations

from typing import Literal

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
_SINGLE = ("scope", "by", "codec")  # options for single values


@click.command("share")
@source_and_target
@click.option("-k", type=click.IntRange(1, 65_535),
              help="Values besides zero; with --width, runs.  [default: 16; with --width 256]")  # fmt: skip
@click.option("--scope", type=click.Choice(["global", "tensor"]),
              help="One set of values for all tensors, or one for each.  [default: tensor]")  # fmt: skip
@click.option("--width", type=click.IntRange(2, 64), metavar="N",
              help="Share runs of N weights along a row instead of single ones: vectors.")  # fmt: skip
@click.option("--product", is_flag=True, help="With --width: a codebook for each place in a row (product codes).")
@by_option
@codec_option(None, "How to hold the shared tensors. Default: the smallest of codebooks with coded indices.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    k: int | None,
    scope: Literal["global", "tensor"] | None,
    width: int | None,
    product: bool,
    by: Weights | None,
    codec: Step | None,
    where: Where | None,
    output: Output,
) -> None:
    """Move the weights of SOURCE to k shared values with the least squared error, and write TARGET.

    Matrices and filters are shared; biases and other vectors are copied, and so is what would not become smaller. Zeros
    stay zero. With --width, runs of weights are shared instead (vector quantization), zeros or not.

    \b
    Example:
      steelyard share model.safetensors shared.safetensors -k 16
      steelyard share model.safetensors weighed.safetensors -k 16 --by fisher.safetensors
      steelyard share model.safetensors vectors.safetensors --width 4 -k 256
    """
    from steelyard.edit.spare import Spare

    given = {"scope": scope, "by": by, "codec": codec}
    if width is None:
        if product:
            raise click.UsageError("--product is for runs: give --width as well", click.get_current_context())
        step = _singles(16 if k is None else k, scope or "tensor", by, codec)
    else:
        for name in _SINGLE:
            if given[name] is not None:
                text = f"--{name} is for single values, not for the runs of --width"
                raise click.UsageError(text, click.get_current_context())
        step = _runs(256 if k is None else k, width, product)
    rewritten(source, target, Spare(step), where, force, output)


def _singles(k: int, scope: Literal["global", "tensor"], by: Weights | None, codec: Step | None) -> Step:
    """Single values, one codebook for each tensor."""
    from steelyard.codecs import CODECS
    from steelyard.core.recipe import Reader, parse_call
    from steelyard.edit.pack import Pack
    from steelyard.edit.share import Share

    held = codec or Pack(Reader(CODECS, {}).plan(parse_call(_HELD)))
    return chain(Share(k, scope, by=by), on(choose(kind="float", min_ndim=2), held))


def _runs(k: int, width: int, product: bool) -> Step:
    """Runs of weights, by vectors."""
    from steelyard.codecs.bits import Bits
    from steelyard.codecs.entropy import Entropy
    from steelyard.codecs.vectors import Vectors
    from steelyard.core.packed import nest, smallest
    from steelyard.edit.encode import Encode

    return Encode(nest(Vectors(k, width, product), codes=smallest(Entropy(), Bits())))

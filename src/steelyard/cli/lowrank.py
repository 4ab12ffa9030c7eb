"""``steelyard lowrank SOURCE TARGET``: matrices as products of two thin ones."""

from __future__ import annotations

import click

from steelyard.cli.options import Number, Output, by_option, output, plan_option, source_and_target, where_option
from steelyard.cli.rewriting import rewritten
from steelyard.core.packed import Plan
from steelyard.core.weights import Weights
from steelyard.core.where import Where


@click.command("lowrank")
@source_and_target
@click.option("--rank", type=click.IntRange(min=1), help="Of every product.")
@click.option("--keep", type=Number(), metavar="SHARE", help="The share of its bytes that each matrix may take.")
@click.option("--error", type=Number(), metavar="SHARE", help="The share of its squares that each matrix may lose.")
@by_option
@plan_option("--factors", "How the factors are held, such as affine(bits=8, group=64). Default: plain.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    rank: int | None,
    keep: float | None,
    error: float | None,
    by: Weights | None,
    factors: Plan,
    where: Where | None,
    output: Output,
) -> None:
    """Hold the matrices of SOURCE as products of two thin ones with the least error, and write TARGET.

    With --by a file of score --kind hessian the error is that of the outputs. A matrix whose factors would take no
    fewer elements stays as it is, and so do vectors.

    \b
    Example:
      steelyard lowrank model.safetensors thin.safetensors --keep 0.5
      steelyard lowrank model.safetensors fitted.safetensors --error 0.01 --by evidence.safetensors
    """
    from steelyard.edit.lowrank import Factorize
    from steelyard.edit.spare import Spare

    given = [f"--{name}" for name, x in (("rank", rank), ("keep", keep), ("error", error)) if x is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        text = f"give one of --rank, --keep and --error, how much of each matrix stays: got {found}"
        raise click.UsageError(text, click.get_current_context())
    step = Factorize(rank, keep, error, by=by, left=factors, right=factors)
    rewritten(source, target, Spare(step), where, force, output)

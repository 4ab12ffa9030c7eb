"""``steelyard score TASK WEIGHTS TARGET``: what data say about weights, as a file by which other verbs choose."""

from __future__ import annotations

import click

from steelyard.cli.models import loaded, model_option, target_argument, task_argument
from steelyard.cli.options import Output, output, show, where_option
from steelyard.core.where import Where
from steelyard.life.recipe import Named

KINDS = ("hessian", "norms", "moments", "fisher", "gradient", "taylor", "kronecker")


@click.command("score")
@task_argument
@click.argument("weights")
@target_argument
@model_option
@click.option("--kind", type=click.Choice(KINDS), default="hessian", show_default=True, help="What is measured.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="train", show_default=True,
              help="Of the data of TASK.")  # fmt: skip
@click.option(
    "--batches", type=click.IntRange(min=1), help="At most so many. Default: the whole split; 32 for kronecker."
)
@click.option("--precision", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
              help="Of the sums.")  # fmt: skip
@where_option
@output
def verb(
    task: Named,
    weights: str,
    target: str,
    model: Named | None,
    seed: int,
    kind: str,
    split: str,
    batches: int | None,
    precision: str,
    where: Where | None,
    output: Output,
) -> None:
    """Measure what the data of TASK say about the weights in the file WEIGHTS, and write that evidence to TARGET.

    Of the inputs of each weight matrix: their norms, their moments, or the products of all pairs (hessian). Of the
    loss: the mean gradient, its mean square (fisher), or the squared change of the loss without the weight (taylor).
    Of the outputs: what errors in pairs of rows and of columns do to them (kronecker, for quantize --method entropy).
    quantize, prune, share and lowrank take the file as --by, and refuse it for other weights.

    \b
    Example:
      steelyard train digits weights.safetensors --epochs 5
      steelyard score digits weights.safetensors hessian.safetensors --kind hessian
    """
    from steelyard import formats
    from steelyard.explain.inventory import inventory
    from steelyard.learn.evidence import score
    from steelyard.shrinking.sensitivity import BATCHES, has_classes, sensitivity

    if kind == "kronecker" and (where is not None or precision != "float32"):
        raise click.UsageError("--kind kronecker is of all weights, in float32: leave out --where and --precision")
    made, module = loaded(task, model, seed, formats.open(weights))
    if kind == "kronecker":
        served, classes = made.batches(split, 0), has_classes(module, made)  # type: ignore[arg-type]
        found = sensitivity(module, served, classes=classes, seed=seed, most=batches or BATCHES)
    else:
        found = score(module, made, kind, where=where, split=split, batches=batches, precision=precision)  # type: ignore[arg-type]
    formats.write(found, target)
    show(inventory(formats.open(target)), output)

"""``steelyard shrink TASK WEIGHTS TARGET``: the smallest file within a tolerance, with proof."""

from __future__ import annotations

from typing import Literal

import click

from steelyard.cli.models import loaded, model_option, target_argument, task_argument
from steelyard.cli.options import Number, Output, output, show
from steelyard.cli.progress import stating
from steelyard.life.recipe import Named


@click.command("shrink")
@task_argument
@click.argument("weights")
@target_argument
@model_option
@click.option("--aim", type=click.Choice(["file", "latency", "memory"]), default="file", show_default=True,
              help="What is to be least: the bytes of a file of weights, or the time or the memory of an ONNX file "
                   "that runs.")  # fmt: skip
@click.option("--tolerance", type=Number(), default=0.01, show_default=True,
              help="How much worse the metric may be in truth, in its unit: 0.01 is a point of accuracy.")  # fmt: skip
@click.option("--confidence", type=Number(), default=0.95, show_default=True, help="Of the promise that it is so.")
@click.option("--epochs", type=click.IntRange(min=0), default=30, show_default=True,
              help="Of training for size, after rounding; a third as many after each narrowing; 0: none.")  # fmt: skip
@click.option("--checkpoint", metavar="FOLDER",
              help="Keep what is found here, for a search that was broken off or has another tolerance.")  # fmt: skip
@output
def verb(
    task: Named,
    weights: str,
    target: str,
    model: Named | None,
    seed: int,
    aim: Literal["file", "latency", "memory"],
    tolerance: float,
    confidence: float,
    epochs: int,
    checkpoint: str | None,
    output: Output,
) -> None:
    """Write TARGET, the smallest file of WEIGHTS that keeps the metric of TASK within the tolerance, and prove it.

    With --aim latency or memory TARGET is an ONNX file that runs faster, or in less memory, than the model in
    float32 in ONNX Runtime on this processor.

    The validation examples of TASK choose; its test examples prove, and nothing else looks at them. The file is
    re-read by another process, compared bit for bit and measured before it gets its name. If no candidate can be
    proven the exit status is 1, the best honest alternative is named, and nothing is written.

    \b
    Example:
      steelyard train breast-cancer weights.safetensors --model mlp --epochs 5
      steelyard shrink breast-cancer weights.safetensors small.safetensors --model mlp --tolerance 0.1 --epochs 0
    """
    from steelyard import formats
    from steelyard.shrinking.page import page
    from steelyard.shrinking.within import shrink

    made, module = loaded(task, model, seed, formats.open(weights))
    try:
        with stating("shrinking") as say:
            found = shrink(module, made, target, aim=aim, tolerance=tolerance, confidence=confidence, epochs=epochs,
                           seed=seed, checkpoint=checkpoint, say=say)  # fmt: skip
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_interrupted(checkpoint)) from interrupt
    tables = [found.proof, found.why, found.curve]
    if found.running is not None:
        tables.insert(1, found.running)
    show(tables, output, page(found, target))


def _interrupted(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "interrupted, and nothing is kept: with --checkpoint FOLDER the same command would go on from there"
    return f"interrupted; the same command goes on from what {checkpoint} has"

"""``steelyard shrink [TASK] WEIGHTS TARGET``: the smallest file within a tolerance, with proof, or an error alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import click
from click.core import ParameterSource

from steelyard.cli.models import check_new, loaded, model_option, named, spelled
from steelyard.cli.options import Number, Output, output, show
from steelyard.cli.progress import stating, warning, watching
from steelyard.life.recipe import Named
from steelyard.shrinking.settings import TOLERANCE

_OF_METRICS = ("model", "seed", "aim", "tolerance", "confidence", "epochs", "evaluations", "checkpoint",
               "choose", "most")  # fmt: skip
_OF_SEARCHES = ("aim", "confidence", "epochs", "evaluations")


@click.command("shrink")
@click.argument("given", nargs=-1, required=True, metavar="[TASK] WEIGHTS TARGET")
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
@model_option
@click.option("--aim", type=click.Choice(["file", "latency", "memory"]), default="file", show_default=True,
              help="What is to be least: the bytes of a file of weights, or the time or the memory of an ONNX file "
                   "that runs.")  # fmt: skip
@click.option("--tolerance", type=Number(), default=TOLERANCE, show_default=True,
              help="How much worse the metric may be in truth, in its unit: 0.01 is a point of accuracy.")  # fmt: skip
@click.option("--confidence", type=Number(), default=0.95, show_default=True, help="Of the promise that it is so.")
@click.option("--epochs", type=click.IntRange(min=0), default=30, show_default=True,
              help="Of training for size, after rounding; a third as many after each narrowing; 0: none.")  # fmt: skip
@click.option("--evaluations", type=click.IntRange(min=6), default=12, show_default=True,
              help="Passes over validation or test examples at most, with those of original and file; with training at "
                   "least 7.")  # fmt: skip
@click.option("--checkpoint", metavar="FOLDER",
              help="Keep what is found here, for a search that was broken off or has another tolerance.")  # fmt: skip
@click.option("--choose", is_flag=True,
              help="No new search: the smallest of what --checkpoint has that --tolerance allows.")  # fmt: skip
@click.option("--bytes", "most", type=click.IntRange(min=1), metavar="N",
              help="No new search: of what --checkpoint has, of files of N bytes at most, the safest; within the "
                   "tolerance of the search, if none is given.")  # fmt: skip
@click.option("--error", type=Number(0, 1, min_open=True, max_open=True), metavar="SHARE",
              help="Without TASK: of all weights, relative to their tensor, at most.  [default: 0.1]")  # fmt: skip
@output
def verb(
    given: tuple[str, ...],
    force: bool,
    model: Named | None,
    seed: int,
    aim: Literal["file", "latency", "memory"],
    tolerance: float,
    confidence: float,
    epochs: int,
    evaluations: int,
    checkpoint: str | None,
    choose: bool,
    most: int | None,
    error: float | None,
    output: Output,
) -> None:
    """Write TARGET, the smallest file of WEIGHTS that keeps the metric of TASK within the tolerance, and prove it.

    With --aim latency or memory TARGET is an ONNX file that runs faster, or in less memory, than the model in
    float32 in ONNX Runtime on this processor.

    The validation examples of TASK choose; its test examples prove, and nothing else looks at them. The file is
    re-read by another process, compared bit for bit and measured before it gets its name. If no candidate can be
    proven the exit status is 1, the best honest alternative is named, and nothing is written. The file is smaller, and
    no faster; for that there is --aim.

    With --choose or --bytes another point of the curve is taken from what searches with the same --checkpoint have
    found. The test examples are asked once more then, at a higher confidence, unless they have answered it already.

    Without TASK the weights are shrunk alone, to the --error that they may have, and nothing is said of a metric.
    WEIGHTS may be any file of weights (TARGET: a .safetensors file with packed tensors), a folder of the Hugging
    Face libraries (TARGET: a new folder with its config and tokenizer, too), or ONNX (TARGET: packed tensors, or
    an .onnx file with the rounded weights, which is no smaller, and runs).

    \b
    Example:
      steelyard train breast-cancer weights.safetensors --model mlp --epochs 5
      steelyard shrink breast-cancer weights.safetensors small.safetensors --model mlp --tolerance 0.1 --epochs 0
      steelyard shrink weights.safetensors rounded.safetensors --error 0.05
    """
    chosen = _given(given, error is not None, aim)
    again = choose or most is not None
    weights, target = given[-2:]
    if len(given) == 2:
        _alone(weights, target, 0.1 if error is None else error, force, output)
        return
    check_new(target, weights, force)
    task = named(given[0])
    from steelyard import formats
    from steelyard.shrinking import choosing
    from steelyard.shrinking.page import page
    from steelyard.shrinking.within import shrink

    try:
        made, module = loaded(task, model, seed, formats.open(weights))
        with warning(), stating("shrinking") as say:
            if checkpoint is not None and again:
                within = None if most is not None and "tolerance" not in chosen else tolerance
                found = choosing.choose(module, made, target, checkpoint=checkpoint, tolerance=within, bytes=most,
                                        seed=seed, say=say)  # fmt: skip
            else:
                found = shrink(module, made, target, aim=aim, tolerance=tolerance, confidence=confidence, epochs=epochs,
                               evaluations=evaluations, seed=seed, checkpoint=checkpoint, say=say)  # fmt: skip
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_interrupted(checkpoint)) from interrupt
    tables = [found.proof, found.why, found.curve]
    if found.running is not None:
        tables.insert(1, found.running)
    built = None if model is None else spelled(model)
    show(tables, output, None if output.html is None else page(found, target, weights, built))


def _given(words: Sequence[str], error: bool, aim: str) -> list[str]:
    """The options of a task that were given; raises UsageError for what does not go together."""
    context = click.get_current_context()
    if len(words) not in (2, 3):
        raise click.UsageError(f"expected [TASK] WEIGHTS TARGET, got {len(words)} of them", context)
    named = [name for name in _OF_METRICS if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(words) == 2 and named:
        option = "bytes" if named[0] == "most" else named[0]
        raise click.UsageError(f"--{option} is for a TASK, and none is given: name it before WEIGHTS", context)
    if len(words) == 3 and error:
        raise click.UsageError("--error is for weights without a TASK; --tolerance is for its metric", context)
    if aim != "file" and "evaluations" in named:
        raise click.UsageError(f"--evaluations is for --aim file: for {aim} every file that runs is measured", context)
    if "choose" not in named and "most" not in named:
        return named
    if "checkpoint" not in named:
        raise click.UsageError("--choose and --bytes take what a search has left in its --checkpoint FOLDER", context)
    if wrong := [name for name in _OF_SEARCHES if name in named]:
        raise click.UsageError(f"--{wrong[0]} is for a search; --choose and --bytes take what one has found", context)
    return named


def _interrupted(checkpoint: str | None) -> str:
    if checkpoint is not None and not (os.path.isdir(checkpoint) and os.listdir(checkpoint)):
        return f"interrupted before anything was kept in {checkpoint}: the same command starts anew"
    if checkpoint is None:
        return "interrupted, and nothing is kept: with --checkpoint FOLDER the same command would go on from there"
    return f"interrupted; the same command goes on from what {checkpoint} has"


def _alone(weights: str, target: str, error: float, force: bool, output: Output) -> None:
    from steelyard.shrinking.alone import shrink_weights
    from steelyard.shrinking.page_alone import page_alone

    try:
        with watching() as watch:
            found = shrink_weights(weights, target, error=error, force=force, watch=watch)
    except KeyboardInterrupt as interrupt:
        again = "interrupted; the same command goes on from the tensors that are done"
        raise KeyboardInterrupt(again) from interrupt
    page = None if output.html is None else page_alone(found, target, weights)
    show([found.summary, found.why], output, page)

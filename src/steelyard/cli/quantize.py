"""``steelyard quantize SOURCE TARGET``: weights rounded to uniform levels of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from steelyard.cli.options import (
    Number,
    Output,
    by_option,
    evidence_option,
    output,
    plan_option,
    source_and_target,
    where_option,
)
from steelyard.cli.rewriting import rewritten
from steelyard.core.packed import Plan
from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.core.where import Where

_ONLY = {  # options that not every method knows -> those that do
    "grid": ("nearest",),
    "axis": ("nearest",),
    "group": ("nearest", "gptq", "awq", "adaround", "hqq"),
    "error": ("nearest",),
    "asymmetric": ("nearest", "gptq", "adaround"),
    "step": ("gptq",),
    "by": ("nearest", "gptq", "awq", "adaround", "entropy"),
    "codes": ("nearest", "gptq", "awq", "adaround", "hqq"),
    "fisher": ("entropy",),
    "states": ("entropy",),
    "importance": ("entropy",),
    "damping": ("entropy",),
}


_GRIDS: dict[str, tuple[Any, int | None, Any]] = {  # levels, elements that share a scale, and how scales are held
    "nf4": ("nf4", 64, "float32"),
    "fp8": ("e4m3", None, "float32"),
    "mxfp4": ("e2m1", 32, "e8m0"),
    "mxfp6": ("e2m3", 32, "e8m0"),
    "mxfp8": ("e4m3", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}


@click.command("quantize")
@source_and_target
@click.option("--method", type=click.Choice(["nearest", "gptq", "awq", "adaround", "hqq", "entropy"]),
              default="nearest", show_default=True, help="nearest, hqq and entropy need no data; gptq, awq and "
              "adaround need --by, a file of score --kind hessian, by which entropy is best, too. awq rounds matrices "
              "alone: convolutions stay as they are.")  # fmt: skip
@click.option("--bits", type=Number(), default=8, show_default=True,
              help="Bits for each weight, 1 to 8; entropy: the mean over all, up to 24, such as 3.5.")  # fmt: skip
@click.option("--grid", type=click.Choice(list(_GRIDS)), help="nearest: levels of a small float in place of --bits "
              "uniform ones: nf4 and fp8 with a scale for each --group (default 64; fp8: for each tensor), mxfp4, "
              "mxfp6, mxfp8 and nvfp4 with groups of their own.")  # fmt: skip
@click.option("--axis", type=int, help="nearest: a scale for each index along this axis; 0 is each output channel.")
@click.option(
    "--group",
    type=click.IntRange(min=1),
    help="A scale for so many consecutive elements of the last axis, or for a shorter row.",
)
@click.option("--asymmetric", is_flag=True, help="Levels between two ends, with a zero point; awq and hqq always do.")
@click.option("--error", type=Number(), metavar="P", help="nearest: scales that lose least, as |error|^P; 2 is usual.")
@click.option("--step", type=Number(), help="gptq: the scale of a row in units of its rms, for --codes entropy.")
@click.option("--states", type=click.Choice(["1", "4", "8", "16", "32", "64"]),
              help="entropy: of the trellis; more take less space and more time.  [default: 8]")  # fmt: skip
@click.option("--importance", metavar="GLOB=NUMBER", multiple=True,
              help="entropy: what squared errors of matching tensors count; 1 for others. Repeatable.")  # fmt: skip
@click.option("--damping", type=Number(0, min_open=True),
              help="entropy: added to the diagonal of what --by says of pairs, as a share of its mean; 1 for what was "
              "measured on random inputs.  [default: 0.03, Hessians 0.01]")  # fmt: skip
@by_option
@evidence_option("--fisher", "entropy: beside --by, evidence from score --kind fisher: what each output matters.")
@plan_option("--codes", "How the numbers of the levels are held: entropy is smaller, and slower to read.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    where: Where | None,
    output: Output,
    **options: Any,
) -> None:
    """Round the weights of SOURCE to 2^bits uniform levels, and write TARGET.

    Matrices and filters are quantized; biases and other vectors are copied, and so is what would not become smaller.
    With --method entropy --bits are what the file takes, each tensor gets a grid of its own, such that a bit buys as
    much everywhere, and vectors take part. By a Hessian they do not, and each row and column of a matrix gets its own:
    of all methods, the fewest bytes.

    What is done of a job without --by that is broken off stays beside TARGET, and the same command goes on from there.

    \b
    Example:
      steelyard quantize model.safetensors int4.safetensors --bits 4 --axis 0
      steelyard quantize model.safetensors nf4.safetensors --grid nf4
      steelyard quantize model.safetensors small.safetensors --method entropy --bits 4
      steelyard quantize model.safetensors hqq.safetensors --method hqq --bits 3 --group 64
      steelyard quantize model.safetensors int3.safetensors --method gptq --bits 3 --by evidence.safetensors
      steelyard quantize model.safetensors fine.safetensors --method entropy --bits 2.5 --by evidence.safetensors
    """
    from steelyard.edit.spare import Spare

    step = _step(**options)
    if options["group"] is not None:
        _tell_rows(source, where, options["group"])
    resumed = options["by"] is None and options["fisher"] is None
    rewritten(source, target, Spare(step), where, force, output, resumed=resumed)


def _step(
    method: str,
    bits: float,
    grid: str | None,
    axis: int | None,
    group: int | None,
    asymmetric: bool,
    error: float | None,
    step: float | None,
    by: Weights | None,
    fisher: Weights | None,
    codes: Plan,
    states: str | None,
    importance: tuple[str, ...],
    damping: float | None,
) -> Step:
    """The step that the options mean; a usage error for an option that the method does not know."""
    from steelyard.edit.adaround import AdaRound
    from steelyard.edit.awq import Awq
    from steelyard.edit.evidence import either
    from steelyard.edit.gptq import Gptq
    from steelyard.edit.hqq import Hqq
    from steelyard.edit.quantize import Quantize
    from steelyard.edit.ratedistortion import RateDistortion

    given = {"axis": axis, "group": group, "error": error, "asymmetric": asymmetric or None, "step": step, "by": by}
    given |= {"grid": grid, "fisher": fisher, "codes": codes, "states": states, "importance": importance or None}
    given["damping"] = damping
    for name, methods in _ONLY.items():
        if given[name] is not None and method not in methods:
            text = f"--{name} is for the method {either(methods)}, not {method}"
            raise click.UsageError(text, click.get_current_context())
    if grid is not None:
        return _floats(grid, group, codes, given)
    mean = method == "entropy"
    if not (0 < bits <= 24 if mean else bits in range(1, 9)):
        needed = "a number above 0 and at most 24" if mean else "a whole number from 1 to 8"
        text = f"{bits:g} is not {needed}, which the method {method} needs"
        raise click.BadParameter(text, click.get_current_context(), param_hint="--bits")
    if mean:
        factors = dict(map(_factor, importance))
        chosen = {"by": by, "fisher": fisher, "damping": damping}
        return RateDistortion(bits, states=int(states or 8), importance=factors, **chosen)  # type: ignore[arg-type]
    bits = int(bits)
    if by is None and method in ("gptq", "awq", "adaround"):
        text = (
            f"--method {method} needs --by FILE (of score --kind hessian); without data: nearest with --error 2, or hqq"
        )
        raise click.UsageError(text, click.get_current_context())
    if method == "gptq":
        return Gptq(bits, symmetric=not asymmetric, group=group, by=by, step=step, codes=codes)
    if method == "awq":
        return Awq(bits, group=group, by=by, codes=codes)
    if method == "adaround":
        return AdaRound(bits, symmetric=not asymmetric, group=group, by=by, codes=codes)
    if method == "hqq":
        return Hqq(bits, group=group, codes=codes)
    if by is not None and error is None:
        error = 2.0
    return Quantize(bits, not asymmetric, axis, group, error=error, by=by, codes=codes)


def _floats(grid: str, group: int | None, codes: Plan, given: Mapping[str, Any]) -> Step:
    """The step for levels of small floats; a usage error for what only uniform ones know."""
    from steelyard.codecs.floatgrid import FloatGrid
    from steelyard.core.packed import nest
    from steelyard.edit.encode import Encode

    context = click.get_current_context()
    uniform = [name for name in ("axis", "error", "asymmetric", "by") if given[name] is not None]
    uniform += ["bits"] * (context.get_parameter_source("bits") is not ParameterSource.DEFAULT)
    for name in uniform:
        raise click.UsageError(f"--{name} is for uniform levels, not for --grid {grid}", context)
    levels, block, scales = _GRIDS[grid]
    if group is not None and scales != "float32":
        raise click.UsageError(f"{grid} has groups of {block}: --group is for nf4 and fp8", context)
    codec = FloatGrid(levels, group or block, scales)
    return Encode(codec if codes is None else nest(codec, codes=codes))


def _tell_rows(source: str, where: Where | None, group: int) -> None:
    """Say on standard error that no row is as long as a group, if so."""
    from steelyard import formats
    from steelyard.edit.prune import in_scope

    rows = [item.spec.shape[-1] for item in formats.open(source).choose(where).values() if in_scope(item, 2)]
    if rows and group > max(rows):
        click.echo(f"--group {group} is longer than any row ({max(rows)} at most): each row has one scale", err=True)


def _factor(text: str) -> tuple[str, float]:
    glob, sign, number = text.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not sign or not glob or not 0 <= factor < float("inf"):
        text = f"expected GLOB=NUMBER with a number of at least 0, such as '*.query.*=0.1', got {text!r}"
        raise click.BadParameter(text, click.get_current_context(), param_hint="--importance")
    return glob, factor

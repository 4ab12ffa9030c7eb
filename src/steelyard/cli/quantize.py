"""``steelyard quantize SOURCE TARGET``: weights rounded to uniform levels of few bits."""

from __future__ import annotations

from typing import Any

import click

from steelyard.cli.options import Output, by_option, output, plan_option, show, source_and_target, where_option
from steelyard.cli.progress import watching
from steelyard.core.packed import Plan
from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.core.where import Where

_ONLY = {  # options that not every method knows -> those that do
    "axis": ("nearest",),
    "error": ("nearest",),
    "asymmetric": ("nearest", "gptq"),
    "step": ("gptq",),
    "by": ("nearest", "gptq", "awq"),
}


@click.command("quantize")
@source_and_target
@click.option("--method", type=click.Choice(["nearest", "gptq", "awq", "hqq"]), default="nearest", show_default=True,
              help="nearest and hqq need no data; gptq and awq want --by a file of score --kind hessian.")  # fmt: skip
@click.option("--bits", type=click.IntRange(1, 8), default=8, show_default=True, help="Bits for each weight.")
@click.option("--axis", type=int, help="nearest: a scale for each index along this axis; 0 is each output channel.")
@click.option("--group", type=click.IntRange(min=1), help="A scale for so many consecutive elements of the last axis.")
@click.option("--asymmetric", is_flag=True, help="Levels between two ends, with a zero point; awq and hqq always do.")
@click.option("--error", type=float, metavar="P", help="nearest: scales that lose least, as |error|^P; 2 is usual.")
@click.option("--step", type=float, help="gptq: the scale of a row in units of its rms, for --codes entropy.")
@by_option
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

    Matrices and filters are quantized; biases and other vectors are copied.

    \b
    Example:
      steelyard quantize model.safetensors int4.safetensors --bits 4 --axis 0
      steelyard quantize model.safetensors hqq.safetensors --method hqq --bits 3 --group 64
      steelyard quantize model.safetensors int3.safetensors --method gptq --bits 3 --by evidence.safetensors
    """
    from steelyard.explain.rewrite import rewrite

    step = _step(**options)
    with watching() as watch:
        tables = rewrite(source, target, step, where, force, watch=watch)
    show(tables, output)


def _step(
    method: str,
    bits: int,
    axis: int | None,
    group: int | None,
    asymmetric: bool,
    error: float | None,
    step: float | None,
    by: Weights | None,
    codes: Plan,
) -> Step:
    """The step that the options mean; a usage error for an option that the method does not know."""
    from steelyard.edit.awq import Awq
    from steelyard.edit.gptq import Gptq
    from steelyard.edit.hqq import Hqq
    from steelyard.edit.quantize import Quantize

    given = {"axis": axis, "error": error, "asymmetric": asymmetric or None, "step": step, "by": by}
    for name, methods in _ONLY.items():
        if given[name] is not None and method not in methods:
            known = " and ".join(methods)
            raise click.UsageError(f"--{name} is for the method {known}, not {method}", click.get_current_context())
    if method == "gptq":
        return Gptq(bits, symmetric=not asymmetric, group=group, by=by, step=step, codes=codes)
    if method == "awq":
        return Awq(bits, group=group, by=by, codes=codes)
    if method == "hqq":
        return Hqq(bits, group=group, codes=codes)
    if by is not None and error is None:
        error = 2.0
    return Quantize(bits, not asymmetric, axis, group, error=error, by=by, codes=codes)

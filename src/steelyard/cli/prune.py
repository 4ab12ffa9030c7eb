"""``steelyard prune SOURCE TARGET``: the least important weights become zero, or whole units go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steelyard.cli.models import WIDTHS, loaded, model_option, task_option
from steelyard.cli.options import Number, Output, by_option, codec_option, output, show, source_and_target, where_option
from steelyard.cli.rewriting import rewritten
from steelyard.core.packed import Plan
from steelyard.core.table import Table
from steelyard.core.transform import Step, chain, on
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.core.where import where as choose
from steelyard.errors import quoted
from steelyard.life.recipe import Named

_NEEDS = {"scores": "any scores", "wanda": "of score --kind norms", "sparsegpt": "of score --kind hessian"}
_ONLY = {  # options that not everything knows -> the methods, or 'structured', that do
    "pattern": ("magnitude", "scores", "wanda", "sparsegpt"),
    "scope": ("magnitude", "scores"),
    "bits": ("sparsegpt",),
    "refit": ("sparsegpt",),
    "by": ("scores", "wanda", "sparsegpt", "structured"),
    "codec": ("magnitude", "scores", "wanda", "sparsegpt"),
    "model": ("structured",),
    "budget": ("structured",),
    "blocks": ("structured",),
}


@click.command("prune")
@source_and_target
@click.option("--fraction", type=Number(), help="How many of the weights go, 0 to 1; with --structured, of the budget.")
@click.option("--method", type=click.Choice(["magnitude", *_NEEDS]), default="magnitude", show_default=True,
              help="How weights are ranked; the others need --by.")  # fmt: skip
@click.option("--pattern", metavar="N:M", help="Instead of --fraction: N of every M inputs stay, such as 2:4.")
@click.option("--scope", type=click.Choice(["global", "tensor", "row", "erk"]),
              help="Rank all tensors together (the default), each tensor or each output by itself, or let small layers "
              "keep more.")  # fmt: skip
@click.option("--bits", type=click.IntRange(2, 8), help="sparsegpt: round what stays in the same pass.")
@click.option("--refit", is_flag=True, help="sparsegpt: what stays becomes the optimum for the zeros; slower.")
@by_option
@task_option("--structured", "Remove channels, heads and hidden units instead; TASK says the model and its data.")
@model_option
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    metavar="N",
    help="structured: instead of --fraction, the N residual blocks go that validation misses least.",
)
@click.option("--budget", type=click.Choice(["parameters", "multiplications"]), help="structured: what shrinks.")
@codec_option(None, "How to hold the pruned tensors. Default: the smallest of a mask, distances and groups, coded.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    structured: Named | None,
    seed: int,
    where: Where | None,
    output: Output,
    **options: Any,
) -> None:
    """Set the least important weights of SOURCE to zero, and write TARGET.

    Matrices and filters are pruned; biases and other vectors are copied. With --structured, whole units go with all
    that only they feed, the tensors become smaller, and the verbs that take a model resize it by the file. A --pattern
    has to divide the inputs of each tensor: a first convolution of one or three channels is left out by --where.

    \b
    Example:
      steelyard prune model.safetensors pruned.safetensors --fraction 0.9
      steelyard prune model.safetensors sparse.safetensors --pattern 1:2 --where '!conv1.*'
      steelyard prune model.safetensors fitted.safetensors --method sparsegpt --fraction 0.5 --by evidence.safetensors
      steelyard init digits cnn.safetensors --model cnn --scheme he
      steelyard prune cnn.safetensors narrow.safetensors --fraction 0.5 --structured digits --model cnn
    """
    _check(structured, **options)
    if structured is not None:
        show(_narrow(source, target, force, structured, seed, where, **options), output)
        return
    rewritten(source, target, _step(**options), where, force, output)


def _check(structured: Named | None, method: str, fraction: float | None, **options: Any) -> None:
    """A usage error for an option that what is asked for does not know, and for one that it lacks."""
    asked = "structured" if structured is not None else method
    context = click.get_current_context()
    if structured is not None and method != "magnitude":
        raise click.UsageError(f"--structured ranks units by their norm, or by --by, not by {method}", context)
    for name, methods in _ONLY.items():
        if options[name] not in (None, False) and asked not in methods:
            known = ", ".join(methods)
            raise click.UsageError(f"--{name} is for {known}, not for {asked}", context)
    if asked in _NEEDS and options["by"] is None:
        raise click.UsageError(f"--method {asked} needs --by FILE ({_NEEDS[asked]})", context)
    if asked == "wanda":
        _check_norms(options["by"])
    if sum(given is not None for given in (fraction, options["pattern"], options["blocks"])) != 1:
        raise click.UsageError(
            "give --fraction, how many of the weights go, or --pattern (or --blocks): one of them", context
        )


def _check_norms(by: Weights) -> None:
    """A usage error for evidence of another kind than the one that Wanda ranks by."""
    from steelyard.edit.evidence import About
    from steelyard.edit.importance import KINDS

    kind = About.of(by).kind
    if kind != "norms":
        found = "scores of no kind" if kind is None else f"evidence of the kind {quoted(kind)}"
        text = f"--method wanda takes evidence of the kind norms (score --kind norms), got {found}"
        other = "; to rank by that: --method scores" if kind in (None, *KINDS) else ""
        raise click.UsageError(text + other, click.get_current_context())


def _step(
    method: str,
    fraction: float | None,
    pattern: str | None,
    scope: Any,
    bits: int | None,
    refit: bool,
    by: Weights | None,
    codec: Step | None,
    **_: Any,
) -> Step:
    """The step that the options mean."""
    from steelyard.edit.nm import PruneNM, numbers
    from steelyard.edit.prune import Prune
    from steelyard.edit.sparsegpt import SparseGPT

    step: Step
    if method == "sparsegpt":
        block = 128 if pattern is None else 128 // numbers(pattern)[1] * numbers(pattern)[1]
        step = SparseGPT(0.5 if fraction is None else fraction, by, pattern, block=block, bits=bits, refit=refit)
    elif pattern is not None:
        step = PruneNM(pattern, by)
    else:
        step = Prune(fraction or 0.0, scope or ("row" if method == "wanda" else "global"), by)
    return chain(step, on(choose(kind="float", min_ndim=2), codec or _held(pattern)))


def _held(pattern: str | None) -> Step:
    """The smallest of several ways to hold zeros; that of groups only where there are some."""
    from steelyard.codecs.bitmask import Bitmask
    from steelyard.codecs.delta import Delta
    from steelyard.codecs.entropy import Entropy
    from steelyard.codecs.nm import NM
    from steelyard.core.packed import nest, smallest
    from steelyard.edit.nm import numbers
    from steelyard.edit.pack import Pack

    coded = Entropy()
    options: list[Plan] = [nest(Bitmask(), mask=coded, values=coded), nest(Delta(), gaps=coded, values=coded), None]
    if pattern is not None:
        options.insert(0, nest(NM(numbers(pattern)[1]), codes=coded, values=coded))
    return Pack(smallest(*options))


def _narrow(
    source: str,
    target: str,
    force: bool,
    task: Named,
    seed: int,
    where: Where | None,
    *,
    fraction: float | None,
    blocks: int | None,
    by: Weights | None,
    model: Named | None,
    budget: Any,
    **_: Any,
) -> Table:
    """Remove units of the model of a task and write what is left; the units, and the sizes of both files."""
    from steelyard import formats
    from steelyard.errors import RecipeError
    from steelyard.formats.base import check_target
    from steelyard.formats.module import from_module
    from steelyard.graph.skip import DROPPED
    from steelyard.learn.blocks import prune_blocks_
    from steelyard.learn.structured import prune_structured_
    from steelyard.learn.task import first_batch

    check_target(Path(target), Path(source), force=force)
    if fraction is not None and not 0 < fraction < 1:
        raise RecipeError(f"the fraction of the budget that goes is above 0 and below 1, not {fraction}")
    before = formats.open(source)
    made, module = loaded(task, model, seed, before)
    if fraction is None:
        table = prune_blocks_(module, made, blocks or 1)
    else:
        batch = first_batch(made, "train")
        table = prune_structured_(module, batch, fraction, budget=budget or "parameters", by=by, where=where)
    left = from_module(module)
    gone = {DROPPED: left.meta[DROPPED]} if DROPPED in left.meta else {}
    weights = left.with_meta(**{**before.meta, **gone, WIDTHS: "pruned"})
    size = formats.write(weights, target)
    path = Path(source)
    sizes = {"file before": path.stat().st_size} if path.is_file() else {}
    return Table.of(table.title, table.columns, table.rows, {**table.meta, **sizes, "file": size})

"""``steelyard init TASK TARGET``: the first weights of a model, and why each layer starts as it does."""

from __future__ import annotations

import click

from steelyard.cli.models import loaded, model_option, target_argument, task_argument
from steelyard.cli.options import Output, output, show
from steelyard.life.recipe import Named


@click.command("init")
@task_argument
@target_argument
@model_option
@click.option("--scheme", default="auto", show_default=True, help="auto, data, he, xavier, 'lecun(mode=fan_out)', ...")
@click.option(
    "--gain", help="A number, or auto: that of the activation which follows a layer. Of lecun, orthogonal, ..."
)
@click.option("--residual", metavar="RULE", help="Scale residual branches by depth: gpt2, rezero, fixup or t-fixup.")
@output
def verb(
    task: Named,
    target: str,
    model: Named | None,
    seed: int,
    scheme: str,
    gain: str | None,
    residual: str | None,
    output: Output,
) -> None:
    """Start the weights of a model for TASK and write them to TARGET.

    One training batch shows the order of the layers, what follows each of them and where residual branches end. The
    scheme auto chooses by it how each layer starts, says why, and proves the start on the batch; data only sets the
    scale of every layer by it. The table says of each layer what was done. The other schemes are those of the
    library: he, xavier, lecun, orthogonal, delta_orthogonal, identity, sparse, truncated_normal, normal, uniform,
    constant and zeros.

    \b
    Example:
      steelyard init breast-cancer first.safetensors --model mlp --scheme lecun --gain auto
    """
    from steelyard import formats
    from steelyard.formats.module import from_module
    from steelyard.init import scheme_of
    from steelyard.learn.start import init_
    from steelyard.learn.task import first_batch

    if gain is not None and scheme in ("data", "auto"):
        raise click.UsageError(f"--gain goes with a scheme such as lecun; {scheme} finds every scale itself",
                               click.get_current_context())  # fmt: skip
    chosen = scheme if gain is None else scheme_of(scheme, gain=gain)
    made, module = loaded(task, model, seed, None)
    table = init_(module, chosen, first_batch(made, "train"), seed=seed, residual=residual)
    about = {"task": made.name, "seed": str(seed), "scheme": str(chosen)} | ({"residual": residual} if residual else {})
    formats.write(from_module(module).with_meta(**about), target)
    show(table, output)

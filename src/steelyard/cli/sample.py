"""``steelyard sample TASK WEIGHTS``: text from a trained language model of characters."""

from __future__ import annotations

import click

from steelyard.cli.models import loaded, model_option, task_argument
from steelyard.cli.options import Number, Output, output, show
from steelyard.life.recipe import Named


@click.command("sample")
@task_argument
@click.argument("weights")
@model_option
@click.option("--prompt", default="\n", help="What the text goes on from.  [default: a new line]")
@click.option("--length", type=click.IntRange(min=1), default=500, show_default=True, help="Characters to draw.")
@click.option("--temperature", type=Number(), default=1.0, show_default=True, help="0 takes the likeliest character.")
@click.option("--top-p", type=Number(), default=1.0, show_default=True,
              help="Draw among the likeliest characters that have this probability together.")  # fmt: skip
@output
def verb(
    task: Named,
    weights: str,
    model: Named | None,
    seed: int,
    prompt: str,
    length: int,
    temperature: float,
    top_p: float,
    output: Output,
) -> None:
    """Draw characters, one after the other, from the model whose weights are in the file WEIGHTS.

    TASK is text or text:FILE, and MODEL the model, with which the weights were trained.

    \b
    Example:
      steelyard sample text novel.safetensors --model rnn --prompt "Call me " --temperature 0.7
    """
    from steelyard import formats
    from steelyard.core.table import Table
    from steelyard.learn.sample import sample

    made, module = loaded(task, model, seed, formats.open(weights))
    drawn = sample(module, made, prompt, length=length, temperature=temperature, top_p=top_p, seed=seed)
    if output.form == "text" and output.html is None:
        click.echo(prompt.lstrip("\n") + drawn)
        return
    told, row = {"temperature": temperature, "top p": top_p, "seed": seed}, {"prompt": prompt, "text": drawn}
    show(Table.of(f"drawn from {made.name}", dict.fromkeys(row, ""), [row], told), output)

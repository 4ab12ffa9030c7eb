"""``steelyard run [RECIPE]``: the whole life of a network's weights."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from steelyard.cli.options import Output, output, show


@click.command("run")
@click.argument("recipe", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the files. Default: runs/<date-time>.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of everything random, instead of the recipe's.")
@click.option("--print-recipe", is_flag=True, help="Print the recipe, complete, and do nothing.")
@output
def verb(recipe: str | None, out: Path | None, seed: int | None, print_recipe: bool, output: Output) -> None:
    """Start weights, train, explain, move, shrink and ship them, as RECIPE says.

    Without a RECIPE the embedded one runs: a small convolutional net on handwritten digits. The folder receives
    weights.safetensors (the trained original), small.safetensors, model.onnx, report.html, tables.json and
    recipe.yaml (what was run, complete). The status is 1 if the recipe's goal or tolerance was missed.

    \b
    Example:
      steelyard run --out life
    """
    if print_recipe and recipe is None and seed is None:
        from steelyard.life.recipe import embedded

        click.echo(embedded(), nl=False)
        return
    from dataclasses import replace

    from steelyard.life.recipe import dump, load

    told = load(recipe)
    told = told if seed is None else replace(told, seed=seed)
    if print_recipe:
        click.echo(dump(told), nl=False)
        return
    from steelyard.life import run
    from steelyard.life.page import page

    folder = out or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    home = Path(recipe).resolve().parent if recipe else None
    life = run(told, folder, home, lambda line: click.echo(line, err=True))
    show(life.stages, output, page(life))
    click.echo(f"wrote {folder}: open {folder / 'report.html'}", err=True)
    life.verdict()

"""The whole life of a network's weights, as one recipe: `steelyard run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steelyard.life.recipe import Recipe
    from steelyard.life.record import Life


def run(
    recipe: Recipe, out: str | Path, home: Path | None = None, say: Callable[[str], None] = lambda _line: None
) -> Life:
    """Live a recipe: every stage, every file in the folder `out`, and the record of what was measured.

    ``home`` is a folder whose Python modules the recipe may name, beside the current one; ``say`` receives a line for
    each stage. A mistake in the recipe is raised before anything is written. Goals that were missed are in
    ``life.failures``; ``life.verdict()`` raises them.
    """
    from steelyard.life.stages import begin, finish, live
    from steelyard.life.surroundings import computing, importable

    with importable(home), computing(recipe.threads):
        life = begin(recipe, Path(out), say)
        live(life)
        finish(life)
    return life

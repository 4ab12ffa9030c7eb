"""A weights file, re-read and re-measured by a process that has seen nothing else of the run.

``python -m steelyard.life.fresh RECIPE FILE`` builds the recipe's model anew from another seed, replaces every weight
of it by the file's, measures it on the test split, and prints the table as one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from steelyard.errors import VerdictError


def measure(recipe: Path, file: Path) -> dict[str, Any]:
    """The table of `steelyard.learn.evaluate.evaluate` as data, found in a process of its own.

    Raises VerdictError with the process's last line if it fails.
    """
    command = [sys.executable, "-m", "steelyard.life.fresh", str(recipe), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerdictError(f"{file}: the process that re-read it failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(recipe: str, file: str) -> None:
    """Print what `measure` returns."""
    import torch

    from steelyard import formats
    from steelyard.formats.module import into_module
    from steelyard.learn.evaluate import evaluate
    from steelyard.learn.task import build_seeded
    from steelyard.life.recipe import load
    from steelyard.life.record import make_task

    told = load(recipe)
    torch.set_num_threads(told.threads)
    task = make_task(told.task, told.model, told.seed)
    model = build_seeded(task, told.seed + 1)  # another start, so that whatever the file lacks would show
    into_module(formats.open(file), model)
    sys.stdout.write(evaluate(model, task, "test").to_json() + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

"""Is the promise of `shrink` kept? Small models on drawn data, whose truth is measured on examples without end.

    python bench/promise/run.py [--models 8] [--splits 10] [--epochs 0] [--tolerance 0.02]

Each model is a task of its own: Gaussian classes that overlap, of other numbers of classes, features, hidden units.
For each, `--splits` sets of training, validation and proof examples are drawn, a net is trained and shrunk, what its
file loses in truth is measured on 40,000 more examples. A promise is broken if that is more than the tolerance by more
than two standard errors of this measurement. At 95 % confidence at most one in twenty may be.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.errors import ModelError, VerdictError
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.task import SPLITS
from steelyard.shrinking.within import shrink

TRUTH = 40_000


def source(number: int) -> tuple[Callable[[int, int], tuple[Tensor, Tensor]], Callable[[], nn.Module]]:
    """What draws so many examples from a seed, and what builds the model of task `number`."""
    g = torch.Generator().manual_seed(number)
    classes, features = int(torch.randint(2, 9, (), generator=g)), int(torch.randint(8, 40, (), generator=g))
    hidden = int(torch.randint(16, 100, (), generator=g))
    centres = torch.randn(classes, features, generator=g) * (2.6 / math.sqrt(features))

    def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
        own = torch.Generator().manual_seed(10_000 * number + seed)
        y = torch.randint(0, classes, (count,), generator=own)
        return centres[y] + 0.6 * torch.randn(count, features, generator=own), y

    def build() -> nn.Module:
        if number % 4 == 0:
            return nn.Linear(features, classes)
        deeper = [nn.Linear(hidden, hidden), nn.Tanh()] if number % 4 == 3 else []
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), *deeper, nn.Linear(hidden, classes))

    return draw, build


def task(number: int, split: int, proof: int) -> tuple[sy.Task, sy.Task]:
    """The task with the examples of a split, and the same with the truth as its test examples."""
    draw, build = source(number)
    sizes = {"train": 600, "valid": 500, "test": proof}
    drawn = {name: draw(sizes[name], 3 * split + i + 1) for i, name in enumerate(SPLITS)}
    x, y = ({name: parts[i] for name, parts in drawn.items()} for i in (0, 1))
    truth = draw(TRUTH, 0)

    def made(x: dict[Any, Tensor], y: dict[Any, Tensor]) -> sy.Task:
        return sy.Task(f"drawn {number}", build, Examples(x, y, 64, split), cross_entropy, {"accuracy": accuracy},
                       about={"split": split})  # fmt: skip

    return made(x, y), made({**x, "test": truth[0]}, {**y, "test": truth[1]})


def one(number: int, split: int, told: argparse.Namespace) -> dict[str, Any]:
    """One model, trained, shrunk and measured."""
    given, truth = task(number, split, told.proof)
    model = sy.train(given, epochs=12, seed=split, progress=False).model
    row: dict[str, Any] = {"task": number, "split": split, "model bytes": sy.from_module(model).nbytes}
    start = time.process_time()
    try:
        found = shrink(model, given, tolerance=told.tolerance, epochs=told.epochs, seed=split)
    except (VerdictError, ModelError) as error:
        return row | {"refused": str(error)[:100]}
    said = found.proof.rows[0]
    before = outcomes(model, truth)["accuracy"]
    sy.into_module(found.weights, model)
    lost = before - outcomes(model, truth)["accuracy"]
    row |= {
        "smaller": said["smaller"],
        "bytes": said["bytes"],
        "said at most": said["loss at most"],
        "accuracy": before.mean(),
    }
    return row | {
        "lost in truth": lost.mean(),
        "error": lost.std() / math.sqrt(TRUTH),
        "cpu": time.process_time() - start,
    }


def main() -> None:
    """Print a summary, and write every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("models", 8), ("splits", 10), ("epochs", 0), ("proof", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tolerance", type=float, default=0.02)
    told = parser.parse_args()
    torch.set_num_threads(1)
    rows = [one(number, split, told) for number in range(told.models) for split in range(told.splits)]
    kept = [row for row in rows if "smaller" in row]
    broken = [row for row in kept if row["lost in truth"] - 2 * row["error"] > told.tolerance]
    summary = {"runs": len(rows), "refused": len(rows) - len(kept), "broken": len(broken)}
    if kept:
        summary["smaller, median"] = float(np.median([row["smaller"] for row in kept]))
        summary["lost in truth, mean"] = float(np.mean([row["lost in truth"] for row in kept]))
        summary["said at most, mean"] = float(np.mean([row["said at most"] for row in kept]))
        summary["CPU s, median"] = float(np.median([row["cpu"] for row in kept]))
    print(json.dumps(summary, indent=1))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    said = {"told": vars(told), "summary": summary, "runs": [{k: _plain(v) for k, v in row.items()} for row in rows]}
    (results / f"{date.today()}-epochs{told.epochs}.json").write_text(json.dumps(said, indent=1) + "\n")


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


if __name__ == "__main__":
    main()

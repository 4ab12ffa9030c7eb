"""Does `shrink` know how long it will take? What it says after a tenth of the run against what it took.

    python bench/eta/run.py [--epochs 12] [--seeds 3]

Three small nets are shrunk, training included. What `say` is told is kept with the processor seconds of that moment
(the clock of the work is set to them, those of processes that it starts included, because other work may share the
machine); at the first word after a tenth, a quarter and a half of the whole, ``seconds / share`` is held against the
whole. A net is shrunk before, so that nothing is compiled or imported within the time.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

import steelyard as sy
from steelyard.learn.models import model
from steelyard.learn.task import build_seeded
from steelyard.learn.tasks import task as find_task
from steelyard.shrinking import search
from steelyard.shrinking.within import shrink
from steelyard.shrinking.work import Work

NETS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("digits", "mlp", {"widths": (64, 32)}, 0.03),
    ("digits", "cnn", {}, 0.03),
    ("breast-cancer", "mlp", {"widths": (32, 16)}, 0.08),
)
AT = (0.1, 0.25, 0.5)


def clock() -> float:
    """Processor seconds of this process and of those that it started."""
    return sum(os.times()[:4])


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="each net is trained and shrunk with so many")
    told = parser.parse_args()
    torch.set_num_threads(1)
    search.Work = lambda say: Work(say, clock)  # type: ignore[assignment, misc]
    warm = find_task("digits")
    shrink(sy.train(warm, epochs=8, progress=False).model, warm, tolerance=0.05, epochs=1)
    rows = []
    for seed, (name, kind, options, tolerance) in product(range(told.seeds), NETS):
        found = find_task(name)
        data = found.with_model(lambda kind=kind, found=found, options=options: model(kind, found.interface, **options))
        net = sy.train(data, build_seeded(data, seed), epochs=8, seed=seed, progress=False).model
        said: list[tuple[float, float]] = []
        began = clock()

        def say(_what: str, share: float, said: Any = said, began: float = began) -> None:
            said.append((clock() - began, share))

        shrink(net, data, tolerance=tolerance, epochs=told.epochs, seed=seed, say=say)
        took = clock() - began
        row: dict[str, Any] = {"task": name, "model": kind, "seed": seed, "CPU s": took}
        for at in AT:
            seconds, share = next((s, share) for s, share in said if s >= at * took)
            row[f"said after {at:.0%} of it"] = seconds / share / took
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    name = Path(__file__).parent / "results" / f"{date.today()}.json"
    name.write_text(json.dumps({"told": vars(told), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

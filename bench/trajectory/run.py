"""What following the way of every weight costs in a training step of a transformer of 19 M parameters, on one thread.

Processor seconds within `Trajectory.update` over those of the training step beside it, medians: an update that adds to
the path alone, and one that also keeps a point of the way (sketches). With `every=n` the cost is divided by n; points
become as rare as 1 in many with the length of a run. The step of settling is compared with that of exact distances, on
smaller nets, where every point can be kept.

    python bench/trajectory/run.py [--steps 10] [--sequences 16]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steelyard as sy
from steelyard.learn.trajectory import WHOLE

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "watch"))
from loop import TIME, VOCABULARY, Transformer  # noqa: E402


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def cost(steps: int, sequences: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    way = sy.Trajectory(model)
    plain, path, point = [], [], []

    def step() -> None:
        x = torch.randint(VOCABULARY, (sequences, TIME))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()

    for i in range(2 * steps + 2):
        way._apart = 1 if i % 2 else 1 << 30  # a point, or none
        took, update = seconds(step), seconds(way.update)
        if i > 1:  # the first ones warm up
            plain.append(took)
            (point if i % 2 else path).append(update)
    step_of = statistics.median(plain)
    memory = way.table().meta["memory"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "plain step, s": step_of,
        "path, % of a step": 100 * statistics.median(path) / step_of,
        "path and a point, % of a step": 100 * statistics.median(point) / step_of,
        "bytes for a weight, of copies": 8,
        "bytes of one point": (memory - 8 * sum(p.numel() for p in model.parameters())) // (len(way._points)),
    }


def settling(seeds: int) -> dict[str, Any]:
    """The step of settling by sketches against that by exact distances: how many points it is off, of the run."""
    off, distances = [], []
    for seed in range(seeds):
        task = sy.task("digits", model="mlp", augment=False)
        few, exact = sy.Trajectory(), sy.Trajectory(size=1 << 20)
        sy.train(task, epochs=10, seed=seed, gauges=[few, exact], progress=False)
        for a, b in zip(few.table().rows, exact.table().rows, strict=True):
            off.append(abs(float(a["of the run"]) - float(b["of the run"])))
        for a, b in zip(few.history().rows, exact.history().rows, strict=True):
            if b["to the end"] and a["layer"] != WHOLE:
                distances.append(abs(float(a["to the end"]) / float(b["to the end"]) - 1))
    return {
        "runs": seeds,
        "settled, off by, % of the run, largest": 100 * max(off),
        "distance, relative error, rms": statistics.fmean(d * d for d in distances) ** 0.5,
        "distance, relative error, stated": (2 * 512) ** -0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=16, help="of 128 tokens, in a batch")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"cost": cost(given.steps, given.sequences), "settling": settling(given.seeds)}
    print(json.dumps(figures, indent=1))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    date = datetime.date.today().isoformat()
    (HERE / "results").mkdir(exist_ok=True)
    result = {"date": date, "machine": machine, "sequences": given.sequences, "figures": figures}
    (HERE / "results" / f"{date}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

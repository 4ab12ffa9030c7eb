"""`find_lr` on forty small tasks against the best of a grid of 20 rates, and against torch-lr-finder's suggestion.

Of each task: the test accuracy, mean of three seeds, of runs at each rate of the grid, at the rate that `find_lr` finds
(with another seed), full and quick, and at the steepest slope of torch-lr-finder's sweep of 100 steps. A hit is at most
half a point below the best of the grid, which is the largest of 20 noisy means: even the right rate may miss.

    pip install --target peer torch-lr-finder==0.2.2
    nice -n 10 python bench/find_lr/run.py --peer peer
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import EPOCHS, OPTIMIZERS, PAIRS, SIZES, decay, make
from torch import nn

from steelyard.errors import ModelError
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.optimizers import OPTIMIZERS as MADE
from steelyard.learn.rate import find_lr
from steelyard.learn.run import train
from steelyard.learn.task import build_seeded

HERE = Path(__file__).parent
GRID = np.geomspace(1e-5, 3, 20)
SEEDS = (0, 1, 2)
SEARCH = 10  # the seed that a rate is looked for with
BAR = 0.005


def accuracy(pair: str, optimizer: str, size: int, rate: float) -> float:
    """The mean test accuracy of runs with each seed; 0 for a run that diverges."""
    found = []
    for seed in SEEDS:
        task = make(pair, size, seed)
        options: dict[str, Any] = {"optimizer": optimizer, "rate": rate, "epochs": EPOCHS, "seed": seed}
        try:
            run = train(task, keep="last", weight_decay=decay(pair), progress=False, **options)
            found.append(mean_outcomes(run.model, task, "test")["accuracy"])
        except ModelError:
            found.append(0.0)
    return statistics.mean(found)


def ours(pair: str, optimizer: str, size: int, effort: Any) -> tuple[float, float]:
    """The rate and what it cost, in runs."""
    task = make(pair, size, SEARCH)
    found = find_lr(None, task, optimizer, epochs=EPOCHS, weight_decay=decay(pair), seed=SEARCH, effort=effort)
    return found.meta["rate"], found.meta["cost"]


def peers(pair: str, optimizer: str, size: int) -> tuple[float, float]:
    """The steepest descent of the smoothed loss in torch-lr-finder's exponential sweep, as its plot suggests."""
    from torch_lr_finder import LRFinder

    task = make(pair, size, SEARCH)
    model = build_seeded(task, SEARCH)
    batches = [(b.inputs, b.targets) for epoch in range(10) for b in task.batches("train", epoch)]
    made = MADE[optimizer]([{"params": list(model.parameters()), "lr": 1e-7, "weight_decay": decay(pair)}])
    finder = LRFinder(model, made, nn.CrossEntropyLoss())
    finder.range_test(_Loader(batches), end_lr=10, num_iter=100)
    rates, losses = (np.array(finder.history[name][10:-5]) for name in ("lr", "loss"))
    return float(rates[np.gradient(losses).argmin()]), 100 / (EPOCHS * -(-600 // size))


class _Loader(torch.utils.data.DataLoader):
    def __init__(self, batches: list[Any]):
        super().__init__(batches, batch_size=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--kept", type=Path, default=HERE / "kept.json", help="what is measured already; go on from it")
    told = parser.parse_args()
    sys.path.insert(0, told.peer)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept: dict[str, Any] = json.loads(told.kept.read_text()) if told.kept.exists() else {}
    since = time.process_time()
    for pair, optimizer, size in itertools.product(PAIRS, OPTIMIZERS, SIZES):
        row = kept.setdefault(f"{pair}, {optimizer}, {size}", {})
        if "grid" not in row:
            row["grid"] = [round(accuracy(pair, optimizer, size, float(rate)), 4) for rate in GRID]
        for who in ("full", "quick", "torch-lr-finder"):
            if who not in row:
                rate, cost = peers(pair, optimizer, size) if "torch" in who else ours(pair, optimizer, size, who)
                found = accuracy(pair, optimizer, size, rate)
                row[who] = {"rate": rate, "cost": round(cost, 3), "accuracy": round(found, 4)}
        told.kept.write_text(json.dumps(kept))
        best = max(row["grid"])
        regrets = {who: round(best - row[who]["accuracy"], 4) for who in ("full", "quick", "torch-lr-finder")}
        print(
            f"{pair}, {optimizer}, {size}: best {best:.3f}, regret {regrets}, {time.process_time() - since:.0f} s",
            flush=True,
        )
    figures: dict[str, Any] = {}
    for who in ("full", "quick", "torch-lr-finder"):
        regret = [max(row["grid"]) - row[who]["accuracy"] for row in kept.values()]
        figures[f"{who}: within 0.5 points"] = sum(r <= BAR + 1e-9 for r in regret)
        figures[f"{who}: median regret, points"] = round(100 * statistics.median(regret), 3)
        figures[f"{who}: largest regret, points"] = round(100 * max(regret), 2)
        figures[f"{who}: cost, runs"] = round(statistics.mean(row[who]["cost"] for row in kept.values()), 2)
    figures["tasks"] = len(kept)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "figures": figures, "tasks": kept}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

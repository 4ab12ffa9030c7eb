"""Does one batch tell which start will train best? Kendall's tau-b between the score and the accuracy after training.

Nine starts x three depths (3, 10, 30 hidden layers of 64 units and a head, no normalisation) on digits, for each
activation and optimizer; each start is drawn, and trained for 340 steps (20 epochs, one cycle), with each seed.
Accuracies are those of the validation split, which training never sees. Rankings are of means over the seeds: `pooled`
over all 27, `within` the mean over the depths of the tau-b of their 9. The interval is that of 2000 resamplings of the
seeds, of score and accuracy alike. Beside it: other scores from the same table, and what can be reached at all, the
tau-b of the accuracies of one seed with the means of the others.

    python bench/compare_starts/run.py [--seeds 3] [--settings relu:adam:0.001 ...]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn

import steelyard as sy

HERE = Path(__file__).parent
WIDTH, STEPS, DEPTHS = 64, 340, (3, 10, 30)
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU}
STARTS = {
    "torch default": "default",
    "xavier": "xavier",
    "he": "he",
    "lecun": "lecun",
    "orthogonal": "orthogonal",
    "too small": "normal(std=0.02)",
    "too large": "normal(std=0.5)",
    "constant": "constant(value=0.1)",
    "data": "data",
}
CHANCE = 0.1  # the accuracy of a start that cannot be trained
RESAMPLINGS = 2000


def distance(row: dict[str, Any]) -> float:
    """How far the scales go, forwards and backwards, in powers of e."""
    scales = [row[name] for name in ("forwards", "backwards")]
    return sum(abs(math.log(s)) if s is not None and 0 < s < math.inf else 1e3 for s in scales)


SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "score": lambda row: row["score"] or 0.0,
    "taught alone": lambda row: row["taught"] or 0.0,
    "scales, forwards and backwards": lambda row: -distance(row),
    "cosine of gradients": lambda row: -abs(row["alike"]) if row["alike"] is not None else -1.0,
    "loss before training": lambda row: -row["loss"] if math.isfinite(row["loss"]) else -1e30,
    "healthy": lambda row: float(row["verdict"] == "healthy"),
}


def measured(activation: str, optimizer: str, rate: float, seed: int) -> dict[tuple[int, str], dict[str, Any]]:
    """One table of starts and depths, by depth and start."""

    def net(depth: int) -> nn.Module:
        hidden = [part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), ACTIVATIONS[activation]())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, 10))

    data = sy.task("digits", augment=False)
    recipe = {"optimizer": optimizer, "rate": rate, "weight_decay": 0.0}
    table = sy.compare_starts(
        data, STARTS, DEPTHS, model=net, seeds=1, seed=seed, train=STEPS, progress=False, **recipe
    )
    return {(row["depth"], row["start"]): dict(row) for row in table.rows}


def tau(x: np.ndarray, y: np.ndarray) -> float:
    """Tau-b, 0 where one side is all ties."""
    found = float(kendalltau(x, y).statistic)
    return found if math.isfinite(found) else 0.0


def taus(scores: np.ndarray, accuracies: np.ndarray) -> tuple[float, float]:
    """(depths, starts) each: pooled, and the mean within the depths."""
    within = [tau(x, y) for x, y in zip(scores, accuracies, strict=True)]
    return tau(scores.ravel(), accuracies.ravel()), sum(within) / len(within)


def summary(tables: list[dict[tuple[int, str], dict[str, Any]]]) -> dict[str, Any]:
    """Figures of one setting; arrays are (seeds, depths, starts)."""

    def array(of: Callable[[dict[str, Any]], float]) -> np.ndarray:
        return np.array([[[of(table[depth, start]) for start in STARTS] for depth in DEPTHS] for table in tables])

    accuracies = array(lambda row: CHANCE if row["accuracy"] is None else row["accuracy"])
    found: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for name, of in SCORES.items():
        scores = array(of)
        pooled, within = taus(scores.mean(0), accuracies.mean(0))
        found[name] = {"pooled": round(pooled, 3), "within": round(within, 3)}
        if name == "score":
            again = []
            for _ in range(RESAMPLINGS):
                chosen = random.integers(len(tables), size=len(tables))
                again.append(taus(scores[chosen].mean(0), accuracies[chosen].mean(0)))
            for which, values in zip(("pooled", "within"), zip(*again, strict=True), strict=True):
                found[name][f"{which}, 95 %"] = [round(float(q), 3) for q in np.quantile(values, (0.025, 0.975))]
            alone = [taus(one, accuracies.mean(0)) for one in scores]
            found[name]["pooled, one seed of the score"] = [round(p, 3) for p, _ in alone]
    others = [taus(a, np.delete(accuracies, i, 0).mean(0)) for i, a in enumerate(accuracies)]
    reach = np.mean(others, 0)
    found["accuracy of another seed"] = {"pooled": round(float(reach[0]), 3), "within": round(float(reach[1]), 3)}
    best = scores_best(array(SCORES["score"]).mean(0), accuracies.mean(0))
    means = {
        str(d): dict(zip(STARTS, map(float, row), strict=True))
        for d, row in zip(DEPTHS, accuracies.mean(0).round(4), strict=True)
    }
    marks = {
        str(d): dict(zip(STARTS, map(float, row), strict=True))
        for d, row in zip(DEPTHS, array(SCORES["score"]).mean(0).round(4), strict=True)
    }
    return {"tau-b": found, "lost by taking the first, pp": best, "accuracy": means, "score": marks}


def scores_best(scores: np.ndarray, accuracies: np.ndarray) -> list[float]:
    """At each depth, by how much the start that the score puts first falls short of the best one."""
    return [round(100 * float(y.max() - y[x.argmax()]), 2) for x, y in zip(scores, accuracies, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=["relu:adam:0.001", "tanh:adam:0.001", "elu:sgd:0.01"])
    told = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine, "seeds": told.seeds}
    (HERE / "results").mkdir(exist_ok=True)
    for setting in told.settings:
        activation, optimizer, rate = setting.split(":")
        before = time.process_time()
        tables = []
        for seed in range(told.seeds):
            tables.append(measured(activation, optimizer, float(rate), seed))
            print(f"{setting}, seed {seed}: {time.process_time() - before:.0f} processor s", flush=True)
        result[setting] = summary(tables)
        print(setting, json.dumps(result[setting]["tau-b"], indent=1), result[setting]["lost by taking the first, pp"])
        (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Which starts of a recurrent network solve which length: adding and copying at T = 50, 100, 200, several seeds.

32 hidden units, one layer; batches of 50 new examples, at most UPDATES updates; Adam with a constant rate, 0.01 with
gates and 0.001 without, gradients clipped at a norm of 1. A run is solved when its validation loss, looked at each 100
updates, is below a tenth of that of a model without memory (1/6 for adding, 10 ln 8 / (T + 20) for copying); it ends
there. Beside it, what the start itself lets through: the gradient of the last state with respect to the one T - 1 steps
before, relative to one that is kept.

    python bench/recurrent/run.py [--tasks adding copying] [--lengths 50 100 200] [--seeds 3] [--starts lstm ...]

Runs are added to those of today's result, so that it can be made in parts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import steelyard as sy
from steelyard.explain.memory import memory
from steelyard.learn.seeding import seeded
from steelyard.learn.task import first_batch

HERE = Path(__file__).parent
HIDDEN, UPDATES, LOOK = 32, 1200, 100
GATED, PLAIN = 1e-2, 1e-3  # rates
STARTS: dict[str, dict[str, Any]] = {
    "rnn, torch": {"cell": "rnn", "start": "torch"},
    "rnn, orthogonal": {"cell": "rnn"},
    "rnn-relu, identity (IRNN)": {"cell": "rnn-relu", "start": "identity"},
    "lstm, torch": {"cell": "lstm", "start": "torch"},
    "lstm, forget bias 1": {"cell": "lstm"},
    "lstm, chrono": {"cell": "lstm", "memory": ...},
    "gru, chrono": {"cell": "gru", "memory": ...},
}


def task_of(name: str, length: int, seed: int) -> sy.Task:
    return sy.task(f"{name}:{length}", seed=seed, examples=50 * LOOK)


def built(task: sy.Task, start: str, seed: int) -> torch.nn.Module:
    """The network of that start; chrono knows how long the dependencies are."""
    options = dict(STARTS[start])
    if "memory" in options:
        options["memory"] = task.interface.shape[0]
    with seeded(seed):
        return sy.model("rnn", task.interface, hidden=HIDDEN, **options)


def trained(task: sy.Task, start: str, seed: int, rate: float) -> dict[str, Any]:
    """One run: the lowest validation loss, and after how many updates it was solved."""
    model, began = built(task, start, seed), time.process_time()
    bar = task.baselines["loss"] / 10
    found: dict[str, Any] = {"loss": float("inf"), "solved after": None, "failure": ""}
    options = {
        "optimizer": "adam",
        "rate": rate,
        "schedule": "constant",
        "weight_decay": 0.0,
        "clip": 1.0,
        "seed": seed,
    }
    run = sy.Run(task, model, epochs=UPDATES // LOOK, keep="last", **options)
    try:
        for _ in run:
            losses = [row["valid loss"] for row in run.epoch_log[1:]]
            found["loss"] = min([found["loss"], *losses])
            if losses and losses[-1] < bar:
                break
        losses = [row["valid loss"] for row in run.epoch_log[1:]]
    except sy.SteelyardError as error:
        found["failure"] = str(error)[:200]
    solved = [i for i, loss in enumerate(losses, 1) if loss < bar]
    found |= {"loss": min(losses, default=float("inf")), "solved after": solved[0] * LOOK if solved else None}
    return found | {"CPU seconds": round(time.process_time() - began, 1)}


def let_through(task: sy.Task, start: str, seed: int) -> float:
    """The relative gradient over the longest lag, before training."""
    table = memory(built(task, start, seed), first_batch(task, "valid").inputs[:32])
    return float(table.rows[-1]["gradient"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["adding", "copying"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", nargs="+", default=[""], help="beginnings of names")
    told = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results" / f"{datetime.date.today()}.json"
    result = json.loads(path.read_text()) if path.exists() else {"runs": []}
    result |= {"updates": UPDATES, "hidden": HIDDEN, "torch": torch.__version__, "python": platform.python_version()}
    starts = [start for start in STARTS if start.startswith(tuple(told.starts))]

    def keep() -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    done = {(row["task"], row["T"], row["start"], row["seed"]) for row in result["runs"]}
    for seed in range(told.seeds):
        for name in told.tasks:
            for length in told.lengths:
                for start in starts:
                    if (name, length, start, seed) in done:
                        continue
                    task = task_of(name, length, seed)
                    row = {"task": name, "T": length, "start": start, "seed": seed}
                    row |= trained(task, start, seed, PLAIN if start.startswith("rnn") else GATED)
                    row["let through"] = let_through(task, start, seed)
                    result["runs"].append(row)
                    keep()
                    print(row, flush=True)
    for name in told.tasks:
        for start in STARTS:
            for length in told.lengths:
                rows = [r for r in result["runs"] if (r["task"], r["T"], r["start"]) == (name, length, start)]
                if rows:
                    solved = sum(r["solved after"] is not None for r in rows)
                    loss = statistics.fmean(r["loss"] for r in rows)
                    print(f"{name}:{length} {start}: solved {solved} of {len(rows)}, mean lowest loss {loss:.4f}")


if __name__ == "__main__":
    main()

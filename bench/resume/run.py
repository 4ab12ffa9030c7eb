"""Training that is killed with SIGKILL at random moments and resumed, against the same training in one go: equal bytes?

A child process trains an MLP on augmented digits with AdamW, accumulation and an average of the weights, and draws
from the global generators of Python, numpy and torch for each batch. Its state is written every few steps. The parent
kills it after a random time, wherever it is, in a step or in the writing of its state, and starts it again until it
ends. Weights, moments, average, best weights, generators and the log but for its times must be those of the run in one
go.

    python bench/resume/run.py [--trials 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steelyard.learn.average import Ema
from steelyard.learn.run import train
from steelyard.learn.task import Batch, Split
from steelyard.learn.tasks import task
from steelyard.learn.treefile import read_tree, write_tree

HERE = Path(__file__).parent


def life(folder: Path, ready: Any) -> None:
    """What the child does: train, going on from the state in the folder if there is one."""
    torch.set_num_threads(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    digits = task("digits", model="mlp", shots=10)

    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for batch in digits.batches(split, epoch):
            noise = 0.1 * random.gauss(0, 1) * np.random.randn() * torch.randn(batch.inputs.shape)
            yield Batch(batch.inputs + noise, batch.targets) if split == "train" else batch

    ready.set()
    options: dict[str, Any] = {"epochs": 6, "seed": 1, "every": 5, "average": Ema(0.9), "accumulate": 2, "clip": 1.0}
    train(replace(digits, batches=batches), checkpoint=folder, resume=True, progress=False, **options)


def child(folder: Path, delay: float | None) -> bool:
    """Train in a process, killed ``delay`` seconds after it is ready; whether it came to its end."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=life, args=(folder, ready))
    process.start()
    ready.wait()
    process.join(delay)
    if process.is_alive():
        process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child ended with {process.exitcode}")
    return process.exitcode == 0


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Everything in the state but for times, as bytes, and the log."""
    tree = read_tree(folder / "state.safetensors")
    del tree["steps"]
    tree["epochs"] = [{k: v for k, v in row.items() if k != "seconds"} for row in tree["epochs"]]
    write_tree(tree, folder / "compared.safetensors")
    lines = (folder / "steps.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return (folder / "compared.safetensors").read_bytes(), rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    told = parser.parse_args()
    draws = random.Random(told.seed)
    task("digits", model="mlp", shots=10)  # so that no child has to import what it needs
    equal, kills = 0, []
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        child(Path(place) / "whole", None)
        took = time.perf_counter() - start
        whole = outcome(Path(place) / "whole")
        for trial in range(told.trials):
            folder, count = Path(place) / str(trial), 0
            while not child(folder, draws.uniform(0, took / 3) if count < 3 else None):
                count += 1
            equal += outcome(folder) == whole
            kills.append(count)
            print(f"trial {trial}: killed {count} times, equal so far {equal} of {trial + 1}", flush=True)
    figures = {"equal": equal, "trials": told.trials, "kills": sum(kills), "steps": len(whole[1])}
    print(figures)
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "figures": figures, "kills": kills}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A search of `shrink` that is killed with SIGKILL at a random moment and goes on: the same file, and what is lost?

    python bench/interrupted/run.py [--trials 20] [--epochs 12] [--seed 0]

A child process shrinks a small net on digits, rounding and training included, and keeps what it finds in a folder. Once
it runs to its end; then, in each trial, it is killed somewhere in the first 97 % of the time that this took, wherever
it is, and started again. The file must be that of the search in one go, byte for byte. Lost are the processor seconds
of both parts beyond those of the search in one go (the median of three, from the same start).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import steelyard as sy
from steelyard.learn.models import model
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks import task as find_task
from steelyard.shrinking.within import shrink

HERE = Path(__file__).parent
Told = argparse.Namespace


def material() -> tuple[Task, nn.Module]:
    """A task and a net that is trained for it."""
    found = find_task("digits")
    task = found.with_model(lambda: model("mlp", found.interface, widths=(64, 32)))
    return task, sy.train(task, build_seeded(task), epochs=12, progress=False).model


def life(task: Task, net: nn.Module, folder: Path, epochs: int, ready: Any) -> None:
    """What the child does."""
    ready.set()
    shrink(net, task, folder / "small.safetensors", tolerance=0.03, epochs=epochs, checkpoint=folder / "kept")


def child(task: Task, net: nn.Module, folder: Path, told: Told, delay: float | None) -> tuple[bool, float, float]:
    """Shrink in a process that is killed after `delay` seconds; whether it ended by itself, CPU and wall seconds."""
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = fork.Process(target=life, args=(task, net, folder, told.epochs, ready))
    process.start()
    ready.wait()
    start = time.perf_counter()
    process.join(delay)
    if process.is_alive():
        process.kill()
    process.join()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child ended with {process.exitcode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.exitcode == 0, cpu, wall


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("trials", 20), ("epochs", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    told = parser.parse_args()
    torch.set_num_threads(1)
    draws, (task, net) = random.Random(told.seed), material()
    shrink(net, task, tolerance=0.03, epochs=1)  # so that no child has to import what it needs
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        whole = [child(task, net, Path(place) / f"whole {i}", told, None) for i in range(3)]
        wanted = (Path(place) / "whole 0" / "small.safetensors").read_bytes()
        cpu, wall = (float(np.median([row[i] for row in whole])) for i in (1, 2))
        for trial in range(told.trials):
            folder, moment = Path(place) / str(trial), draws.uniform(0, 0.97)
            ended, first, _ = child(task, net, folder, told, moment * wall)
            _, second, _ = child(task, net, folder, told, None)
            same = (folder / "small.safetensors").read_bytes() == wanted
            rows.append({"moment": moment, "killed": not ended, "same": same, "CPU s lost": first + second - cpu})
            print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    lost = [row["CPU s lost"] for row in rows if row["killed"]]
    summary = {"trials": len(rows), "killed": len(lost), "same": sum(row["same"] for row in rows)}
    summary |= {"CPU s of a search": cpu, "spread of three": max(r[1] for r in whole) - min(r[1] for r in whole)}
    summary |= {"CPU s lost, median": float(np.median(lost)), "CPU s lost, most": max(lost)}
    print(json.dumps(summary, indent=1))
    (HERE / "results").mkdir(exist_ok=True)
    result = {"told": vars(told), "cpus": os.cpu_count(), "summary": summary, "trials": rows}
    (HERE / "results" / f"{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

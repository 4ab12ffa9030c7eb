"""A search of `shrink` that is killed with SIGKILL at a random share of it and goes on: the same file, what is lost?

    python bench/interrupted/run.py [--kills 20] [--epochs 12] [--seed 0]

A child process shrinks a small net on digits, rounding and training included, and keeps what it finds in a folder.
Three times it runs to its end. Then, until there were `--kills` of them, it is killed once it and the processes that it
started have taken a random share of the processor seconds of that (so that a busy machine does not matter), wherever it
is, and started again. The file must be that of the search in one go, byte for byte. Lost are the processor seconds of
both parts beyond those of the search in one go (the median of three); the longest unit of work, a candidate or an
epoch, is told beside it.
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
from steelyard.shrinking import search as searching
from steelyard.shrinking.within import shrink
from steelyard.shrinking.work import Work

HERE = Path(__file__).parent
Told = argparse.Namespace


def material() -> tuple[Task, nn.Module]:
    """A task and a net that is trained for it."""
    found = find_task("digits")
    task = found.with_model(lambda: model("mlp", found.interface, widths=(64, 32)))
    return task, sy.train(task, build_seeded(task), epochs=12, progress=False).model


def life(task: Task, net: nn.Module, folder: Path, epochs: int, ready: Any) -> None:
    """What the child does."""
    units: dict[str, float] = {}

    class Noted(Work):
        """Keeps the seconds of the longest unit of each kind."""

        def took(self, kind: str, count: float, seconds: float) -> None:
            super().took(kind, count, seconds)
            units[kind] = max(units.get(kind, 0.0), self.each(kind) if kind == "epochs" else seconds)

    searching.Work = lambda say: Noted(say, time.process_time)  # type: ignore[assignment, misc]
    ready.set()
    shrink(net, task, folder / "small.safetensors", tolerance=0.03, epochs=epochs, checkpoint=folder / "kept")
    (folder / "units.json").write_text(json.dumps(units))


def seconds_of(process: int) -> float:
    """Processor seconds of a process and of those that it started; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(seconds_of(int(child)) for child in children)


def child(task: Task, net: nn.Module, folder: Path, told: Told, moment: float | None) -> tuple[bool, float]:
    """Shrink in a process that is killed after `moment` processor seconds; whether it ended by itself, and seconds."""
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = fork.Process(target=life, args=(task, net, folder, told.epochs, ready))
    process.start()
    ready.wait()
    assert process.pid is not None
    start = seconds_of(process.pid)
    while moment is not None and process.is_alive():
        if seconds_of(process.pid) - start >= moment:
            process.kill()
            break
        process.join(0.002)
    process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child ended with {process.exitcode}")
    return process.exitcode == 0, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("kills", 20), ("epochs", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    told = parser.parse_args()
    torch.set_num_threads(1)
    draws, (task, net) = random.Random(told.seed), material()
    shrink(net, task, tolerance=0.03, epochs=1)  # so that no child has to import what it needs
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        whole = [child(task, net, Path(place) / f"whole {i}", told, None)[1] for i in range(3)]
        wanted = (Path(place) / "whole 0" / "small.safetensors").read_bytes()
        units = json.loads((Path(place) / "whole 0" / "units.json").read_text())
        cpu = float(np.median(whole))
        while sum(row["killed"] for row in rows) < told.kills:
            folder, share = Path(place) / str(len(rows)), draws.random()
            ended, first = child(task, net, folder, told, share * cpu)
            journal = folder / "kept" / "journal.jsonl"
            kept = len(journal.read_text().splitlines()) if journal.exists() else 0
            _, second = child(task, net, folder, told, None)
            same = (folder / "small.safetensors").read_bytes() == wanted
            rows.append({"share": share, "killed": not ended, "answers kept": kept, "same": same,
                         "CPU s lost": first + second - cpu})  # fmt: skip
            print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    lost = [row["CPU s lost"] for row in rows if row["killed"]]
    summary = {"trials": len(rows), "killed": len(lost), "same": sum(row["same"] for row in rows)}
    summary |= {"same of the killed": sum(row["same"] for row in rows if row["killed"])}
    summary |= {"CPU s of a search": cpu, "spread of three": max(whole) - min(whole), "longest unit, CPU s": units}
    summary |= {"CPU s lost, median": float(np.median(lost)), "CPU s lost, most": max(lost)}
    print(json.dumps(summary, indent=1))
    (HERE / "results").mkdir(exist_ok=True)
    result = {"told": vars(told), "cpus": os.cpu_count(), "summary": summary, "trials": rows}
    (HERE / "results" / f"{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

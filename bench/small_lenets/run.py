"""How few bytes hold a LeNet? Training for size beside Deep Compression's recipe, and the uncompressed net.

    python bench/small_lenets/run.py --data FOLDER --model lenet-300-100 [--folds 0 1 2] [--prices 2e-6 4e-6]

Adds rows to results/DATE-TASK-MODEL.json, one for each net that was written: the bytes of its one file, and its error
in a fresh process that read that file into a net with another start. MNIST: 10,000 images in ten parts; fold k proves
on part 9 - k, stops by the part before and trains on the other 8,000. Fashion-MNIST: the published test images prove,
5,000 of the others stop. Training images are shifted by up to one pixel, for the uncompressed net (`--still`: not) and
for the small ones alike. FOLDER holds mnist10k.npz, and fashion-mnist/ with the four IDX files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

import steelyard as sy
from steelyard.learn.data import Examples
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks.mnist import shifted
from steelyard.shrinking.deep import deep_compression
from steelyard.shrinking.settings import Settings

PART = 1000  # images of MNIST that prove


def data(name: str, folder: Path, model: str, fold: int, shift: int, batch: int) -> Task:
    """The task, its splits those of a fold."""
    if name == "fashion-mnist":
        return sy.task(name, path=str(folder / name), model=model, seed=fold, shift=shift, batch_size=batch)
    task = sy.task("mnist", path=str(folder / "mnist10k.npz"), model=model)
    with np.load(folder / "mnist10k.npz") as found:
        x = torch.from_numpy(found["images"][:, None]).float().div(255).roll(PART * fold, 0)
        y = torch.from_numpy(found["labels"].astype(np.int64)).roll(PART * fold, 0)
    cut = {"train": slice(0, -2 * PART), "valid": slice(-2 * PART, -PART), "test": slice(-PART, None)}
    augment = partial(shifted, most=shift) if shift else None
    parts = [{split: z[rows] for split, rows in cut.items()} for z in (x, y)]
    return replace(task, batches=Examples(parts[0], parts[1], batch, fold, augment))


def error(model: nn.Module, task: Task, split: str) -> float:
    """In per cent."""
    return 100 - 100 * sy.evaluate(model, task, split).column("value")[0]


def measured(files: list[Path], told: argparse.Namespace, fold: int) -> list[tuple[float, float]]:
    """Errors (validation, test) in a fresh process that has only the files and the architecture."""
    command = [sys.executable, __file__, "--data", str(told.data), "--task", told.task, "--model", told.model]
    command += ["--folds", str(fold), "--measure", *map(str, files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


class Mean(nn.Module):
    """The logarithm of the mean of what several nets hold for probable."""

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(x).softmax(-1) for net in self.nets]).mean(0).log()


def reference(task: Task, epochs: int, seed: int) -> nn.Module:
    """An uncompressed net."""
    net = build_seeded(task, seed)
    sy.train(task, net, epochs=epochs, rate=2e-3, seed=seed, keep="best", progress=False)
    return net


def nets(told: argparse.Namespace, fold: int) -> Iterator[tuple[str, str, Any, float]]:
    """Each net that is to be written: method, note, weights, seconds of CPU since the one before."""
    task = data(told.task, told.data, told.model, fold, told.shift, told.batch)
    clock = time.process_time()
    net = reference(task, told.reference, fold)
    yield "uncompressed", f"{told.reference} epochs", sy.from_module(net), time.process_time() - clock
    if told.still:
        plain = data(told.task, told.data, told.model, fold, 0, told.batch)
        still = reference(plain, told.reference, fold)
        yield "uncompressed, no shifts", f"{told.reference} epochs", sy.from_module(still), time.process_time() - clock
    if told.deep:
        clock = time.process_time()
        *_, last = deep_compression(net, task, Settings(), fold)
        yield "deep compression", last.note, last.weights, time.process_time() - clock
    if told.prices:
        clock = time.process_time()
        settings = sy.Tight(told.tolerance, tuple(told.prices), told.epochs, told.more, tune_epochs=2)
        teacher, by = None, ""
        if told.teachers > 1:
            others = [reference(task, told.reference, 100 * k + fold) for k in range(1, told.teachers)]
            teacher, by = Mean([net, *others]), f", {told.teachers} teachers"
            said = [round(error(teacher, task, split), 2) for split in ("valid", "test")]
            sys.stdout.write(json.dumps({"fold": fold, "errors of the teachers": said}) + "\n")
        for stage in sy.tighten(net, task, settings, fold, teacher=teacher):
            yield f"tight, {stage.name}{by}", stage.note, stage.weights, time.process_time() - clock


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each method the means over folds, and how far its error is from that of the fold's own uncompressed net."""
    own = {row["fold"]: row for row in rows if row["method"] == "uncompressed"}
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method and row["fold"] in own]
        sizes = [row["bytes"] for row in found]
        line = f"{method}: {len(found)} folds, {np.mean(sizes):,.0f} bytes ({min(sizes):,} to {max(sizes):,})"
        for split in ("validation error", "test error"):
            apart = [row[split] - own[row["fold"]][split] for row in found]
            half = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart) if len(apart) > 1 else np.nan
            mean = np.mean([row[split] for row in found])
            line += f"; {split} {mean:.2f} %, {np.mean(apart):+.2f} +- {half:.2f} beside its own"
        yield line + f"; 1/{own[found[0]['fold']]['bytes'] / np.mean(sizes):.0f}"


def main() -> None:
    """Train, write, measure, note."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="mnist", choices=("mnist", "fashion-mnist"))
    parser.add_argument("--model", default="lenet-300-100")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prices", type=float, nargs="*", default=[])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--more", type=int, default=20, help="epochs at each further price")
    parser.add_argument("--reference", type=int, default=40, help="epochs of the uncompressed net")
    parser.add_argument("--teachers", type=int, default=1, help="the net itself, and others of other starts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--still", action="store_true")
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--summary", action="store_true", help="of the rows that are there")
    parser.add_argument("--measure", type=Path, nargs="+")
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.measure:
        task = data(told.task, told.data, told.model, told.folds[0], 0, told.batch)
        for file in told.measure:
            model = build_seeded(task, 10_000)
            sy.into_module(sy.open(file), model)
            sys.stdout.write(json.dumps([error(model, task, split) for split in ("valid", "test")]) + "\n")
        return
    results = Path(__file__).parent / "results" / f"{date.today():%Y-%m-%d}-{told.task}-{told.model}.json"
    if told.summary:
        sys.stdout.write("\n".join(summary(json.loads(results.read_text()))) + "\n")
        return
    for fold in told.folds:
        with tempfile.TemporaryDirectory() as folder:
            made, files = [], []
            for method, note, weights, seconds in nets(told, fold):
                files.append(Path(folder) / f"{len(files)}.safetensors")
                made.append({"fold": fold, "method": method, "bytes": sy.write(weights, files[-1]), "note": note,
                             "CPU seconds": round(seconds, 1), "epochs": told.epochs, "shift": told.shift})  # fmt: skip
            for row, errors in zip(made, measured(files, told, fold), strict=True):
                row |= dict(zip(("validation error", "test error"), errors, strict=True))
                sys.stdout.write(json.dumps(row) + "\n")
            rows = json.loads(results.read_text()) if results.exists() else []
            results.write_text(json.dumps([*rows, *made], indent=1) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

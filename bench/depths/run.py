"""How deep a plain network trains from each start: 7 activations x 4 depths x 3 seeds on digits, without normalisation.

DEPTH hidden layers of 64 units and a head of 10, no normalisation and no shortcuts; 84 runs for each start. One recipe
for all: Adam, batches of 64, 30 epochs, a rate that rises to 5e-4 over the first 30 % and falls by a cosine; cross
entropy on the 75 % of the images that are not for the proof, without augmentation; accuracy on the 25 % that are. A
start that looks at data gets the first 256 training images. A run is given up when its loss is not finite, or when its
mean over the 12th epoch is still above 2.25 (ln 10 = 2.303 is the loss of a guess); its accuracy is that of the time.

    pip install --no-deps --target peer lsuv==0.3.0
    python bench/depths/run.py --peer peer [--starts auto he] [--missing] [--patient]

Runs are added to those of the newest result, so that a start can be measured by itself; --patient gives nothing up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.learn.intervals import wilson

HERE = Path(__file__).parent
WIDTH, EPOCHS, BATCH, RATE, RISE = 64, 30, 64, 5e-4, 0.3
DEPTHS = (10, 30, 50, 100)
SEEDS = (0, 1, 2)
ENOUGH = 0.95
LATEST, HOPELESS = 12, 2.25  # epochs, mean loss
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
}
Start = Callable[[nn.Module, Tensor, int], None]


def net(depth: int, activation: str) -> nn.Sequential:
    """`depth` hidden layers of 64 units and a head."""
    hidden = [part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), ACTIVATIONS[activation]())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def each(fill: Callable[[Tensor], object]) -> Start:
    """A start that fills every matrix by itself, with biases of 0."""

    def start(model: nn.Module, _batch: Tensor, _seed: int) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                fill(layer.weight)
                nn.init.zeros_(layer.bias)

    return start


def keras_he_normal(weight: Tensor) -> None:
    """A normal distribution cut at 2 standard deviations, of variance 2 / fan in after the cut."""
    std = math.sqrt(2 / weight.shape[1]) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def lsuv(model: nn.Module, batch: Tensor, _seed: int) -> None:
    """The peer, as its documentation calls it."""
    from lsuv.lsuvinit import LSUVinit

    with contextlib.redirect_stdout(io.StringIO()):
        LSUVinit(model, batch, verbose=False)


def auto(model: nn.Module, batch: Tensor, seed: int) -> None:
    """Ours, without any other choice."""
    sy.init_(model, "auto", batch, seed=seed)


def data(model: nn.Module, batch: Tensor, seed: int) -> None:
    """Ours, by data."""
    sy.init_(model, "data", batch, seed=seed)


STARTS: dict[str, Start] = {
    "torch default": lambda *_: None,
    "xavier": each(nn.init.xavier_normal_),
    "he": each(lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")),
    "keras glorot_uniform": each(nn.init.xavier_uniform_),
    "keras he_normal": each(keras_he_normal),
    "lsuv": lsuv,
    "data": data,
    "auto": auto,
}


class Digits:
    """The images as rows of 64 numbers."""

    def __init__(self) -> None:
        task = sy.task("digits", augment=False)
        (x, y), (more_x, more_y) = self._all(task, "train"), self._all(task, "valid")
        self.x, self.y = torch.cat([x, more_x]), torch.cat([y, more_y])
        self.test_x, self.test_y = self._all(task, "test")

    @staticmethod
    def _all(task: Any, split: str) -> tuple[Tensor, Tensor]:
        batches = list(task.batches(split, 0))
        return torch.cat([b.inputs for b in batches]).flatten(1), torch.cat([b.targets for b in batches])


def trained(model: nn.Module, images: Digits, seed: int, patient: bool) -> dict[str, Any]:
    """One run by the recipe: the accuracies after each epoch, and why it ended early if it did."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(images.x) / BATCH)
    found: list[float] = []
    ended = ""
    for epoch in range(EPOCHS):
        losses = []
        for i, rows in enumerate(torch.randperm(len(images.x), generator=order).split(BATCH)):
            done = (epoch * per_epoch + i) / (EPOCHS * per_epoch)
            factor = done / RISE if done < RISE else (1 + math.cos(math.pi * (done - RISE) / (1 - RISE))) / 2
            optimizer.param_groups[0]["lr"] = RATE * factor
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images.x[rows]), images.y[rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            found.append(float((model(images.test_x).argmax(1) == images.test_y).double().mean()))
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            ended = "loss not finite"
        elif epoch + 1 == LATEST and mean > HOPELESS and not patient:
            ended = "loss of a guess"
        if ended:
            break
    return {"last": found[-1], "best": max(found), "epochs": len(found), "ended": ended}


def one(start: str, activation: str, depth: int, seed: int, images: Digits, patient: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = net(depth, activation)
    before = time.process_time()
    STARTS[start](model, images.x[:256], seed)
    starting = time.process_time() - before
    row = {"start": start, "activation": activation, "depth": depth, "seed": seed}
    row |= trained(model, images, seed, patient)
    return {**row, "seconds to start": round(starting, 3), "seconds": round(time.process_time() - before, 2)}


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each start: how many runs have enough at the last epoch and at the best, with Wilson's interval, by depth."""
    table = []
    for start in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == start]
        last = sum(row["last"] >= ENOUGH for row in mine)
        low, high = wilson(last, len(mine))
        line: dict[str, Any] = {"start": start, "runs": len(mine), "last >= 95 %": last}
        line |= {"share": round(last / len(mine), 3), "low": round(low, 3), "high": round(high, 3)}
        line["best >= 95 %"] = sum(row["best"] >= ENOUGH for row in mine)
        for what, values in (("depth", DEPTHS), ("activation", ACTIVATIONS)):
            for value in values:
                group = [row for row in mine if row[what] == value]
                line[f"{what} {value}"] = f"{sum(row['last'] >= ENOUGH for row in group)}/{len(group)}"
        line["median accuracy"] = sorted(row["last"] for row in mine)[len(mine) // 2]
        line["given up"] = sum(bool(row["ended"]) for row in mine)
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="the folder with lsuv")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--activations", nargs="+", choices=list(ACTIVATIONS), default=list(ACTIVATIONS))
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--missing", action="store_true", help="only the runs that the newest result lacks")
    parser.add_argument("--patient", action="store_true")
    told = parser.parse_args()
    if told.peer:
        sys.path.insert(0, told.peer)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images = Digits()
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine, "torch": torch.__version__}
    path = HERE / "results" / f"{result['date']}.json"
    path.parent.mkdir(exist_ok=True)
    newest = max(path.parent.glob("*.json"), default=None)
    kept = json.loads(newest.read_text())["rows"] if newest else []
    keys = ("start", "activation", "depth", "seed")
    rows = {tuple(row[k] for k in keys): row for row in kept}
    wanted = [(s, a, d, n) for d in told.depths for s in told.starts for a in told.activations for n in SEEDS]
    wanted = [key for key in wanted if not (told.missing and key in rows)]
    for i, key in enumerate(wanted, 1):
        rows[key] = one(*key, images, told.patient)
        print(f"{i}/{len(wanted)} {' '.join(map(str, key))}: {rows[key]['last']:.4f} {rows[key]['ended']}", flush=True)
        result |= {"figures": figures(list(rows.values())), "rows": list(rows.values())}
        path.write_text(json.dumps(result, indent=1) + "\n")
    for line in result["figures"]:
        print(line)


if __name__ == "__main__":
    main()

"""A start by data beside `lsuv` 0.3.0: the standard deviation of every layer of twelve architectures, and time.

The peer gets each model and its first input; where it fails, the line says so. Times are processor seconds of 50 layers
of 512 units on a batch of 256, in pairs one after the other; the limit beside them is one forward pass.

    pip install --no-deps --target peer lsuv==0.3.0
    python bench/start/run.py --peer peer [--repeats 7]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.claims.architectures import ZOO, standard_deviations

HERE = Path(__file__).parent


def furthest(model: nn.Module, batch: tuple[Tensor, ...]) -> float:
    """The largest |std - 1| over executed layers."""
    return max(abs(std - 1) for std in standard_deviations(model, batch).values())


def deep() -> nn.Module:
    """50 layers of 512 ReLU units."""
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(50) for layer in (nn.Linear(512, 512), nn.ReLU())])


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--repeats", type=int, default=7)
    told = parser.parse_args()
    sys.path.insert(0, told.peer)
    from lsuv.lsuvinit import LSUVinit

    from steelyard.learn.start import init_

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, (build, batch) in ZOO.items():
        torch.manual_seed(0)
        model = build()
        table = init_(model, "data", batch)
        row: dict[str, Any] = {
            "architecture": name,
            "passes": table.meta["passes"],
            "steelyard": furthest(model, batch),
        }
        row["gradient, largest over smallest"] = table.meta["gradient scale, largest over smallest"]
        torch.manual_seed(0)
        model = build()
        try:
            with contextlib.redirect_stdout(open(os.devnull, "w")):
                LSUVinit(model, batch[0], verbose=False)
            row["lsuv"] = furthest(model, batch)
        except (TypeError, RuntimeError, IndexError, ValueError, AttributeError) as error:
            row["lsuv"] = f"fails: {type(error).__name__}"
        rows.append(row)
        print(row)
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"steelyard": [], "lsuv": [], "one forward pass": []}
    for _ in range(told.repeats):
        for who, work in {
            "steelyard": lambda net: init_(net, "data", x),
            "lsuv": lambda net: LSUVinit(net, x, verbose=False),
            "one forward pass": lambda net: net(x),
        }.items():
            net = deep()
            times[who].append(seconds(lambda work=work, net=net: work(net)))
    median = {who: statistics.median(t) for who, t in times.items()}
    figures = {f"50 layers, {who}, CPU s": round(t, 4) for who, t in median.items()}
    figures["lsuv over steelyard"] = round(median["lsuv"] / median["steelyard"], 2)
    figures["within 0.02, steelyard"] = sum(row["steelyard"] <= 0.02 for row in rows)
    figures["within 0.02, lsuv"] = sum(not isinstance(row["lsuv"], str) and row["lsuv"] <= 0.02 for row in rows)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "repeats": told.repeats}
    result |= {"figures": figures, "architectures": rows, "seconds": times}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What watching every tensor at every step costs in a training step of a transformer of 19 M parameters, on one thread.

One process for each watcher: ours, TensorBoard's histograms of weights and gradients, W&B offline (`log="all"`), and
nothing at all for the noise. In each, steps are taken in turn with and without the watcher, in pairs; figures are
processor seconds, medians of the pairs' differences over the median plain step, and, as a step varies by more than ours
costs, the seconds within the watcher's own functions (W&B's run in hooks all over the model). Losses are compared bit
by bit.

    python -m venv peer && peer/bin/pip install torch==2.13.0 tensorboard wandb
    python bench/watch/run.py --peer peer/bin/python [--pairs 8] [--sequences 16]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def measured(python: str, which: str, pairs: int, sequences: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / "loop.py"), which, folder, str(pairs), str(sequences)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def bandwidth() -> float:
    """Bytes read a second by the sum of squares of 76 MB: the limit of anything that looks at every weight."""
    x, seconds = np.ones(19_000_000, np.float32), []
    for _ in range(7):
        start = time.process_time()
        x.dot(x)
        seconds.append(time.process_time() - start)
    return float(x.nbytes / statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True, help="a Python with torch, tensorboard and wandb")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=16, help="of 128 tokens, in a batch")
    given = parser.parse_args()
    figures: dict[str, Any] = {"bandwidth of reading, GB/s": round(bandwidth() / 1e9, 1)}
    losses = {}
    for which in ("none", "steelyard", "tensorboard", "wandb"):
        python = sys.executable if which in ("none", "steelyard") else given.peer
        found = measured(python, which, given.pairs, given.sequences)
        differences = [b - a for a, b in zip(found["plain"], found["watched"], strict=True)]
        step = statistics.median(found["plain"])
        losses[which] = found["losses"]
        figures[which] = {
            "plain step, s": step,
            "cost of watching, s": statistics.median(differences),
            "cost, % of a step": 100 * statistics.median(differences) / step,
            "within its functions, % of a step": found["inside"] and 100 * found["inside"] / step,
            "quartiles, % of a step": [100 * q / step for q in statistics.quantiles(differences)],
        }
        if found["looks"]:
            figures[which]["a look, every 50 steps, % of a step"] = 100 * (statistics.median(found["looks"]) / step - 1)
        print(which, json.dumps(figures[which]), flush=True)
    figures["losses that ours changed"] = sum(a != b for a, b in zip(losses["none"], losses["steelyard"], strict=True))
    figures["parameters"] = found["parameters"]
    print({k: v for k, v in figures.items() if not isinstance(v, dict)})
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    date = datetime.date.today().isoformat()
    result = {"date": date, "machine": machine, "pairs": given.pairs, "sequences": given.sequences, "figures": figures}
    name = f"{date}.json" if given.sequences == 16 else f"{date}-{given.sequences}-sequences.json"
    (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

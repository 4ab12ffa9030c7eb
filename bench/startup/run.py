"""How long the command line keeps a person waiting: importing the package, and `inspect` of a 300-tensor file.

The limit is Python itself, measured beside it in the same interleaved run; the figure for the import is the difference.

    python bench/startup/run.py [--repeats 15]
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

HERE = Path(__file__).parent


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    import numpy as np

    import steelyard as sy

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "300.safetensors")
        sy.write(sy.Weights.of({f"layers.{i}.weight": np.zeros((64, 64), np.float32) for i in range(300)}), file)
        entry = str(Path(sys.executable).parent / "steelyard")
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "import steelyard": [sys.executable, "-c", "import steelyard"],
            "inspect, 300 tensors": [entry, "inspect", file],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for name in commands:
            seconds(commands[name])  # warm the file cache
        for _ in range(repeats):
            for name in commands:
                times[name].append(seconds(commands[name]))
    median = {name: statistics.median(t) for name, t in times.items()}
    figures = {
        "python, s": median["python"],
        "import steelyard beyond python, s": median["import steelyard"] - median["python"],
        "inspect of a 300-tensor file, whole process, s": median["inspect, 300 tensors"],
        "inspect, slowest of all repeats, s": max(times["inspect, 300 tensors"]),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure:.4f}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "repeats": repeats, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

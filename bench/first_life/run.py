"""How small, how good, how long: `steelyard run` with its embedded recipe, several seeds, each a fresh process.

Writes results/<date>.json beside this file and prints the table of seeds. Sizes are those of the two files on disk;
accuracies are those of the fresh process that re-read the small file; seconds are wall and CPU of the whole command.

    python bench/first_life/run.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def one(seed: int, folder: str) -> dict[str, float]:
    """One run; its figures."""
    out = Path(folder) / str(seed)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "steelyard", "run", "--seed", str(seed), "--out", str(out)]
    status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    tables = {t["title"]: t for t in json.loads((out / "tables.json").read_text())}
    stages = tables["Stages"]["rows"]
    first = next(row for row in stages if row["stage"] == "trained")
    last = stages[-1]
    big, small = ((out / f"{name}.safetensors").stat().st_size for name in ("weights", "small"))
    return {
        "seed": seed, "status": status, "bytes before": big, "bytes after": small, "ratio": big / small,
        "accuracy before": first["accuracy"], "accuracy after": last["accuracy"],
        "lost, percentage points": 100 * (first["accuracy"] - last["accuracy"]),
        "wall seconds": wall, "CPU seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        rows = [one(seed, folder) for seed in range(seeds)]
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    lost = [row["lost, percentage points"] for row in rows]
    least = min(row["ratio"] for row in rows)
    print(f"mean lost {statistics.mean(lost):.3f} pp, worst {max(lost):.3f}; least ratio {least:.1f}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "rows": rows}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a conversion costs: memory as the model grows, the rate beside `cp` of the same files, and going on after kills.

A model of bfloat16 tensors of 100 MB and of many small ones lies in shards of 2 GB and is written as shards of 1.5 GB,
byte for byte the same tensors. `cp -r` of the model and the conversion take turns on the same disk; `cp` is followed
by `sync` of what it wrote, since the conversion has its files on the disk before they get their names. CPU seconds
are user and system of the whole process. Memory is the highest resident size of the process, import included.

    python bench/convert/run.py [--gigabytes 1 2 10] [--repeats 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import steelyard as sy
from steelyard.core.weights import Weight, Weights
from steelyard.formats.sharded import Sharded

HERE = Path(__file__).parent
LARGE = (6250, 8000)  # bfloat16: 100 MB
INDEX = "model.safetensors.index.json"
RUN = """
import os, re, sys
from steelyard.cli import main
status = main(sys.argv[1:])
peak = re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\t", " "))
open(os.environ["PEAK"], "w").write(peak[1])
sys.exit(status)
"""


def model(gigabytes: int, folder: Path) -> None:
    """Tensors of 100 MB, with ten small ones after each; random bits, which no disk makes smaller."""
    rng = np.random.default_rng(0)
    dtype = sy.dtype("bfloat16").numpy
    one = rng.integers(0, 1 << 16, LARGE, np.uint16)
    small = rng.integers(0, 1 << 16, 4096, np.uint16).view(dtype)

    def large(i: int) -> np.ndarray:
        return (one + np.uint16(i)).view(dtype)

    spec = sy.Spec.of(LARGE, "bfloat16")
    items = []
    for i in range(10 * gigabytes):
        items.append(Weight(f"layers.{i}.weight", spec, lambda i=i: large(i)))
        items += [Weight.of(f"layers.{i}.norm.{j}", small) for j in range(10)]
    folder.mkdir()
    sy.write(Weights(items), folder / INDEX, Sharded(2_000_000_000))


def cost(command: list[str], then: list[str] | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a process, with `then` of both one after the other, and its highest resident memory."""
    peak = Path(os.environ["PEAK"])
    peak.unlink(missing_ok=True)
    start = time.perf_counter()
    total = {"wall, s": 0.0, "cpu, s": 0.0}
    for words in (command, then):
        if words is None:
            continue
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{words} ended with {child.returncode}")
        total["cpu, s"] += usage.ru_utime + usage.ru_stime
    total["wall, s"] = time.perf_counter() - start
    if peak.exists():  # what the process says of itself: what wait4 says is at least the size of this one
        total["peak, MB"] = int(peak.read_text()) / 1000
    return total


def convert(source: Path, target: Path, *options: str) -> list[str]:
    shards = ["--shard-size", "1.5GB"]
    return [sys.executable, "-c", RUN, "convert", str(source), str(target / INDEX), *shards, *options]


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def digest(folder: Path) -> str:
    """Of the names and bytes of all files."""
    found = hashlib.blake2b()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def rates(source: Path, work: Path, repeats: int, options: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """`cp` and conversions in turns: medians, and the rate of each over that of `cp` in its own round."""
    rounds: dict[str, list[dict[str, float]]] = {"cp": [], **{name: [] for name in options}}
    for _ in range(repeats):
        copy = empty(work / "copy")
        files = sorted(str(path) for path in source.iterdir())
        synced = ["sync", *(str(copy / Path(path).name) for path in files)]
        rounds["cp"].append(cost(["cp", *files, str(copy)], synced))
        empty(copy)
        for name, more in options.items():
            rounds[name].append(cost(convert(source, empty(work / "target"), *more)))
            empty(work / "target")
    found = {}
    for name, costs in rounds.items():
        found[name] = {key: round(statistics.median(c[key] for c in costs), 2) for key in costs[0]}
        ratios = [cp["wall, s"] / c["wall, s"] for cp, c in zip(rounds["cp"], costs, strict=True)]
        found[name]["rate over that of cp"] = round(statistics.median(ratios), 2)
        found[name]["lowest of the rounds"] = round(min(ratios), 2)
    return found


def resumed(source: Path, work: Path, kills: int) -> dict[str, object]:
    """Killed at random moments and started again: whether the bytes are those of one go."""
    target = empty(work / "target")
    lasted = cost(convert(source, target))["wall, s"]
    whole = digest(target)
    empty(target)
    moments, done = random.Random(0), 0
    for _ in range(kills):
        job = subprocess.Popen(convert(source, target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            job.wait(moments.uniform(0.2, 0.8) * lasted)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
            done += 1
        if (target / INDEX).exists():
            break
    if not (target / INDEX).exists() or any(target.glob(".*")):
        cost(convert(source, target))
    same = digest(target) == whole
    left = [path.name for path in target.iterdir() if path.name.startswith(".")]
    empty(target)
    return {"kills": done, "the same bytes as in one go": same, "left behind": left}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=int, nargs="+", default=[1, 2, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None)
    settings = parser.parse_args()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        work = Path(folder)
        os.environ["PEAK"] = str(work / "peak")
        for gigabytes in settings.gigabytes:
            source = work / "model"
            model(gigabytes, source)
            last = gigabytes == settings.gigabytes[-1]
            options = (
                {"resharded": []}
                if last
                else {"resharded": [], "verified": ["--verify"], "as float32": ["--dtype", "f32"]}
            )
            figures[f"{gigabytes} GB"] = rates(source, work, 2 if last else settings.repeats, options)
            if gigabytes == settings.gigabytes[min(1, len(settings.gigabytes) - 1)]:
                figures["killed, 2 GB"] = resumed(source, work, 6)
            print(json.dumps(figures, indent=1))
            shutil.rmtree(source)
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    machine["memory, GB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "repeats": settings.repeats}
    result |= {"largest tensor, MB": 100, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

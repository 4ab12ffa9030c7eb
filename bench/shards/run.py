"""What a set of many files costs: 92,000 tensors in 100 sparse files of half a terabyte, listed strictly.

The measure is `json.loads` of the index and of all headers, which checks nothing, in the same interleaved run.

    python bench/shards/run.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILES, TENSORS, SHAPE = 100, 920, (2048, 1408)
OPEN = """
import sys
from steelyard.explain import inventory
from steelyard import formats
from steelyard.formats import sharded
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
weights = formats.open(sys.argv[1])
after = peak()
print(len(weights), weights.nbytes, after - before)
"""


def write_set(folder: Path) -> None:
    size = 2 * SHAPE[0] * SHAPE[1]
    files: dict[str, str] = {}
    for number in range(FILES):
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        names = [f"model.layers.{number}.mlp.experts.{i}.gate_proj.weight" for i in range(TENSORS)]
        spans = [[i * size, (i + 1) * size] for i in range(TENSORS)]
        entries = {
            name: {"dtype": "BF16", "shape": SHAPE, "data_offsets": span}
            for name, span in zip(names, spans, strict=True)
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + TENSORS * size)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": FILES * TENSORS * size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def plain(folder: Path) -> None:
    json.loads((folder / "model.safetensors.index.json").read_bytes())
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    from steelyard import formats

    ours: list[float] = []
    loads: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder)
        for _ in range(repeats):
            for times, call in ((loads, plain), (ours, formats.open)):
                start = resource.getrusage(resource.RUSAGE_SELF)
                call(folder)
                end = resource.getrusage(resource.RUSAGE_SELF)
                times.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        done = subprocess.run([sys.executable, "-c", OPEN, name], capture_output=True, text=True, check=True)
    count, nbytes, memory = map(int, done.stdout.split())
    assert count == FILES * TENSORS
    figures = {
        "tensors": count,
        "bytes of tensors": nbytes,
        "json.loads of index and headers, CPU s": statistics.median(loads),
        "strict open, CPU s": statistics.median(ours),
        "ratio of medians": statistics.median(ours) / statistics.median(loads),
        "memory above import, kB": memory,
    }
    for title, figure in figures.items():
        print(f"{title}: {figure:.4g}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "repeats": repeats, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Is a strict listing of a very large header as cheap as reading its JSON, and `inspect` of an ordinary file quick?

A sparse safetensors file of 1 TB with 92,592 tensors, named as those of a model with experts. Every way is a fresh
process, interleaved with the others; its own processor time is counted from after the imports, and for the whole
process; memory is the peak above what it was after the imports; bytes are those that the process asked the kernel for.

    python bench/header/run.py [--repeats 9]
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

PROBE = """
import json, sys, time
{imports}
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
def read():
    return int(open("/proc/self/io").read().split()[1])
path = sys.argv[1]
nothing = -read() + read()
rss, before, start = status("VmRSS"), read(), time.process_time()
{work}
cpu, asked = time.process_time() - start, read() - before - nothing
print(json.dumps({{"cpu": cpu, "rss": (status("VmHWM") - rss) * 1024, "read": asked, "found": found}}))
"""
HEADER = """
file = open(path, "rb", buffering=0)
header = file.read(int.from_bytes(file.read(8), "little"))
"""
SAFE = """
found = 0
with safe_open(path, "{framework}") as file:
    for name in file.keys():
        part = file.get_slice(name)
        row = name, part.get_shape(), part.get_dtype()
        found += 1
"""
LISTED = """
weights, found, stored, elements = sy.open(path), 0, 0, 0
for item in weights.values():
    row = item.name, item.spec.shape, item.spec.dtype, item.stored, item.origin
    stored += item.stored
    found += 1
totals = weights.size, weights.nbytes, stored
"""
WAYS = {
    "json.loads of the header": ("", HEADER + "found = len(json.loads(header)) - 1"),
    "steelyard, listed": ("import steelyard as sy\nfrom steelyard.formats.safetensors import Safetensors", LISTED),
    "steelyard, listed, every format imported before": (
        "import steelyard as sy\nfrom steelyard.formats import FORMATS\nlist(FORMATS.values())",
        LISTED,
    ),
    "safetensors.safe_open, numpy, listed": ("from safetensors import safe_open", SAFE.format(framework="np")),
}


def model() -> tuple[dict[str, Any], int]:
    """The header of a model of 94 layers with 326 experts each, and the bytes of its data."""
    entries: dict[str, Any] = {}
    at = 0

    def add(name: str, *shape: int) -> None:
        nonlocal at
        size = 2
        for n in shape:
            size *= n
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size

    add("model.embed_tokens.weight", 151936, 4096)
    for layer in range(94):
        prefix = f"model.layers.{layer}."
        for part in "qkvo":
            add(f"{prefix}self_attn.{part}_proj.weight", 4096, 4096)
        add(f"{prefix}input_layernorm.weight", 4096)
        add(f"{prefix}post_attention_layernorm.weight", 4096)
        add(f"{prefix}mlp.gate.weight", 326, 4096)
        for expert in range(326):
            add(f"{prefix}mlp.experts.{expert}.down_proj.weight", 4096, 1408)
            add(f"{prefix}mlp.experts.{expert}.gate_proj.weight", 1408, 4096)
            add(f"{prefix}mlp.experts.{expert}.up_proj.weight", 1408, 4096)
    add("lm_head.weight", 151936, 4096)
    return {"__metadata__": {"format": "pt"}, **entries}, at


def sparse(path: Path, header: dict[str, Any], data: int, separators: tuple[str, str] = (",", ":")) -> int:
    """Write a file whose data is a hole, and the bytes of its header."""
    raw = json.dumps(header, separators=separators).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data)
    return len(raw)


def process(command: list[str], check: bool = True) -> tuple[float, subprocess.CompletedProcess[str]]:
    """The processor seconds of a whole process, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=check)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def probe(way: str, path: Path) -> dict[str, float]:
    imports, work = WAYS[way]
    whole, done = process([sys.executable, "-c", PROBE.format(imports=imports, work=work), str(path)])
    return {**json.loads(done.stdout), "whole": whole}


def interleaved(repeats: int, works: dict[str, Callable[[], dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of each figure of each work, all run by turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            runs[name].append(work())
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }


def tiny(folder: Path) -> dict[str, Any]:
    """Headers of a million and more entries of one byte, as the pattern takes them and as only a walk does."""
    figures = {}
    for name, separators, count in (("compact", (",", ":"), 1_350_000), ("spaced", (", ", ": "), 1_250_000)):
        path = folder / f"{name}.safetensors"
        entries = {f"{i:x}": {"dtype": "U8", "shape": [], "data_offsets": [i, i + 1]} for i in range(count)}
        size = sparse(path, entries, count, separators)
        found = probe("steelyard, listed", path)
        figures[f"{count} tiny entries, {name}"] = {
            "header, B": size,
            "cpu, s": found["cpu"],
            "memory above import, B": found["rss"],
            "allowed (50 MB and 6 headers), B": 50e6 + 6 * size,
        }
        path.unlink()
    return figures


def torch_mode(path: Path) -> str:
    """How safe_open for torch ends on the large file."""
    code = PROBE.format(imports="from safetensors import safe_open", work=SAFE.format(framework="pt"))
    _, done = process([sys.executable, "-c", code, str(path)], check=False)
    return "listed it" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:200]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    import numpy as np
    import safetensors

    import steelyard as sy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, ordinary = folder / "large.safetensors", folder / "ordinary.safetensors"
        header, data = model()
        size = sparse(large, header, data)
        names = [f"model.layers.{i // 6}.part{i % 6}.weight" for i in range(300)]
        sy.write(sy.Weights.of({name: np.zeros((64, 64), np.float32) for name in names}), ordinary)
        entry = str(Path(sys.executable).parent / "steelyard")
        commands = {
            "python itself": [sys.executable, "-c", "pass"],
            "inspect, 300 tensors": [entry, "inspect", str(ordinary)],
            "inspect, the large file": [entry, "inspect", str(large)],
            "inspect --json, the large file": [entry, "inspect", str(large), "--json"],
        }
        works: dict[str, Callable[[], dict[str, float]]] = {way: lambda way=way: probe(way, large) for way in WAYS}
        works |= {name: lambda words=words: {"whole": process(words)[0]} for name, words in commands.items()}
        figures: dict[str, Any] = dict(interleaved(repeats, works))
        figures |= tiny(folder)
        figures["safetensors.safe_open, torch, listed"] = torch_mode(large)
    ours, plain = figures["steelyard, listed"], figures["json.loads of the header"]
    figures["listing over json.loads, cpu after imports"] = ours["cpu"] / plain["cpu"]
    figures["listing over json.loads, whole process"] = ours["whole"] / plain["whole"]
    asked = figures["steelyard, listed, every format imported before"]["read"]
    figures["bytes asked for beyond the header and its length"] = asked - 8 - size  # what tells the format
    for key, figure in figures.items():
        print(f"{key}: {figure}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {**machine, "safetensors": safetensors.__version__},
        "repeats": repeats,
        "file": {"bytes": 8 + size + data, "header, B": size, "tensors": len(header) - 1},
        "figures": figures,
    }
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

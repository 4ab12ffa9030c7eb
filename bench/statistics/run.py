"""What exact statistics cost: beside a plain torch loop, torch.sum, and reading the file at all. And how much memory.

CPU seconds (user + system) of this process, medians of interleaved repeats in one run. Torch's tensors are in memory
already; Steelyard reads its file from the page cache, so reading is part of its figure and not of theirs.

    python bench/statistics/run.py [--repeats 5] [--megabytes 256]
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
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = ((4096, 4096), (11008, 4096), (1024, 4096), (1024, 1024), (4096,))  # of one layer
HUGE = 2**31 + 2**20  # elements


def plain_loop(tensors: dict) -> None:
    """What one writes without thinking: ten operations and a histogram for each tensor, in float32."""
    import torch

    for tensor in tensors.values():
        x = tensor.float()
        found = [x.min(), x.max(), x.mean(), x.std(), x.abs().sum(), x.norm()]
        found += [(x == 0).sum(), x.isnan().sum(), x.isinf().sum(), x.median()]
        torch.histc(x, 64)
        [float(f) for f in found]


def read_only(path: str) -> None:
    """The bytes into one small buffer, as Steelyard reads them."""
    buffer = bytearray(1 << 19)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def rates(folder: Path, dtype: str, megabytes: int, repeats: int) -> dict[str, dict[str, float]]:
    import numpy as np
    import torch

    import steelyard as sy
    from steelyard.kernels.counts import count_16, count_32

    kind = sy.dtype(dtype)
    rng = np.random.default_rng(0)
    weights, count = {}, 0
    while count < megabytes * 1_000_000:
        for k, shape in enumerate(SHAPES):
            values = (rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(kind.numpy)
            weights[f"layers.{len(weights) // len(SHAPES)}.{k}"] = values
            count += values.nbytes
    path = str(folder / f"{dtype}.safetensors")
    sy.write(sy.Weights.of(weights), path)
    as_torch = getattr(torch, dtype)
    bits = {2: np.int16, 4: np.int32}[kind.bits // 8]
    tensors = {name: torch.from_numpy(x.view(bits)).view(as_torch) for name, x in weights.items()}
    patterns = [x.reshape(-1).view(f"u{kind.bits // 8}") for x in weights.values()]
    tables = np.zeros((2, 65536), np.uint32 if kind.bits == 16 else np.uint64)
    kernel = count_16 if kind.bits == 16 else count_32

    def sums_from_file() -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name in weights:
                file.get_tensor(name).sum()

    work: dict[str, Callable[[], object]] = {
        "statistics": lambda: sy.statistics(sy.open(path), norms=False),
        "statistics with rows and columns": lambda: sy.statistics(sy.open(path)),
        "counting kernel, in memory": lambda: [kernel(p, tables) for p in patterns],
        "torch.sum, in memory": lambda: [t.sum() for t in tensors.values()],
        "torch.sum, from the file": sums_from_file,
        "reading the file": lambda: read_only(path),
        "plain torch loop": lambda: plain_loop(tensors),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for name in work:
        work[name]()
    for _ in range(repeats):
        for name in work:
            times[name].append(timed(work[name]))
    os.unlink(path)
    gigabytes = count / 1e9
    return {
        name: {
            "GB per CPU s": gigabytes / statistics.median(t[0] for t in found),
            "GB per s": gigabytes / statistics.median(t[1] for t in found),
        }
        for name, found in times.items()
    }


BEFORE = """
import sys
import numpy as np, ml_dtypes, steelyard as sy
from steelyard.explain import statistics
if sys.argv[1] == "kernels":  # the first call of machine code brings what loads it
    from steelyard.kernels import counts
    counts.count_16(np.zeros(4, np.uint16), np.zeros((2, 65536), np.uint32))
elif sys.argv[1] != "import":
    sy.statistics(sy.open(sys.argv[1]))
print(next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def sparse(path: Path, code: str, width: int) -> str:
    """A file of zeros that takes no room on the disk."""
    span = HUGE * width
    head = json.dumps({"w": {"dtype": code, "shape": [HUGE >> 14, 1 << 14], "data_offsets": [0, span]}}).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + span)
    return str(path)


def output(code: str, *arguments: str, **environment: str) -> tuple[str, float]:
    """What a program prints last, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (done.stdout.split() or [""])[-1], seconds


def memory(folder: Path) -> dict[str, float]:
    """Peak memory above that of the imports, for more than 2^31 elements."""
    base, loaded = int(output(BEFORE, "import")[0]), int(output(BEFORE, "kernels")[0])
    found = {"one loop of machine code, loaded: MB above import": (loaded - base) / 1e6}
    for code, width in (("BF16", 2), ("F32", 4)):
        path = sparse(folder / f"{code}.safetensors", code, width)
        output(BEFORE, path)  # compiles what is not kept yet
        text, seconds = output(BEFORE, path)
        found[f"{code}, {HUGE:,} elements: MB above import and loaded kernels"] = (int(text) - loaded) / 1e6
        found[f"{code}, {HUGE:,} elements: MB above import alone"] = (int(text) - base) / 1e6
        found[f"{code}, {HUGE:,} elements: CPU s"] = seconds
        os.unlink(path)
    return found


FIRST = """
import numpy as np, ml_dtypes, steelyard as sy
w = {str(d): np.ones((1500, 1000), d) for d in (np.float32, ml_dtypes.bfloat16)}
sy.statistics(sy.Weights.of(w))
"""


def start(folder: Path) -> dict[str, float]:
    """The first use of the compiled kernels, a later one, and a small file that needs none."""
    import numpy as np

    import steelyard as sy

    cache = str(folder / "cache")
    first = output(FIRST, NUMBA_CACHE_DIR=cache)[1]
    later = statistics.median(output(FIRST, NUMBA_CACHE_DIR=cache)[1] for _ in range(3))
    small = str(folder / "small.safetensors")
    sy.write(sy.Weights.of({f"layers.{i}": np.ones((100, 100), np.float32) for i in range(20)}), small)
    verb = "import sys; from steelyard.cli import main; main(['inspect', sys.argv[1], *sys.argv[2:]])"
    return {
        "first use of the kernels, CPU s": first,
        "a later use in a new process, CPU s": later,
        "compiling, CPU s": first - later,
        "inspect --stats of a file of 800 kB, CPU s": statistics.median(
            output(verb, small, "--stats")[1] for _ in range(5)
        ),
        "inspect of it, CPU s": statistics.median(output(verb, small)[1] for _ in range(5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in ("bfloat16", "float16", "float32"):
            found = rates(folder, dtype, arguments.megabytes, arguments.repeats)
            ours = found["statistics"]["GB per CPU s"]
            loop, total = found["plain torch loop"], found["torch.sum, in memory"]
            figures[dtype] = {
                **found,
                "times the CPU speed of the plain loop": ours / loop["GB per CPU s"],
                "share of torch.sum's rate, CPU": ours / total["GB per CPU s"],
                "share of torch.sum's rate, wall": found["statistics"]["GB per s"] / total["GB per s"],
                "share of the rate of reading the file, CPU": ours / found["reading the file"]["GB per CPU s"],
            }
        figures["memory"] = memory(folder)
        figures["start"] = start(folder)
    print(json.dumps(figures, indent=1))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    settings = {"repeats": arguments.repeats, "megabytes": arguments.megabytes, "torch threads": 1}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, **settings, "figures": figures}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

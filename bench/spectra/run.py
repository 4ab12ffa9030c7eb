"""The power-law exponent of 50 matrices beside WeightWatcher's, and the processor time of both.

Both read the same matrices and report on every one. Times are of the whole process, and less that of the imports, in
pairs one after the other. The limit is the full set of singular values of each matrix, timed beside them in numpy.

    python -m venv peer && peer/bin/pip install torch==2.13.0 weightwatcher==0.7.7
    python bench/spectra/run.py --peer peer/bin/python [--model model.safetensors] [--repeats 3]

Without --model, all matrices are made here; with it, up to 24 are taken from a real model.
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
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COUNT = 50
OURS = """
import sys, json, numpy as np, numpy.linalg, steelyard as sy
from steelyard.explain.spectra import spectra
if sys.argv[2] == "run":
    print(json.dumps({r["name"]: r["alpha"] for r in spectra(sy.open(sys.argv[1])).rows}))
"""
PEER = """
import sys, json, logging, numpy as np, torch, weightwatcher as ww
if sys.argv[2] == "run":
    logging.disable(logging.CRITICAL)
    arrays = np.load(sys.argv[1])
    layers = {}
    for name in arrays.files:
        w = torch.from_numpy(arrays[name]); layers[name] = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layers[name].weight.data = w
    model = torch.nn.ModuleDict(layers)
    found = ww.WeightWatcher(model=model).analyze(plot=False)
    print(json.dumps({str(n).split(".")[-1]: float(a) for n, a in zip(found["longname"], found["alpha"])}))
"""
LIMIT = """
import sys, json, numpy as np, numpy.linalg
if sys.argv[2] == "run":
    arrays = np.load(sys.argv[1])
    for name in arrays.files: np.linalg.svd(arrays[name], compute_uv=False)
    print("{}")
"""


def matrices(model: str | None) -> dict[str, np.ndarray]:
    """Matrices of a model and of several laws, each named m00, m01, ..."""
    rng = np.random.default_rng(0)
    found = []
    if model:
        import steelyard as sy

        taken = sy.open(model).select(sy.where(min_ndim=2, min_size=100_000, kind="float"))
        found = [item.array().astype(np.float32) for item in list(taken.values()) if max(item.spec.shape) <= 4096][:24]
    shapes = [(768, 768), (3072, 768), (768, 3072), (2304, 768), (1536, 384)]  # of small transformers
    while len(found) < COUNT:
        rows, columns = shapes[len(found) % 5]
        kind = len(found) % 4
        x = rng.standard_normal((rows, columns))
        if kind == 1:
            x = rng.standard_t(2.5, (rows, columns))
        elif kind == 2:
            short = min(rows, columns)
            u, _, v = np.linalg.svd(x, full_matrices=False)
            x = (u * (1 + np.arange(short)) ** -0.7) @ v
        elif kind == 3:
            x = x + 3 * rng.standard_normal((rows, 8)) @ rng.standard_normal((8, columns))
        found.append((0.04 / x.std() * x).astype(np.float32))  # of one scale: the peer drops what lies below 1e-5
    return {f"m{i:02d}": x for i, x in enumerate(found)}


def run(python: str, code: str, file: str, mode: str) -> tuple[float, dict[str, float]]:
    """Processor seconds of a whole process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([python, "-c", code, file, mode], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return used, json.loads(lines[-1]) if lines else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    import steelyard as sy

    with tempfile.TemporaryDirectory() as folder:
        arrays = matrices(told.model)
        ours, theirs = str(Path(folder) / "m.safetensors"), str(Path(folder) / "m.npz")
        sy.write(sy.Weights.of(arrays), ours)
        np.savez(theirs, **arrays)
        programs = {
            "steelyard": (sys.executable, OURS, ours),
            "weightwatcher": (told.peer, PEER, theirs),
            "singular values alone": (sys.executable, LIMIT, theirs),
        }
        net: dict[str, list[float]] = {name: [] for name in programs}
        whole: dict[str, list[float]] = {name: [] for name in programs}
        alphas: dict[str, dict[str, float]] = {}
        for _ in range(told.repeats):
            for name, (python, code, file) in programs.items():
                idle, _ = run(python, code, file, "import")
                used, alphas[name] = run(python, code, file, "run")
                net[name].append(used - idle)
                whole[name].append(used)
    away = [abs(alphas["steelyard"][name] - alphas["weightwatcher"][name]) for name in arrays]
    figures: dict[str, float] = {}
    for what, times in (("whole process", whole), ("beyond imports", net)):
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        figures |= {f"{name}, {what}, CPU s": round(seconds, 2) for name, seconds in median.items()}
        figures[f"weightwatcher over steelyard, {what}"] = round(median["weightwatcher"] / median["steelyard"], 1)
    figures |= {
        "matrices": len(away),
        "exponents within 0.05": sum(a <= 0.05 for a in away),
        "largest difference of an exponent": round(max(away), 6),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "repeats": told.repeats}
    result["model"] = Path(told.model).name if told.model else None
    result |= {"seconds beyond imports": net, "seconds": whole, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

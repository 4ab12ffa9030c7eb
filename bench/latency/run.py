"""Is what `shrink --aim latency` writes faster on this processor, at the tolerance?

A CNN and a small transformer, trained from several seeds on 6,000 handwritten digits; `sy.shrink(..., aim="latency")`
at a tolerance of accuracy, proven on 2,500 digits. Time is processor seconds of ONNX Runtime on one thread, against the
model in float32 there: for one example and for 128, in 31 rounds in which both take turns.

Run: python bench/latency/run.py --data mnist10k.npz [--seeds 2] [--epochs 9] [--training 6] [--tolerance 0.01]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steelyard as sy
from steelyard.errors import VerdictError
from steelyard.learn.models import model as build

BAR = 1.5
MODELS: dict[str, dict[str, Any]] = {"cnn": {}, "transformer": {"width": 96, "layers": 2}}


def trial(name: str, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """One model, trained and made faster; or the verdict why not."""
    task = sy.task("mnist", path=a.data, seed=seed)
    task = task.with_model(lambda: build(name, task.interface, **MODELS[name]))
    model = sy.train(task, epochs=a.training, rate=2e-3, schedule="cosine", seed=seed, progress=False).model
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = sy.shrink(model, task, Path(folder) / "fast.onnx", aim="latency", tolerance=a.tolerance,
                              epochs=a.epochs, seed=seed)  # fmt: skip
        except VerdictError as verdict:
            return {"model": name, "seed": seed, "faster": 1.0, "verdict": str(verdict)}
    row, (one, many) = found.proof.rows[0], found.running.rows
    at_once = {c["candidate"]: c["faster when chosen"] for c in found.curve.rows if c["faster when chosen"]}
    forms = {name: gain for name, gain in at_once.items() if name.startswith("as it is")}
    return {
        "model": name, "seed": seed, "candidate": found.why.meta["candidate"],
        "accuracy before": row["accuracy before"],
        "accuracy": row["accuracy"], "loss at most": row["loss at most"], "bytes before": row["bytes before"],
        "bytes": row["bytes"], "faster": one["faster"], "faster at least": one["faster at least"],
        "faster, 128": many["faster"], "microseconds before": one["seconds before"] * 1e6,
        "microseconds": one["seconds"] * 1e6, "memory before": many["memory before"], "memory": many["memory"],
        "int8 alone, faster": max(forms.values(), default=None), "processor seconds": time.process_time() - began,
        "evaluations": found.proof.meta["evaluations"], "processor": found.running.meta["processor"],
        "tried": {c["candidate"]: [c["faster when chosen"], c["valid loss"]] for c in found.curve.rows},
    }  # fmt: skip


def main(a: argparse.Namespace) -> None:
    """All trials, then the means; what is found is kept as it comes."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    target = a.to or Path(__file__).parent / "results" / f"{date.today()}.json"
    for seed in range(a.first, a.first + a.seeds):
        for name in a.models:
            rows.append(trial(name, seed, a))
            print({key: value for key, value in rows[-1].items() if key != "tried"}, flush=True)
            target.write_text(json.dumps({"bar": BAR, "tolerance": a.tolerance, "rows": rows}, indent=1) + "\n")
    for name in a.models:
        gains = np.array([row["faster"] for row in rows if row["model"] == name])
        print(f"{name}: {gains.mean():.2f} times faster ({gains.min():.2f} to {gains.max():.2f}), bar {BAR}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--training", type=int, default=6, help="epochs of the original")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--to", type=Path)
    main(parser.parse_args())

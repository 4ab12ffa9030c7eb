"""How long does `shrink` search in a model of 23 to 25 million weights, in how many evaluations and in what memory?

    python bench/search/run.py --model FOLDER --sentences sentences.txt [--data mnist10k.npz] [--only encoder|layers]

Two models, nothing trained for size, one thread. The encoder: MiniLM-L6 (22.7 M), kept at a mean cosine of 0.99 on
2,000 sentences that nobody has labelled (1,000 for sensitivities, 400 to validate, 600 to prove). The layers:
784-3200-3200-3400-10 (24 M) on digits, trained for three epochs first, within a point of accuracy (6,000 to train,
1,500 to validate, 2,500 to prove). Said are processor seconds, those of processes that it starts included, wall
seconds, and what each kind of work took of them. The encoder needs the tokenizer: see `bench/small_minilm/encoder.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import steelyard as sy
from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy

HERE = Path(__file__).parent
WIDTHS = (784, 3200, 3200, 3400, 10)
KINDS = (
    "comparing the splits",
    "measuring the original",
    "making sensitivity",
    "making",
    "measuring",
    "proving",
    "re-reading",
    "done",
)
Made = tuple[nn.Module, sy.Task, float]


def encoder(told: argparse.Namespace) -> Made:
    """MiniLM, to do what it does; and the tolerance."""
    sys.path.insert(0, str(HERE.parent / "small_minilm"))
    from encoder import Encoder, batches

    source = sy.open(told.model / "model.safetensors")
    arrays = {name: x for name, x in source.arrays().items() if x.dtype == np.float32}
    model = Encoder({name: torch.from_numpy(x) for name, x in arrays.items()})
    lines = told.sentences.read_text().split("\n")[:2000]
    return model, sy.imitation(model, batches(told.model, lines), "cosine"), 0.01


def layers(told: argparse.Namespace) -> Made:
    """Wide layers that know digits."""
    found = np.load(told.data)
    images = torch.from_numpy(found["images"].reshape(-1, 784).astype(np.float32) / 255)
    labels = torch.from_numpy(found["labels"].astype(np.int64))
    ends = {"train": (0, 6000), "valid": (6000, 7500), "test": (7500, 10_000)}
    x, y = ({split: whole[a:b] for split, (a, b) in ends.items()} for whole in (images, labels))

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for a, b in pairwise(WIDTHS):
            parts += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    data = Examples(x, y, 100, 0)  # type: ignore[arg-type]
    task = sy.Task("digits, 24 M", build, data, cross_entropy, {"accuracy": accuracy})
    return sy.train(task, epochs=3, rate=3e-4, progress=False).model, task, 0.01


def clock() -> float:
    """Processor seconds of this process and of those that it started."""
    return sum(os.times()[:4])


def one(name: str, made: Callable[[argparse.Namespace], Made], told: argparse.Namespace) -> dict[str, Any]:
    """Shrink, and what it took."""
    model, task, tolerance = made(told)
    parts: dict[str, float] = defaultdict(float)
    said: list[tuple[str, float]] = []

    def say(what: str, _share: float) -> None:
        kind, now = next(kind for kind in KINDS if what.startswith(kind)), clock()
        if said:
            parts[said[-1][0]] += now - said[-1][1]
        said.append((kind, now))

    cpu, wall = clock(), time.perf_counter()
    found = sy.shrink(model, task, tolerance=tolerance, epochs=0, say=say)
    cpu, wall = clock() - cpu, time.perf_counter() - wall
    row = found.proof.rows[0]
    result = {"model": name, "weights": sum(p.numel() for p in model.parameters()), "CPU s": cpu, "wall s": wall}
    result |= {"evaluations": found.proof.meta["evaluations"], "bytes before": row["bytes before"]}
    result |= {"bytes": row["bytes"], "loss": row["loss"], "loss at most": row["loss at most"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result |= {"peak MB": peak, "CPU s by kind": dict(parts)}
    tried = [{k: r.get(k) for k in ("candidate", "bytes", "valid loss", "loss at most")} for r in found.curve.rows]
    return result | {"cores": os.cpu_count(), "load": os.getloadavg()[0], "candidates": tried}


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "sentences", "data"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--only", choices=["encoder", "layers"])
    told = parser.parse_args()
    torch.set_num_threads(1)
    for name, made in {"encoder": encoder, "layers": layers}.items():
        if told.only not in (None, name):
            continue
        found = one(name, made, told)
        print(json.dumps(found, indent=1))
        (HERE / "results").mkdir(exist_ok=True)
        text = json.dumps(found, indent=1, default=float)
        (HERE / "results" / f"{date.today()}-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

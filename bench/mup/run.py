"""Is the best rate at width 64 within a step of sqrt(2) of the best at 1024? With `mup`, torch's own way, and the peer.

An MLP and a small CNN on 8x8 digits, a transformer on characters of Moby Dick; 50 to 100 steps on small batches, each
seen once; the mean over seeds of the log of the final training loss, at rates 2^(k/2) around the best. The peer is
`mup` 1.0.0 on the MLP, in an environment of its own.

    python -m venv peer && peer/bin/pip install torch numpy mup
    python bench/mup/run.py --text moby-dick.txt --peer peer/bin/python [--seeds 5] [--only mlp]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search import best, digit_batches, final_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn

from steelyard.learn.models import model
from steelyard.learn.mup import mup
from steelyard.learn.optimizers import OPTIMIZERS
from steelyard.learn.task import Interface
from steelyard.learn.widths import built

HERE = Path(__file__).parent
WIDTHS = (64, 256, 1024)
TIME = 8  # characters in a sequence
MLP_STEPS, MLP_SIZE = 100, 32


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    """Channels width / 4 and width / 2, images of 4x4 and 2x2."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width // 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


@dataclass(frozen=True)
class Setting:
    """What is trained: a function from widths to models, batches by seed, an optimizer, where the walk starts."""

    factory: Callable[[int], nn.Module]
    batches: Callable[[int], Sequence[tuple[Tensor, Tensor]]]
    optimizer: str
    start: int


def texts(path: str, steps: int, size: int) -> tuple[Callable[[int], list[tuple[Tensor, Tensor]]], int]:
    """Batches of sequences and the characters that follow, by seed; and how many characters there are."""
    raw = Path(path).read_text(encoding="utf-8", errors="replace")[:200_000]
    known = sorted(set(raw))
    codes = torch.tensor([known.index(c) for c in raw])

    def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(codes) - TIME - 1, (steps, size), generator=generator)
        pieces = [torch.stack([codes[s : s + TIME + 1] for s in row]) for row in starts.tolist()]
        return [(p[:, :-1], p[:, 1:]) for p in pieces]

    return batches, len(known)


def search(setting: Setting, way: str, seeds: int) -> dict[int, dict[str, Any]]:
    """The best rate at each width, the walk starting from the one before."""
    found: dict[int, dict[str, Any]] = {}
    start = setting.start
    for width in WIDTHS:

        def trained(rate: float, seed: int, width: int = width) -> float:
            served = setting.batches(seed)
            if way == "mup":
                made = mup(setting.factory, width, seed=seed, batch=served[0][0][:1])
                net, optimize = made.model, made.optimizer(setting.optimizer)
            else:
                net, optimize = built(setting.factory, width, seed), OPTIMIZERS[setting.optimizer]
            return final_loss(net, optimize(net.parameters(), lr=rate), served)

        found[width] = best(trained, seeds, start)
        start = found[width]["step"]
    return found


def peer(python: str, setting: Setting, seeds: int, images: Tensor, labels: Tensor) -> dict[int, dict[str, Any]]:
    """The same with `mup`, on batches of digits as of the MLP."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/digits.npz", images=images.numpy(), labels=labels.numpy())
        numbers = (*map(str, (seeds, setting.start, MLP_STEPS, MLP_SIZE)),)
        told = [f"{folder}/digits.npz", setting.optimizer, json.dumps(WIDTHS), *numbers]
        done = subprocess.run([python, HERE / "peer.py", *told], capture_output=True, text=True, check=True)
    return {int(width): row for width, row in json.loads(done.stdout.splitlines()[-1]).items()}


def settings(text: str, images: Tensor, labels: Tensor) -> dict[str, Setting]:
    def digits(steps: int, size: int) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
        return lambda seed: digit_batches(images, labels, steps, size, seed)

    characters, vocabulary = texts(text, 50, 4)
    interface = Interface((TIME,), vocabulary, vocabulary)

    def transformer(width: int) -> nn.Module:
        return model("transformer", interface, width=width, layers=1)

    return {
        "mlp, sgd": Setting(mlp, digits(MLP_STEPS, MLP_SIZE), "sgd", -8),
        "mlp, adam": Setting(mlp, digits(MLP_STEPS, MLP_SIZE), "adam", -12),
        "cnn, adam": Setting(cnn, digits(80, 32), "adam", -13),
        "transformer, adam": Setting(transformer, characters, "adam", -14),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--peer", required=True, help="a Python that has mup")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="only settings whose names begin so; their rows are replaced")
    told = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    (HERE / "results").mkdir(exist_ok=True)
    target = HERE / "results" / f"{datetime.date.today().isoformat()}.json"
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    rows = json.loads(target.read_text())["rows"] if told.only and target.exists() else []
    rows = [row for row in rows if not row["setting"].startswith(told.only)]
    for name, setting in settings(told.text, images, labels).items():
        if not name.startswith(told.only):
            continue
        seeds = max(told.seeds // 2, 2) if name.startswith("transformer") else told.seeds
        for way in ("mup", "standard", *(("mup 1.0.0",) if name.startswith("mlp") else ())):
            began = time.process_time()
            if way == "mup 1.0.0":
                found = peer(told.peer, setting, seeds, images, labels)
            else:
                found = search(setting, way, seeds)
            shift = found[WIDTHS[-1]]["step"] - found[WIDTHS[0]]["step"]
            fine = round(found[WIDTHS[-1]]["vertex"] - found[WIDTHS[0]]["vertex"], 2)
            row = {
                "setting": name,
                "way": way,
                "shift in steps of sqrt(2)": shift,
                "of the vertex": fine,
                "seeds": seeds,
            }
            print(row, {w: f["step"] for w, f in found.items()}, round(time.process_time() - began, 1), flush=True)
            rows.append(row | {"widths": found})
            result = {"date": target.stem, "machine": machine, "rows": rows}
            target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

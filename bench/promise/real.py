"""Is the promise of `shrink` kept on real data? Twenty small models, linear to transformer, over random splits.

    python bench/promise/real.py --data FOLDER [--splits 20] [--minutes 15] [--tolerance 0.02] [--size 0]

Images (handwritten digits, Fashion-MNIST, at 14 x 14), their rows as sequences, characters of a novel after the ten
before them, and tables (how often each letter occurs in 120 characters; is somebody speaking there?). In each split
1,500 examples train, 600 validate, 1,000 prove, drawn anew; all others, 6,900 to 17,000 that nothing has seen, are the
truth. A drop in truth is measured with its own standard error: a promise counts as broken where the measured drop is
above the tolerance, and as surely broken where it is by two of these errors.
FOLDER has mnist10k.npz, fashion-mnist/ and moby-dick.txt. `--size` epochs are trained for size at the first price of a
bit (0: nothing is), and the finished file is read in this process, to spare hundreds of interpreters. Splits come in
turn, until the processor minutes are over.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard import formats
from steelyard.errors import ModelError, VerdictError
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.intervals import wilson
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.shrinking import within

SIZES = {"train": 1500, "valid": 600, "test": 1000}
MOST = 20_000  # examples of a data set
WINDOW, CONTEXT = 120, 10


class Text(nn.Module):
    """A class for the last of some characters: embedded, then by a layer of a kind."""

    def __init__(self, kind: str, symbols: int, width: int = 32):
        super().__init__()
        self.embed, self.kind = nn.Embedding(symbols, 16), kind
        self.place = nn.Parameter(0.1 * torch.randn(CONTEXT, 16))
        self.inner: nn.Module
        if kind == "gru":
            self.inner = nn.GRU(16, width, batch_first=True)
        elif kind == "conv":
            self.inner = nn.Sequential(nn.Conv1d(16, width, 3), nn.ReLU(), nn.Conv1d(width, width, 3), nn.ReLU())
        elif kind == "transformer":
            self.inner = nn.TransformerEncoderLayer(16, 4, 2 * width, 0.0, batch_first=True)
        elif kind == "mlp":
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(16 * CONTEXT, 2 * width), nn.ReLU())
        else:
            self.inner = nn.Flatten()
        self.head = nn.LazyLinear(symbols)

    def forward(self, x: Tensor) -> Tensor:
        found = self.embed(x) + self.place
        if self.kind == "conv":
            found = self.inner(found.transpose(1, 2))[..., -1]
        elif self.kind == "gru":
            found = self.inner(found)[0][:, -1]
        elif self.kind == "transformer":
            found = self.inner(found)[:, -1]
        else:
            found = self.inner(found)
        return self.head(found)  # type: ignore[no-any-return]


class Rows(nn.Module):
    """A class for an image that is read row by row."""

    def __init__(self, kind: str):
        super().__init__()
        self.enter = nn.Linear(14, 24)
        self.place = nn.Parameter(0.1 * torch.randn(14, 24))
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
        self.inner = nn.GRU(24, 32, batch_first=True) if kind == "gru" else layer
        self.head = nn.Linear(32 if kind == "gru" else 24, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(self.enter(x[:, 0]) + self.place)
        found = found[0][:, -1] if isinstance(found, tuple) else found.mean(1)
        return self.head(found)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Layers that add to what they are given."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.enter, self.norm = nn.Linear(features, 32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(2))
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        found = self.enter(x)
        for block in self.blocks:
            found = found + block(self.norm(found))
        return self.head(found)  # type: ignore[no-any-return]


def mlp(*widths: int) -> Callable[[], nn.Module]:
    """Layers of these widths, ReLU between them."""

    def build() -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    return build


def cnn(norm: bool) -> nn.Module:
    """Two convolutions and a linear layer."""
    norms = (nn.BatchNorm2d(8), nn.BatchNorm2d(16)) if norm else (nn.Identity(), nn.Identity())
    return nn.Sequential(nn.Conv2d(1, 8, 3), norms[0], nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), norms[1],
                         nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))  # fmt: skip


def pooled(images: np.ndarray) -> Tensor:
    """(examples, 1, 14, 14), between 0 and 1."""
    return torch.from_numpy(images[:MOST].reshape(-1, 1, 14, 2, 14, 2).mean((3, 5)).astype(np.float32) / 255)


def sources(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and targets of each set of data."""
    digits = np.load(folder / "mnist10k.npz")
    images, labels = (
        np.frombuffer(gzip.decompress((folder / "fashion-mnist" / name).read_bytes()), np.uint8, offset=offset)
        for name, offset in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8))
    )
    book = (folder / "moby-dick.txt").read_text(encoding="utf-8").lower()
    known = sorted("abcdefghijklmnopqrstuvwxyz .,\n")
    codes = np.array([known.index(c) if c in known else len(known) for c in book])
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    windows = np.random.default_rng(0).permutation(windows)[:MOST]
    parts = [book[i : i + WINDOW] for i in range(0, len(book) - WINDOW, WINDOW)]
    letters = np.array([[part.count(c) for c in known] for part in parts], np.float32)
    speaks = np.array([any(c in part for c in '"\u201c\u201d') for part in parts])
    return {
        "digits": (pooled(digits["images"]), torch.from_numpy(digits["labels"].astype(np.int64))),
        "fashion": (pooled(images.reshape(-1, 28, 28)), torch.from_numpy(labels[:MOST].astype(np.int64))),
        "text": (torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, -1])),
        "table": (torch.from_numpy((letters - letters.mean(0)) / (letters.std(0) + 0.01)),
                  torch.from_numpy(speaks.astype(np.int64))),
    }  # fmt: skip


def models(features: int, symbols: int) -> Mapping[str, Callable[[], nn.Module]]:
    """By 'data, kind'."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for data in ("digits", "fashion"):
        found |= {
            f"{data}, linear": mlp(196, 10),
            f"{data}, mlp": mlp(196, 32, 10),
            f"{data}, gru": lambda: Rows("gru"),
        }
        found[f"{data}, cnn"] = lambda: cnn(False)
    found |= {"digits, deep mlp": mlp(196, 48, 32, 10), "digits, cnn with norms": lambda: cnn(True)}
    found["digits, transformer"] = lambda: Rows("transformer")
    for kind in ("linear", "mlp", "conv", "gru", "transformer"):
        found[f"text, {kind}"] = lambda kind=kind: Text(kind, symbols)  # type: ignore[misc]
    found |= {"table, linear": mlp(features, 2), "table, mlp": mlp(features, 24, 2)}
    found |= {"table, deep mlp": mlp(features, 32, 16, 2), "table, residual": lambda: Residual(features, 2)}
    return found


def tasks(name: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor, split: int) -> tuple[sy.Task, sy.Task]:
    """The task of a split, and the same with all that is left as its test examples."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    ends = np.cumsum([0, *SIZES.values()])
    part = {kind: order[a:b] for kind, a, b in zip(SIZES, ends[:-1], ends[1:], strict=True)}

    def complete() -> nn.Module:
        model = build()
        model(x[:2])  # layers that take their width from it
        return model

    def made(part: Mapping[Any, Tensor]) -> sy.Task:
        data = Examples({k: x[i] for k, i in part.items()}, {k: y[i] for k, i in part.items()}, 64, split)
        return sy.Task(name, complete, data, cross_entropy, {"accuracy": accuracy}, about={"split": split})

    return made(part), made({**part, "test": order[ends[-1] :]})


def one(name: str, given: sy.Task, truth: sy.Task, split: int, told: argparse.Namespace) -> dict[str, Any]:
    """One model, trained, shrunk and measured."""
    epochs = 4 * told.epochs if name.startswith("table") else told.epochs
    model = sy.train(given, epochs=epochs, seed=split, progress=False).model
    row: dict[str, Any] = {"model": name, "split": split}
    start = time.process_time()
    try:
        found = within.shrink(model, given, tolerance=told.tolerance, epochs=told.size, seed=split)
    except (VerdictError, ModelError) as error:
        return row | {"refused": str(error)[:200]}
    cpu, said = time.process_time() - start, found.proof.rows[0]
    before = outcomes(model, truth)["accuracy"]
    sy.into_module(found.weights, model)
    lost = before - outcomes(model, truth)["accuracy"]
    row |= {name: said[name] for name in ("bytes before", "bytes", "smaller", "loss at most")}
    row |= {"accuracy": before.mean(), "lost in truth": lost.mean(), "error": lost.std() / math.sqrt(len(lost))}
    return row | {"evaluations": found.proof.meta["evaluations"], "cpu": cpu}


def summary(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """What came of it."""
    kept = [row for row in rows if "smaller" in row]
    lost, error = (np.array([row[k] for row in kept]) for k in ("lost in truth", "error"))
    broken = int((lost > tolerance).sum())
    found = {"runs": len(rows), "models": len({row["model"] for row in rows}), "refused": len(rows) - len(kept)}
    found |= {"above the tolerance": broken, "share": broken / len(kept), "interval": wilson(broken, len(kept))}
    found |= {"above by two errors": int((lost - 2 * error > tolerance).sum())}
    found |= {"lost in truth, mean": lost.mean(), "error of it, median": np.median(error)}
    for name in ("loss at most", "smaller", "evaluations", "cpu"):
        found[f"{name}, median"] = np.median([row[name] for row in kept])
    return found | {"evaluations, most": max(row["evaluations"] for row in kept)}


def main() -> None:
    """Print a summary, and write every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (("splits", 20), ("epochs", 6), ("minutes", 15), ("shift", 0), ("size", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tolerance", type=float, default=0.02)
    told = parser.parse_args()
    torch.set_num_threads(1)
    within.reread = lambda file, _meant: formats.open(file).settle()  # type: ignore[attr-defined]
    data = sources(told.data)
    kinds = models(data["table"][0].shape[1], int(data["text"][1].max()) + 1)
    rows: list[dict[str, Any]] = []
    for split in range(told.shift, told.shift + told.splits):
        for name, build in kinds.items():
            given, truth = tasks(name, build, *data[name.partition(",")[0]], split)
            rows.append(one(name, given, truth, split, told))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        write(rows, told)
        if time.process_time() > 60 * told.minutes:
            break
    print(json.dumps(summary(rows, told.tolerance), indent=1, default=float))


def write(rows: list[dict[str, Any]], told: argparse.Namespace) -> None:
    """All that was found so far."""
    said = {"told": {k: str(v) for k, v in vars(told).items() if k != "data"}}
    said |= {"summary": summary(rows, told.tolerance), "runs": rows}  # type: ignore[dict-item]
    kind = f"-size{told.size}" if told.size else ""
    name = Path(__file__).parent / "results" / f"{date.today()}-real{kind}.json"
    name.write_text(json.dumps(said, indent=1, default=lambda v: float(f"{v:.6g}")) + "\n")


if __name__ == "__main__":
    main()

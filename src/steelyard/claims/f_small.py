"""Chapter F, making them small: shared values, and the smallest file within a tolerance."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard import formats
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits, inputs_of, trained
from steelyard.core.weights import Weight, Weights
from steelyard.edit.share import Share
from steelyard.explain.histograms import unique_values
from steelyard.formats.module import from_module, into_module
from steelyard.init import start
from steelyard.learn.evaluate import compare
from steelyard.learn.run import train
from steelyard.learn.seeding import seeded
from steelyard.learn.task import Task, build_seeded
from steelyard.shrinking.within import shrink

CODEBOOKS = (2, 16, 37, 256)


class Tied(nn.Module):
    """An autoencoder of images whose decoder is the encoder's weight, with a classifier on its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 64)
        self.decode = nn.Linear(64, 64)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.decode(torch.relu(self.encode(x.flatten(1))))))
        return logits


def _mean(a: Weights, b: Weights) -> Weights:
    """The average of two models, tensor by tensor."""

    def average(item: Weight) -> Weight:
        return item.then(lambda x: (x + b[item.name].array()) / np.float32(2))

    return a.with_items(average(item) for item in a.values())


def _broken(net: Tied) -> int:
    """1 if the tie of a module is gone: two tensors, two addresses or two values."""
    one, two = net.encode.weight, net.decode.weight
    return int(one is not two or one.data_ptr() != two.data_ptr() or not torch.equal(one, two))


def _shared() -> Mapping[str, float]:
    weights = from_module(trained(digits("mlp"), epochs=2))
    wrong = 0
    data = digits()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shared.safetensors"
        for k in CODEBOOKS:
            formats.write(Share(k, keep_zeros=False)(weights), path)
            table = unique_values(formats.open(path))
            matrices = [name for name, item in weights.items() if len(item.spec.shape) == 2]
            distinct = dict(zip(table.column("name"), table.column("distinct"), strict=True))
            wrong += sum(distinct[name] != k for name in matrices)
        broken, difference = _ties(data, path)
    return {"tensors without k distinct values": wrong, "ties broken": broken, "tied logit difference": difference}


def _ties(data: Task, path: Path) -> tuple[int, float]:
    """Ties that did not survive training, a start, a file, loading and averaging; and what the file changed."""
    tied = data.with_model(Tied)
    nets = [train(tied, epochs=2, seed=seed, progress=False).model for seed in (0, 1)]
    broken = sum(_broken(net) for net in nets)  # type: ignore[arg-type]
    with seeded(2):
        fresh, averaged, started = Tied(), Tied(), Tied()
    weights = from_module(nets[0])
    formats.write(weights, path)
    read = formats.open(path)
    into_module(read, fresh)
    into_module(_mean(weights, from_module(nets[1])), averaged)
    into_module(start(from_module(started), "he", 3), started)
    broken += sum(map(_broken, (fresh, averaged, started)))
    kept = (weights, read, _mean(weights, weights), start(weights, "he", 3), Share(8)(weights))
    broken += sum(dict(w.ties) != {"decode.weight": "encode.weight"} for w in kept)
    x = inputs_of(data, "test")
    with torch.no_grad():
        return broken, float((nets[0].eval()(x) - fresh.eval()(x)).abs().max())


F4 = Check(
    "F4",
    "weights can be shared",
    "share every matrix at k = 2, 16, 37, 256, write, read, count; a tied net trained, started, averaged, loaded",
    (
        Bar("tensors without k distinct values", "==", 0),
        Bar("ties broken", "==", 0),
        Bar("tied logit difference", "==", 0),
    ),
    _shared,
)

TOLERANCE = 0.02  # what 450 examples can prove: a loss of 2 percentage points at most


def _small() -> Mapping[str, float]:
    """Train, shrink, read the file into a new model, and compare the two on the examples of the proof."""
    data = digits("lenet-300-100")
    model, again = trained(data, epochs=15), build_seeded(data, 99)
    with tempfile.TemporaryDirectory() as folder:
        before = formats.write(from_module(model), Path(folder) / "large.safetensors")
        path = Path(folder) / "small.safetensors"
        found = shrink(model, data, path, tolerance=TOLERANCE, epochs=0)
        after = path.stat().st_size
        into_module(formats.open(path), again)
    rows: Any = compare(model, again, data).rows
    row, said = next(r for r in rows if r["metric"] == data.headline), found.proof.rows[0]
    return {
        "lost at most": float(said["loss at most"]),  # type: ignore[arg-type]
        "lost": row["a"] - row["b"],
        "times smaller": before / after,
        "bytes": after,
        "accuracy": row["b"],
        "lost at most by Newcombe's interval": -row["low"],
        "examples": row["examples"],
        "said - measured": abs(float(said["loss"]) - (row["a"] - row["b"])),  # type: ignore[arg-type]
    }


F5 = Check(
    "F5",
    "less memory without much accuracy",
    "a LeNet on digits, shrunk by a tolerance of 2 points: bytes on disk; re-read; held-out data, 95 % bound",
    (
        Bar("lost at most", "<=", TOLERANCE),
        Bar("lost", "<=", TOLERANCE),
        Bar("said - measured", "<=", 1e-12),
        Bar("times smaller", ">=", 10),
    ),
    _small,
)

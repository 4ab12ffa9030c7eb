"""Chapter G, moving and publishing: how large a model is, from the model and from a file's header alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from steelyard import formats
from steelyard.claims.check import Bar, Check
from steelyard.explain.counts import counts
from steelyard.explain.inventory import summary
from steelyard.formats.module import from_module
from steelyard.learn.models import model
from steelyard.learn.task import Interface

IMAGE, DIGIT, TUMOUR = Interface((1, 28, 28), 10), Interface((1, 8, 8), 10), Interface((30,), 2)
TEXT = Interface((32,), 50, vocabulary=50)


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 100, bias=False))
    net[2].weight = net[0].weight
    return net


def _frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def _norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))


# name: (builder, parameters, tied, frozen, numbers in persistent buffers), each worked out by hand
HAND: dict[str, tuple[Callable[[], nn.Module], int, int, int, int]] = {
    "linear on tumours": (lambda: model("linear", TUMOUR), 30 * 2 + 2, 0, 0, 0),
    "linear on digits": (lambda: model("linear", DIGIT), 64 * 10 + 10, 0, 0, 0),
    "mlp on digits": (lambda: model("mlp", DIGIT), 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10, 0, 0, 0),
    "LeNet-300-100": (lambda: model("lenet-300-100", IMAGE), 266_610, 0, 0, 0),
    "LeNet-5, Caffe": (lambda: model("lenet-5", IMAGE), 431_080, 0, 0, 0),
    "cnn on digits": (lambda: model("cnn", DIGIT), 320 + 18_496 + 64 * 16 * 128 + 128 + 1290, 0, 0, 0),
    "LSTM on digits": (
        lambda: model("rnn", DIGIT, hidden=20),
        4 * (20 * 8 + 20 * 20 + 2 * 20) + 20 * 10 + 10,
        0,
        0,
        0,
    ),
    "GRU on text": (
        lambda: model("rnn", TEXT, cell="gru", hidden=20, layers=2),
        50 * 20 + 2 * 3 * (20 * 20 + 20 * 20 + 2 * 20) + 20 * 50 + 50,
        0,
        0,
        0,
    ),
    "plain RNN": (
        lambda: model("rnn", DIGIT, cell="rnn", hidden=20),
        20 * 8 + 20 * 20 + 2 * 20 + 20 * 10 + 10,
        0,
        0,
        0,
    ),
    "transformer on text": (
        lambda: model("transformer", TEXT, width=16, layers=2, heads=2, positions="learned"),
        50 * 16 + 32 * 16 + 2 * (4 * 256 + 16 * 64 + 64 + 64 * 16 + 16 + 4 * 16) + 2 * 16 + 16 * 50 + 50,
        0,
        0,
        0,
    ),
    "two-way LSTM": (lambda: nn.LSTM(5, 7, bidirectional=True), 2 * 4 * (7 * 5 + 7 * 7 + 2 * 7), 0, 0, 0),
    "attention": (lambda: nn.MultiheadAttention(12, 3), 3 * 12 * 12 + 3 * 12 + 12 * 12 + 12, 0, 0, 0),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(12, 3, 24),
        (4 * 12 * 12 + 4 * 12) + (12 * 24 + 24) + (24 * 12 + 12) + 2 * 2 * 12,
        0,
        0,
        0,
    ),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), 5 * 3 * 4 + 5, 0, 0, 0),
    "grouped convolution": (lambda: nn.Conv2d(8, 16, 3, groups=4), 16 * 2 * 9 + 16, 0, 0, 0),
    "convolution over time": (lambda: nn.Conv1d(4, 6, 5, bias=False), 6 * 4 * 5, 0, 0, 0),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3), 4 * 6 * 9 + 6, 0, 0, 0),
    "batch norm": (_norm, 8 * 3 * 9 + 8 + 8, 0, 0, 8 + 8 + 1),
    "tied embedding": (_tied, 100 * 16 + 16 * 16 + 16, 100 * 16, 0, 0),
    "frozen layer": (_frozen, 8 * 4 + 4 + 4 * 2 + 2, 0, 8 * 4 + 4, 0),
    "layer norms": (lambda: nn.Sequential(nn.LayerNorm(9), nn.LayerNorm((3, 3), bias=False)), 18 + 9, 0, 0, 0),
}


def _counts() -> Mapping[str, float]:
    wrong = from_header = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for build, unique, tied, frozen, buffered in HAND.values():
            net = build()
            row = counts(net).rows[-1]
            found = tuple(row[key] for key in ("unique", "tied", "frozen", "trainable", "buffered"))
            wrong += found != (unique, tied, frozen, unique - frozen, buffered)
            formats.write(from_module(net), path)
            header = summary(formats.open(path)).rows[0]
            from_header += (header["elements"], header["ties"]) != (unique + buffered, int(tied > 0))
    return {"models counted wrongly": wrong, "headers counted wrongly": from_header, "models": len(HAND)}


G1 = Check(
    "G1",
    "the count of weights is a measure of scale",
    "unique, tied, frozen, trainable, buffered against counts by hand; and from the header of a written file alone",
    (Bar("models counted wrongly", "==", 0), Bar("headers counted wrongly", "==", 0), Bar("models", ">=", 20)),
    _counts,
)

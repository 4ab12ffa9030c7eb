"""Forty small tasks: five pairs of data and net, four optimizers, two batch sizes; large held-out splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from sklearn.datasets import load_digits, make_classification, make_gaussian_quantiles
from torch import nn

from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.task import SPLITS, Interface, Task

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SIZES = (16, 64)
EPOCHS = 12


def _digits() -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.data[order] / 16, found.target[order], (600, 200)


def _classification() -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    x, y = make_classification(
        5000, 20, n_informative=10, n_redundant=4, n_classes=4, n_clusters_per_class=2, flip_y=0.05, random_state=0
    )
    return x, y, (600, 200)


def _quantiles() -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    x, y = make_gaussian_quantiles(n_samples=5000, n_features=6, n_classes=3, random_state=0)
    return x, y, (600, 200)


def _linear() -> nn.Module:
    return nn.Linear(64, 10)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)
    )


def _deep() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(6, 32), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


PAIRS: Mapping[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray, tuple[int, int]]], Callable[[], nn.Module]]] = {
    "digits, linear": (_digits, _linear),
    "digits, MLP with dropout": (_digits, _mlp),
    "digits, CNN with batch norm": (_digits, _cnn),
    "classification, MLP with batch norm": (_classification, _normed),
    "quantiles, deep tanh": (_quantiles, _deep),
}


def make(pair: str, size: int, seed: int) -> Task:
    """The task; ``seed`` gives the order of the batches."""
    load, build = PAIRS[pair]
    x, y, (train, valid) = load()
    ends = {"train": slice(0, train), "valid": slice(train, train + valid), "test": slice(train + valid, None)}
    inputs: dict = {s: torch.tensor(x[ends[s]], dtype=torch.float32) for s in SPLITS}
    targets: dict = {s: torch.tensor(y[ends[s]], dtype=torch.int64) for s in SPLITS}
    data = Examples(inputs, targets, size, seed)
    interface = Interface(tuple(inputs["train"].shape[1:]), int(y.max()) + 1)
    return Task(pair, build, data, cross_entropy, {"accuracy": accuracy}, interface)


def decay(pair: str) -> float:
    """The weight decay; with one, the deep tanh net learns nothing under most optimizers at any rate."""
    return 0.0 if pair.startswith("quantiles") else 0.01

"""Tasks whose data is bundled with scikit-learn: handwritten digits and breast tumours.

Decides their splits (stratified, by seed), scaling and augmentation. Knows nothing of models but their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steelyard.errors import ModelError
from steelyard.learn.data import Examples, few, stratified
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.task import SPLITS, Interface, Split, Task
from steelyard.learn.warp import warped


def digits(
    *,
    seed: int = 0,
    batch_size: int | None = None,
    model: str = "cnn",
    classes: Sequence[int] = tuple(range(10)),
    shots: int | None = None,
    augment: bool = True,
) -> Task:
    """The 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak 1998), as 1x8x8 in [0, 1].

    60 % to train, 15 % to search and stop, 25 % to prove; stratified, by ``seed``. ``classes`` chooses digits and
    numbers them anew in the order given; ``shots`` is the number of training examples for each class (None: all).
    ``batch_size`` None is 64, and 8 with ``shots``. ``augment`` turns, stretches and shifts the training images anew
    in each epoch.
    """
    images, labels = _digits()
    chosen = _distinct(classes)
    numbers = {digit: i for i, digit in enumerate(chosen)}
    keep = np.isin(labels, chosen)
    images, labels = images[keep], np.array([numbers[int(d)] for d in labels[keep]], np.int64)
    interface = Interface((1, 8, 8), len(chosen))
    rows = stratified(labels, seed)
    if shots is not None:
        rows["train"] = few(rows["train"], labels, shots, seed)
    size = (64 if shots is None else 8) if batch_size is None else batch_size
    data = _examples(images, labels, rows, size, seed, partial(vary, fill=0.0) if augment else None)
    return Task(
        name="digits",
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=interface,
        classes=tuple(str(digit) for digit in chosen),
        features=tuple(f"pixel {row},{column}" for row in range(8) for column in range(8)),
        about={"seed": seed, "classes": list(chosen), "shots": shots, "augment": augment, "examples": data.sizes},
    )


def breast_cancer(*, seed: int = 0, batch_size: int = 32, model: str = "linear") -> Task:
    """569 breast tumours, 30 measurements each, malignant or benign (Street et al. 1993).

    The measurements are standardised by the mean and the spread of the training rows.
    """
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    rows = stratified(found.target, seed)
    mean, spread = found.data[rows["train"]].mean(0), found.data[rows["train"]].std(0)
    interface = Interface((30,), 2)
    data = _examples((found.data - mean) / spread, found.target.astype(np.int64), rows, batch_size, seed, None)
    return Task(
        name="breast-cancer",
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=interface,
        classes=tuple(str(name) for name in found.target_names),
        features=tuple(str(name) for name in found.feature_names),
        about={"seed": seed, "examples": data.sizes, "mean": mean.tolist(), "spread": spread.tolist()},
    )


def vary(
    images: Tensor,  # (n, channels, height, width)
    random: torch.Generator,
    *,
    degrees: float = 10.0,
    stretch: float = 0.1,
    shift: float = 0.75,  # pixels
    fill: float = 0.0,
) -> Tensor:
    """Each image turned, stretched and shifted by uniform random amounts, resampled bilinearly."""
    draw = torch.rand(5, len(images), generator=random, dtype=images.dtype) * 2 - 1
    stretched = {"across": 1 + stretch * draw[1], "along": 1 + stretch * draw[2]}
    moved = {"right": draw[3] * shift, "down": draw[4] * shift}
    return warped(images, angle=draw[0] * math.radians(degrees), **stretched, **moved, fill=fill)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images[:, None] / 16, found.target


def _distinct(classes: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(classes)
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= set(range(10)):
        raise ModelError(f"classes={chosen}: expected at least two different digits from 0 to 9")
    return chosen


def _examples(
    inputs: np.ndarray, targets: np.ndarray, rows: dict[Split, np.ndarray], batch_size: int, seed: int, augment: Any
) -> Examples:
    x = {split: torch.from_numpy(inputs[rows[split]].astype(np.float32)) for split in SPLITS}
    y = {split: torch.from_numpy(targets[rows[split]]) for split in SPLITS}
    return Examples(x, y, batch_size, seed, augment)

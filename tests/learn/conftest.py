"""One thread, small models, tiny tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.task import SPLITS, Interface, Task


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(
    *, seed: int = 0, batch_size: int = 8, build: object = None, sizes: tuple[int, int, int] = (40, 20, 30)
) -> Task:
    """Three Gaussian blobs in five dimensions."""
    random = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 5, generator=random) * 2
    inputs: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for split, size in zip(SPLITS, sizes, strict=True):
        targets[split] = torch.arange(size) % 3
        inputs[split] = centres[targets[split]] + torch.randn(size, 5, generator=random)
    return Task(
        name="blobs",
        build=build or (lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))),
        batches=Examples(inputs, targets, batch_size, seed),
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=Interface((5,), 3),
    )


@pytest.fixture
def task() -> Task:
    return blobs()


@pytest.fixture(name="blobs")
def _blobs() -> object:
    return blobs

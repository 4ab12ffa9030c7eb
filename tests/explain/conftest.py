"""One thread, and networks that several tests read and none changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steelyard.learn.run import train
from steelyard.learn.task import Task
from steelyard.learn.tasks import task


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Learned = tuple[torch.nn.Module, Task]


def _learned(name: str, model: str, epochs: int, rate: float = 3e-3) -> Learned:
    data = task(name, model=model, **({"augment": False} if name == "digits" else {}))
    return train(data, epochs=epochs, rate=rate, progress=False).model.eval(), data


@pytest.fixture(scope="package")
def linear_digits() -> Learned:
    return _learned("digits", "linear", 10, 1e-2)


@pytest.fixture(scope="package")
def mlp_digits() -> Learned:
    return _learned("digits", "mlp", 5)


@pytest.fixture(scope="package")
def cnn_digits() -> Learned:
    return _learned("digits", "cnn", 2)


@pytest.fixture(scope="package")
def linear_tumours() -> Learned:
    return _learned("breast-cancer", "linear", 5)

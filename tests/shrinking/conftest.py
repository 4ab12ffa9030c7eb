"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from steelyard.learn.task import Task


@pytest.fixture
def blind() -> Callable[[Task], Task]:
    """Makes of a task the same task, which raises if anybody asks for the test split."""

    def made(task: Task) -> Task:
        def batches(split, epoch):
            if split == "test":
                raise AssertionError("the test split was looked at")
            return task.batches(split, epoch)

        return replace(task, batches=batches)

    return made

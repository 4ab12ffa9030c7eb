"""The numbers of one tensor, block by block, shared out among threads. Decides how much is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from steelyard.core.spec import DTYPES
from steelyard.core.weights import Weight
from steelyard.explain.patterns import part

BLOCK = 1 << 20  # numbers that are read at a time
PIECE = 1 << 16  # that are worked on at a time where more would not stay in the processor's cache
ALONE = 1 << 21  # numbers up to which one thread is quicker than two

Progress = Callable[[int], None]  # is told of bytes that have been looked at


class Workspace:
    """Threads, and arrays that serve one tensor after the other: memory that is new costs more than the counting.

    ``compiled`` says whether machine code looks at the numbers, on two threads, or numpy alone, which starts sooner.
    """

    def __init__(self, compiled: bool):
        self.compiled = compiled
        self.threads = 2 if compiled else 1
        self.pool = ThreadPoolExecutor(self.threads)  # starts no thread before it is given work
        self._arrays: dict[tuple[Any, ...], np.ndarray] = {}

    def array(self, worker: int, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The array of this name that the worker had before, with whatever is in it."""
        key = (worker, name, shape, np.dtype(dtype))
        if key not in self._arrays:
            self._arrays[key] = np.zeros(shape, dtype)
        return self._arrays[key]

    def zeros(self, worker: int, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The same, all zero."""
        array = self.array(worker, name, shape, dtype)
        array.fill(0)
        return array


class Numbers:
    """The numbers of a tensor, flat, by blocks; a complex number is two."""

    def __init__(self, weight: Weight, space: Workspace, progress: Progress | None):
        self.weight, self.space, self.progress = weight, space, progress
        self.each = 2 if weight.spec.dtype.kind == "complex" else 1
        self.size = weight.spec.size * self.each
        self.numpy = DTYPES[part(weight.spec.dtype)].numpy
        self.whole = np.require(weight.array(), requirements="CA").reshape(-1) if weight.fill is None else np.empty(0)

    def blocks(self, first: int, last: int, worker: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Each block and where it begins; valid until the next."""
        first, last, step = first // self.each, last // self.each, BLOCK // self.each
        fill, dtype = self.weight.fill, self.weight.spec.dtype.numpy
        if fill is not None:
            buffer = self.space.array(worker, "block", (step * dtype.itemsize,), np.uint8).view(dtype)
        for at in range(first, last, step):
            count = min(step, last - at)
            if fill is None:
                block = self.whole[at : at + count]
            else:
                block = buffer[:count]
                fill(at, block)
            yield at * self.each, block.view(self.numpy)
            if self.progress is not None:
                self.progress(block.nbytes)

    def each_by(self, make: Callable[[int], Any]) -> list[Any]:
        """One object of ``make(worker)`` for each thread, after ``object.add(first, block)`` for all of its share.

        The shares depend on nothing but the size, so that sums come out the same each time.
        """
        parts = self.space.threads if self.size > ALONE else 1
        ends = [min(-(-self.size * k // parts // BLOCK) * BLOCK, self.size) for k in range(parts)] + [self.size]

        def work(worker: int) -> Any:
            account = make(worker)
            for first, block in self.blocks(ends[worker], ends[worker + 1], worker):
                account.add(first, block)
            return account

        if parts == 1:
            return [work(0)]
        return list(self.space.pool.map(work, range(parts)))

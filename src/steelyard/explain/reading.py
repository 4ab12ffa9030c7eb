"""The numbers of one tensor, block by block, shared out among threads. Decides how much is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from steelyard.core.spec import DTYPES
from steelyard.core.weights import Weight
from steelyard.explain.patterns import part

BLOCK = 1 << 18  # numbers that are read at a time: they stay in the processor's cache while they are looked at
ALONE = 1 << 21  # numbers up to which one thread is quicker than two

Progress = Callable[[int], None]  # is told of bytes that have been looked at


class Numbers:
    """The numbers of a tensor, flat, by blocks; a complex number is two."""

    def __init__(self, weight: Weight, threads: int, progress: Progress | None):
        self.weight, self.threads, self.progress = weight, threads, progress
        self.each = 2 if weight.spec.dtype.kind == "complex" else 1
        self.size = weight.spec.size * self.each
        self.numpy = DTYPES[part(weight.spec.dtype)].numpy
        self.whole = np.ascontiguousarray(weight.array()).reshape(-1) if weight.fill is None else np.empty(0)

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Each block and where it begins; valid until the next."""
        first, last, step = first // self.each, last // self.each, BLOCK // self.each
        fill = self.weight.fill
        buffer = np.empty(min(step, last - first) if fill else 0, self.weight.spec.dtype.numpy)
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

    def each_by(self, make: Callable[[], Any]) -> list[Any]:
        """One object of ``make`` for each thread, after ``object.add(first, block)`` for all blocks of its share.

        The shares depend on nothing but the size, so that sums come out the same each time.
        """
        parts = self.threads if self.size > ALONE else 1
        ends = [min(-(-self.size * k // parts // BLOCK) * BLOCK, self.size) for k in range(parts)] + [self.size]

        def work(k: int) -> Any:
            account = make()
            for first, block in self.blocks(ends[k], ends[k + 1]):
                account.add(first, block)
            return account

        if parts == 1:
            return [work(0)]
        with ThreadPoolExecutor(parts) as pool:
            return list(pool.map(work, range(parts)))

"""The L2 norms of rows (slices along the first axis) and columns (places in such a slice), gathered block by block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np

from steelyard.core.spec import DType
from steelyard.core.weights import Weight
from steelyard.explain.patterns import WIDE, alphabet, part
from steelyard.explain.reading import PIECE, Workspace

KEPT = 1 << 20  # rows or columns up to which norms are kept: 8 MB


class Lines:
    """The sums of squares of rows (the first axis) and columns (all others)."""

    def __init__(self, shape: tuple[int, int], each: int, values: np.ndarray | None, fast: bool):
        self.shape, self.each, self.values, self.fast = shape, each, values, fast
        self.width = shape[1] * each
        self.scale = 1.0
        self.rows = self.columns = self.scratch = np.empty(0)

    @staticmethod
    def of(weight: Weight, kind: str, compiled: bool) -> Lines | None:
        """None for a tensor of fewer than two axes, or of more rows than are kept."""
        shape = weight.spec.shape
        if len(shape) < 2 or shape[0] > KEPT:
            return None
        each = 2 if weight.spec.dtype.kind == "complex" else 1
        fast = compiled and (kind not in WIDE or kind == "float32")
        return Lines((shape[0], prod(shape[1:])), each, _finite(weight.spec.dtype), fast)

    def empty(self, space: Workspace, worker: int, scale: float = 1.0) -> Lines:
        """Another one of the same kind, to be filled; the values are multiplied by `scale` before they are squared."""
        lines = Lines(self.shape, self.each, self.values, self.fast)
        lines.rows = np.zeros(self.shape[0])
        lines.columns = np.zeros(self.width if self.width <= KEPT else 0)
        lines.scratch = space.array(worker, "values", (PIECE,), np.float32)
        lines.scale = scale
        return lines

    def add(self, first: int, block: np.ndarray) -> None:
        if self.fast:
            self._fast(first, block)
            return
        for at in range(0, block.size, PIECE):
            self._add(first + at, block[at : at + PIECE])

    def _fast(self, first: int, block: np.ndarray) -> None:
        from steelyard.kernels.moments import squares_of_rows, squares_of_rows_by_table

        if self.values is None:
            squares_of_rows(block, PIECE, first, self.width, self.rows, self.columns)
        else:
            squares_of_rows_by_table(block, self.values, self.scratch, first, self.width, self.rows, self.columns)

    def _add(self, first: int, block: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = (block if self.values is None else self.values[block]).astype(np.float64)
        squares = (np.where(np.isfinite(values), values, 0.0) * self.scale) ** 2
        row, column = np.divmod(np.arange(first, first + block.size), self.width)
        self.rows[row[0] : row[-1] + 1] += np.bincount(row - row[0], squares)
        if self.columns.size:
            self.columns += np.bincount(column, squares, self.columns.size)

    @staticmethod
    def norms(shares: Sequence[Lines | None]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The norms after all shares."""
        whole = shares[0]
        if whole is None:
            return None, None
        rows = sum(s.rows for s in shares if s is not None)
        columns = sum(s.columns for s in shares if s is not None).reshape(-1, whole.each).sum(axis=1)
        known = whole.width <= KEPT
        with np.errstate(over="ignore"):  # a norm above the largest float64 is infinite
            return np.sqrt(rows) / whole.scale, np.sqrt(columns) / whole.scale if known else None


@cache
def _finite(dtype: DType) -> np.ndarray | None:
    """What a pattern of up to 16 bits, as it lies in memory, adds to a norm."""
    if part(dtype) in WIDE:
        return None
    known = alphabet(dtype).values
    values = np.where(np.isfinite(known), known, 0.0).astype(np.float32)
    return np.tile(values, (1 << 8 * dtype.numpy.itemsize) // values.size)

"""Sums of squares: of what a float32 has beyond its leading half, and of rows and columns."""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel, reordering_kernel


@kernel
def look_up(patterns, table, out):
    """``table[patterns]`` into `out`."""
    for i in range(patterns.size):
        out[i] = table[patterns[i]]


@reordering_kernel
def squares_of_differences(values, others):
    """The sum of the squares of ``values - others``, float32; what is not a number counts as 0."""
    total = 0.0
    for i in range(values.size):
        difference = np.float64(values[i] - others[i])
        total += difference * difference if difference == difference else 0.0
    return total


@reordering_kernel
def squares_of_rows(values, first, width, rows, columns):
    """Add the squares of finite float32 `values`, elements from flat index `first` on, to their row and column.

    Rows are `width` elements wide; an empty `columns` is not filled.
    """
    n = values.size
    row, column, at = first // width, first % width, 0
    while at < n:
        count = min(width - column, n - at)
        part = values[at : at + count]
        total = 0.0
        if columns.size:
            below = columns[column : column + count]
            for i in range(count):
                v = np.float64(part[i])
                square = v * v if abs(part[i]) <= np.float32(3.4028235e38) else 0.0
                total += square
                below[i] += square
        else:
            for i in range(count):
                v = np.float64(part[i])
                total += v * v if abs(part[i]) <= np.float32(3.4028235e38) else 0.0
        rows[row] += total
        at += count
        row, column = row + 1, 0

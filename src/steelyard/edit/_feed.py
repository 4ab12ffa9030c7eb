"""Round a matrix line by line, and let those that follow make up for what each one lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 64  # lines whose effect on all that follow is added up before it is applied


def upper_of(h: np.ndarray) -> np.ndarray:
    """U, upper triangular, with UᵀU the inverse of `h`; raises LinAlgError if `h` is not positive definite.

    >>> upper_of(np.array([[4.0, 0], [0, 1]])).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    return _inverse(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1])  # h = R Rᵀ, and U R = 1


def _inverse(r: np.ndarray) -> np.ndarray:
    """Of an upper triangular matrix, by halves: products of matrices, which are quick."""
    n, half = len(r), len(r) // 2
    if n <= BLOCK:
        return np.asarray(np.triu(np.linalg.inv(r)))
    found = np.zeros((n, n))
    first, second = (found[part, part] for part in (slice(half), slice(half, n)))
    first[:], second[:] = _inverse(r[:half, :half]), _inverse(r[half:, half:])
    found[:half, half:] = -first @ r[:half, half:] @ second
    return found


def gathered(upper: np.ndarray) -> np.ndarray:
    """What the errors before it add to each input, in squared errors of one input."""
    return np.asarray(np.square(upper).sum(axis=0) / np.square(np.diag(upper)) - 1)


def feed(w: np.ndarray, moves: np.ndarray | None, choose: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give each line of `w` (lines, width) to `choose` when its turn comes, which says what it becomes.

    Its error moves each line that follows by -``moves[line, other]`` of it, in blocks of lines; `w` becomes the lines
    as they were given. None: nothing moves.
    """
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        lost = np.empty((stop - start, w.shape[1]), w.dtype)
        for j in range(start, stop):
            lost[j - start] = w[j] - choose(w[j])
            if moves is not None:
                w[j + 1 : stop] -= moves[j, j + 1 : stop, None] * lost[j - start]
        if moves is not None:
            w[stop:] -= moves[start:stop, stop:].T @ lost

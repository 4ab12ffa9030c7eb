"""Round a matrix input by input, and let those that follow make up for what each one lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 64  # inputs whose effect on all that follow is added up before it is applied


def upper_of(h: np.ndarray) -> np.ndarray:
    """The upper triangular Cholesky factor of the inverse; raises LinAlgError if `h` is not positive definite."""
    return np.asarray(np.linalg.cholesky(np.linalg.inv(h)).T)


def gathered(upper: np.ndarray) -> np.ndarray:
    """What the errors before it add to each input, in squared errors of one input."""
    return np.asarray(np.square(upper).sum(axis=0) / np.square(np.diag(upper)) - 1)


def feed(
    w: np.ndarray, upper: np.ndarray, column: np.ndarray, choose: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of `w` (inputs, outputs) in steps when their turn comes, and the whole numbers that `choose` makes.

    The error of each is spread over the inputs that follow, in blocks of them.
    """
    w, steps, wholes = w.copy(), np.empty_like(w), np.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        lost = np.empty((stop - start, w.shape[1]), np.float32)
        for j in range(start, stop):
            steps[j] = w[j] / column[j]
            wholes[j] = choose(steps[j])
            lost[j - start] = (w[j] - wholes[j] * column[j]) / upper[j, j]
            w[j:stop] -= upper[j, j:stop, None] * lost[j - start]
        w[stop:] -= upper[start:stop, stop:].T @ lost
    return steps, wholes

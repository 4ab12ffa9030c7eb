"""Ridge regression with the strength chosen by leaving each example out once, in closed form.

Decides the grid of strengths. Knows nothing of what is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = torch.logspace(-6, 2, 17, dtype=torch.float64)  # of the penalty, of the mean square of the features
ROUNDING = 1e-12  # an eigenvalue below this share of the largest is none


@dataclass(frozen=True)
class Ridge:
    """W x + b: `predict` takes (examples, features)."""

    weight: Tensor  # (features, outputs)
    bias: Tensor  # (outputs,)
    strength: float  # that was chosen, as a share of the mean square of a feature

    def predict(self, x: Tensor) -> Tensor:
        """(examples, outputs)."""
        return x.double() @ self.weight + self.bias


def fit_ridge(
    x: Tensor,  # (examples, features)
    y: Tensor,  # (examples, outputs)
) -> Ridge:
    """Minimise |y - x W - b|² + strength * examples * s |W|², s the mean square of the centred features.

    Of `STRENGTHS` the one with the least squared error on examples left out: with the hat matrix H of a strength, the
    error of an example that was left out is that of the whole fit over 1 - H_ii.

    Source: Hoerl and Kennard, Ridge regression, 1970; Allen, The relationship between variable selection and data
    augmentation and a method for prediction, 1974 (leave-one-out in closed form).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> round(float(fit_ridge(x, 2 * x + 1).predict(torch.tensor([[10.0]]))), 3)
    21.0
    """
    x, y = x.double(), y.double()
    middle, mean = x.mean(0), y.mean(0)
    a, b = x - middle, y - mean
    count, features = a.shape
    if features <= count:
        squares, right = torch.linalg.eigh(a.T @ a)
        kept = squares > ROUNDING * squares[-1].clamp_min(torch.finfo(torch.float64).tiny)
        squares, right = squares[kept], right[:, kept]
        left = a @ right / squares.sqrt()  # (examples, rank)
    else:
        squares, left = torch.linalg.eigh(a @ a.T)
        kept = squares > ROUNDING * squares[-1].clamp_min(torch.finfo(torch.float64).tiny)
        squares, left = squares[kept], left[:, kept]
        right = a.T @ left / squares.sqrt()
    seen, scale = left.T @ b, float(a.square().sum()) / max(features, 1)
    best: tuple[float, float] | None = None
    for strength in STRENGTHS.tolist():
        share = squares / (squares + strength * scale) if scale else squares
        hat = (left.square() @ share) + 1 / count  # 1 / count is the mean's
        errors = (b - left @ (share[:, None] * seen)) / (1 - hat).clamp_min(1e-9)[:, None]
        error = float(errors.square().mean())
        if best is None or error < best[0]:
            best = error, strength
    assert best is not None
    factors = squares.sqrt() / (squares + best[1] * scale) if scale else squares
    weight = right @ (factors[:, None] * seen)
    return Ridge(weight, mean - middle @ weight, best[1])

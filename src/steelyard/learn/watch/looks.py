"""What is read at some steps only: how the values of each tensor are spread, and how noisy the gradient is.

Decides what a look reads and from how many values. Reads only. Knows nothing of when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steelyard.learn.watch.norms import is_sharded

SAMPLE = 16_384  # values, evenly spaced, from which quantiles are taken: one of p is off by sqrt(p (1 - p) / 16384)
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


def shard(x: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded."""
    return x.to_local() if is_sharded(x) else x


@torch.no_grad()
def spread(x: Tensor) -> tuple[float | None, ...]:
    """Smallest value, the `QUANTILES`, largest value, the share of zeros and the share of values that are not finite.

    Quantiles and zeros are those of at most `SAMPLE` finite values, evenly spaced; the others are exact. Of complex
    numbers: of their absolute values. None where no value is finite.

    >>> [round(x, 2) for x in spread(torch.tensor([0.0, 1.0, 2.0, 3.0, torch.nan]))]
    [0.0, 0.03, 0.75, 1.5, 2.25, 2.97, 3.0, 0.25, 0.2]
    """
    x = shard(x.detach()).reshape(-1)
    x = x.abs() if x.is_complex() else x
    if not x.numel():
        return (None,) * (len(QUANTILES) + 4)
    lowest, highest = x.aminmax()
    broken = 0.0
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        finite = x[torch.isfinite(x)]
        broken = (x.numel() - finite.numel()) / x.numel()
        if not finite.numel():
            return (*(None,) * (len(QUANTILES) + 3), broken)
        lowest, highest = finite.aminmax()
        x = finite
    taken = x[:: -(-x.numel() // SAMPLE)]
    ordered = np.sort(taken.float().cpu().numpy())  # several times as quick as torch's
    found = np.interp(np.multiply(QUANTILES, len(ordered) - 1), np.arange(len(ordered)), ordered)
    zeros = int((ordered == 0).sum()) / len(ordered)
    return (float(lowest), *found.tolist(), float(highest), zeros, broken)


@dataclass
class Noise:
    """The noise of the gradient, from those of two steps in a row, which share no example.

    With g and g' their gradients, each of B examples: g·g' estimates |G|², G the gradient over all data, and
    (|g|² + |g'|²) / 2 - g·g' estimates tr(Σ) / B, Σ the covariance of the gradient of one example. The gradient noise
    scale tr(Σ) / |G|², in examples, is about the batch size beyond which larger batches stop to pay; both parts are
    averaged over looks, with weights that fall by `keep`, before they are divided. What the step between the two
    has changed of G counts as noise.

    >>> noise, x = Noise(), torch.tensor([3.0, 4.0])
    >>> noise.first({"w": x})
    >>> noise.second({"w": torch.tensor([3.0, 0.0])}, examples=8)
    (9.0, 64.0, 7.1...)

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, appendix A.1.
    """

    keep: float = 0.9
    held: dict[str, Tensor] | None = None
    mean_square: float = 0.0  # (|g|² + |g'|²) / 2 of the last pair
    _square: float = 0.0
    _variance: float = 0.0

    @torch.no_grad()
    def first(self, gradients: Mapping[str, Tensor]) -> None:
        """Keep a copy of the gradients until the next step."""
        self.held = {name: g.detach().clone() for name, g in gradients.items()}

    @torch.no_grad()
    def second(self, gradients: Mapping[str, Tensor], examples: int | None) -> tuple[float, float | None, float | None]:
        """|G|², tr(Σ) and the noise scale so far; the last two None where the number of examples is not known.

        Tensors that had a gradient at one of the steps only are left out. The noise scale is None while the estimate
        of |G|² is not positive.
        """
        held, self.held = self.held or {}, None
        both = {n: (held[n], g) for n, g in gradients.items() if n in held and held[n].shape == g.shape}
        square = sum(_dot(a, b) for a, b in both.values())
        self.mean_square = sum(_dot(a, a) + _dot(b, b) for a, b in both.values()) / 2
        variance = self.mean_square - square
        self._square = self.keep * self._square + (1 - self.keep) * square
        self._variance = self.keep * self._variance + (1 - self.keep) * variance
        if examples is None:
            return square, None, None
        scale = examples * self._variance / self._square if self._square > 0 else None
        return square, examples * variance, scale


def _dot(a: Tensor, b: Tensor) -> float:
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return float(torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide)))

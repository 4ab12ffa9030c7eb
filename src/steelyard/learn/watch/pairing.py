"""Whether the outputs know the labels of their own examples: what tells slow learning from labels that mean nothing.

Decides what that is read from, and when it is sure. Reads only. Knows nothing of losses, steps or faults.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steelyard.formats._sharded import is_sharded

ROWS, LEAST = 256, 32  # outputs of a batch that are compared with each other, if they have together no more than ...
VALUES = 1 << 20  # numbers; never fewer than LEAST
NUMBERS = 4096  # of an example, evenly spaced, by which it is known again
MOST = 1_000_000  # examples that are known again
SURE = 5.0  # standard deviations from what labels that mean nothing would give
BALANCED = 0.03  # of the absolute sum of a row of softmax - label, whose sum is 0 but for rounding
ALMOST_ALL = 0.9  # of the rows must look like that


class Pairing:
    """A test of whether outputs and labels belong together, over the batches of a training with a cross-entropy.

    Labels that have nothing to do with the inputs go with any output as well as with their own. So S = Σ_i f[i, y_i],
    f being (examples, classes) outputs and y labels, is compared with what it would be for the same labels in another
    order: of all orders the mean and the variance are known, whatever f and the share of each class are. Each batch
    gives z = (S - mean) / deviation, and `score` is their sum over the root of their number: of variance 1 where labels
    mean nothing, and of either sign where they mean anything. It grows with learning much sooner than the loss falls.
    What counts are examples that were not met before: what is learned by heart is known only afterwards.

    Labels are read off the gradient that the loss sends to the outputs, softmax - label (of a cross-entropy) or
    - label (of a nll_loss), each times a weight: the class of the lowest number. Other losses tell nothing here.

    Source: the moments over permutations are those of Hoeffding, A combinatorial central limit theorem, 1951.

    >>> pairing, x = Pairing(), torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.nn.functional.one_hot(x.argmax(1), 5)
    >>> pairing.met(x, x, x.softmax(1) - labels)
    >>> pairing.sure, round(pairing.score)
    (True, 10)
    """

    def __init__(self) -> None:
        self.examples = 0  # new ones so far
        self.batches = 0
        self.sure = False  # whether the score was ever beyond what chance does
        self._sum = 0.0
        self._others = 0  # batches whose gradient shows no labels
        self._known: set[float] = set()

    @property
    def score(self) -> float:
        """In standard deviations."""
        return self._sum / math.sqrt(max(self.batches, 1))

    @property
    def shown(self) -> bool:
        """Whether there are labels to be read."""
        return self.batches > self._others

    @property
    def asks(self) -> bool:
        """Whether more batches are wanted."""
        return not self.sure and len(self._known) < MOST

    @torch.no_grad()
    def met(self, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> None:
        """A batch: inputs (examples, ...), outputs (examples, [...,] classes [, ...]), and dL/d(outputs)."""
        if is_sharded(outputs) or not outputs.is_floating_point() or outputs.ndim < 2 or len(inputs) != len(outputs):
            return
        new = self._new(inputs)
        if not new:
            return
        axes = (-1, 1) if outputs.ndim > 2 else (1,)
        rows = (_rows(outputs.detach(), gradient.detach(), new, axis) for axis in axes)
        found = next((one for one in rows if one is not None), None)
        if found is None:
            self._others += 1
        elif (deviation := _deviation(*found)) is not None:
            self._sum, self.batches, self.examples = self._sum + deviation, self.batches + 1, self.examples + len(new)
            if abs(self.score) >= SURE:
                self.sure = True
                self._known.clear()

    def _new(self, inputs: Tensor) -> list[int]:
        """The places of the examples that were not met before."""
        flat = inputs.detach().reshape(len(inputs), -1)
        flat = flat[:, :: -(-flat.shape[1] // NUMBERS)].double()
        random = torch.Generator().manual_seed(0)
        names = (flat @ torch.rand(flat.shape[1], generator=random, dtype=torch.float64).to(flat.device)).tolist()
        new = [i for i, name in enumerate(names) if name not in self._known]
        self._known.update(names)
        return new


def _rows(f: Tensor, g: Tensor, new: list[int], axis: int) -> tuple[Tensor, Tensor] | None:
    """Outputs (rows, classes) and their labels (rows,) at those examples; None if the gradient shows no labels."""
    f, g = f.movedim(axis, -1), g.movedim(axis, -1)  # (examples, ..., classes)
    if f.shape[-1] < 2:
        return None
    positions = f.shape[1:-1].numel()
    most = max(LEAST, min(ROWS, VALUES // f.shape[-1]))
    rows = torch.arange(0, len(new) * positions, -(-len(new) * positions // most))
    places = torch.tensor(new)[rows // positions], *torch.unravel_index(rows % positions, f.shape[1:-1])
    f, g = f[places].float(), g[places].float()
    size = g.abs().sum(1)
    f, g, size = f[size > 0], g[size > 0], size[size > 0]  # positions that are left out have none
    alone = ((g < 0).sum(1) == 1) & ((g > 0).sum(1) == 0)
    like = alone | (g.sum(1).abs() <= BALANCED * size)
    if len(g) < 2 or not torch.isfinite(f).all() or float(like.float().mean()) < ALMOST_ALL:
        return None
    return f[like], g[like].argmin(1)


def _deviation(f: Tensor, labels: Tensor) -> float | None:
    """How far the outputs are from not knowing their labels, in standard deviations; None where all are alike."""
    pairs = f.double()[:, labels]  # (rows, rows): what the output of i says to the label of j
    pairs = pairs - pairs.mean(0, keepdim=True) - pairs.mean(1, keepdim=True) + pairs.mean()
    variance = float(pairs.square().sum()) / max(len(pairs) - 1, 1)
    scale = float(f.abs().amax()) ** 2 * len(pairs)
    return float(pairs.diagonal().sum()) / math.sqrt(variance) if variance > 1e-12 * scale else None

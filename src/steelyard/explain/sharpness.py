"""How quickly the training loss rises around the weights: in the steepest direction, in random ones, by curvature.

Decides the directions and how far they go. Knows nothing of what sharpness says about unseen examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steelyard.errors import ModelError
from steelyard.learn.measures import IGNORED
from steelyard.learn.seeding import generator
from steelyard.learn.task import Batch, Task, apply, per_example

RADIUS, ADAPTIVE = 0.05, 0.5  # of the ascent of SAM, and of its adaptive form
TOLD = 0.1  # errors more among the training examples: as far as random weights may go
STEP = 0.5  # along filter-normalised directions
OCTAVES, HALVINGS = (-14.0, 6.0), 12  # of the standard deviation of random weights, in which the largest is looked for

Shape = Callable[[Tensor], Tensor]  # a parameter -> the scale of a random move of each of its numbers


@dataclass
class Landscape:
    """The mean loss and the share of errors over some batches, at and around the weights of a model.

    The model is in evaluation mode; its parameters are the same before and after each call, bit for bit.
    """

    model: nn.Module
    task: Task
    batches: Sequence[Batch]

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.is_floating_point()]
        self.weights = [p.detach().clone() for p in self.parameters]
        self.count = sum(map(len, self.batches))

    def loss(self) -> Tensor:
        """The mean of the task's loss, with its graph."""
        parts = [per_example(self.task.loss, apply(self.model, b), b, f"loss of {self.task.name}").sum()
                 for b in self.batches]  # fmt: skip
        return torch.stack(parts).sum() / self.count

    @torch.no_grad()
    def measured(self) -> tuple[float, float]:
        """The mean loss and the share of targets that the largest output misses."""
        loss, missed, targets = 0.0, 0, 0
        for batch in self.batches:
            outputs = apply(self.model, batch)
            loss += float(per_example(self.task.loss, outputs, batch, f"loss of {self.task.name}").double().sum())
            if not batch.targets.is_floating_point() and outputs.ndim > 1:
                counted = batch.targets != IGNORED
                missed += int((outputs.argmax(-1) != batch.targets)[counted].sum())
                targets += int(counted.sum())
        return loss / self.count, missed / targets if targets else math.nan

    @contextmanager
    def moved(self, moves: Sequence[Tensor]) -> Iterator[None]:
        """Within the block each parameter is moved."""
        try:
            with torch.no_grad():
                for p, move in zip(self.parameters, moves, strict=True):
                    p.add_(move)
            yield
        finally:
            with torch.no_grad():
                for p, weight in zip(self.parameters, self.weights, strict=True):
                    p.copy_(weight)

    def gradient(self) -> list[Tensor]:
        """Of the mean loss; zeros where there is none."""
        found = torch.autograd.grad(self.loss(), self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def drawn(self, number: int, shape: Shape) -> list[Tensor]:
        """Random moves: standard normal numbers times `shape`; the same for the same number."""
        random = generator(0, "sharpness", number)
        drawn = (torch.randn(w.shape, generator=random, dtype=torch.float64) for w in self.weights)
        return [z.to(w) * shape(w) for z, w in zip(drawn, self.weights, strict=True)]


def ascent(land: Landscape, loss: float) -> dict[str, float]:
    """The rise of the loss after one step uphill, of length 0.05 (SAM), and of length 0.5 in units of |w| (adaptive).

    SAM moves by rho g / |g|, its adaptive form by rho w² g / |w g|, which no rescaling of layers changes.

    Source: Foret et al., Sharpness-aware minimization, 2021; Kwon et al., ASAM, 2021.
    """
    gradient = land.gradient()
    scaled = [g * w.abs() for g, w in zip(gradient, land.weights, strict=True)]
    found = {}
    for name, radius, along, back in (
        ("steepest ascent", RADIUS, gradient, [torch.ones_like(w) for w in land.weights]),
        ("steepest ascent, adaptive", ADAPTIVE, scaled, [w.abs() for w in land.weights]),
    ):
        size = _length(along)
        moves = [radius / size * g * b if size else torch.zeros_like(g) for g, b in zip(along, back, strict=True)]
        with land.moved(moves):
            found[name] = land.measured()[0] - loss
    return found


def random_weights(land: Landscape, error: float, draws: int) -> dict[str, float]:
    """1 / sigma² of the largest random moves N(0, sigma²), and N(0, sigma² w²), that cost no more than 0.1 errors more.

    The share of errors is the mean over `draws` directions, the same ones for every sigma; sigma is found by halving.
    NaN where targets are no classes.

    Source: Neyshabur et al., Exploring generalization in deep learning, 2017; Jiang et al., Fantastic generalization
    measures and where to find them, 2020 (sharpness and magnitude-aware flatness of PAC-Bayes).
    """
    shapes: Mapping[str, Shape] = {"random weights": torch.ones_like, "random weights, by magnitude": torch.abs}
    found = {}
    for name, shape in shapes.items():
        low, high = OCTAVES
        for _ in range(HALVINGS if not math.isnan(error) else 0):
            middle = (low + high) / 2
            if _errors(land, 2**middle, shape, draws) > error + TOLD:
                high = middle
            else:
                low = middle
        found[name] = 2.0 ** -(low + high) if not math.isnan(error) else math.nan
    return found


def along_filters(land: Landscape, loss: float, draws: int) -> float:
    """The mean rise of the loss half a filter's length away, in random directions with the length of each filter.

    The rows of each matrix get the norm that they have in the model; biases and gains do not move.

    Source: Li et al., Visualizing the loss landscape of neural nets, 2018.
    """
    rises: list[float] = []
    for number in range(draws):
        moves = []
        for z, w in zip(land.drawn(number, torch.ones_like), land.weights, strict=True):
            if w.ndim < 2:
                moves.append(torch.zeros_like(w))
                continue
            length = z.flatten(1).norm(dim=1).clamp_min(torch.finfo(w.dtype).tiny)
            factor = STEP * w.flatten(1).norm(dim=1) / length
            moves.append(z * factor.reshape(-1, *[1] * (w.ndim - 1)))
        with land.moved(moves):
            rises.append(land.measured()[0] - loss)
    return sum(rises, 0.0) / len(rises)


def hessian_trace(land: Landscape, draws: int) -> float:
    """The trace of the Hessian of the mean loss: the mean of v H v over vectors v of random signs.

    Source: Hutchinson, A stochastic estimator of the trace, 1990; Yao et al., PyHessian, 2020.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the others can be differentiated once only
        gradient = torch.autograd.grad(land.loss(), land.parameters, create_graph=True, allow_unused=True)
    kept = [(g, p) for g, p in zip(gradient, land.parameters, strict=True) if g is not None and g.requires_grad]
    if not kept:
        raise ModelError("the loss does not depend on the weights: it has no curvature")
    total = 0.0
    for number in range(draws):
        random = generator(0, "signs", number)
        signs = [(2.0 * torch.randint(2, p.shape, generator=random) - 1).to(p) for _, p in kept]
        product = sum((g * v).sum() for (g, _), v in zip(kept, signs, strict=True))
        curved = torch.autograd.grad(product, [p for _, p in kept], retain_graph=True, allow_unused=True)
        total += sum(float((h * v).double().sum()) for h, v in zip(curved, signs, strict=True) if h is not None)
    return total / draws


def _errors(land: Landscape, sigma: float, shape: Shape, draws: int) -> float:
    missed = 0.0
    for number in range(draws):
        with land.moved([sigma * z for z in land.drawn(number, shape)]):
            missed += land.measured()[1]
    return missed / draws


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))

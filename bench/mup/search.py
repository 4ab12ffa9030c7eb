"""The best learning rate of a model on a grid of sqrt(2): short trainings, and a search that ends inside the grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

BEYOND = 2  # steps of the grid that must be worse on either side of the best one


def rate(step: int) -> float:
    """Step k of the grid is 2^(k/2)."""
    return 2 ** (step / 2)


def final_loss(model: Any, optimizer: Any, batches: Sequence[tuple[Any, Any]]) -> float:
    """The mean training loss over the last third of the batches, each seen once; chance or worse counts as such."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 20 * losses[0]:
            return 10 * losses[0]
    return statistics.fmean(losses[-len(losses) // 3 :])


def best(trained: Callable[[float, int], float], seeds: int, start: int) -> dict[str, Any]:
    """The step of the grid with the lowest mean log loss over seeds, the losses, and the vertex of a parabola there.

    `trained(rate, seed)` gives a final loss. Walks from `start` until the best has `BEYOND` worse ones on both sides.
    """
    scores: dict[int, float] = {}
    here = start
    while True:
        for step in range(here - BEYOND, here + BEYOND + 1):
            if step not in scores:
                scores[step] = statistics.fmean(math.log(trained(rate(step), seed)) for seed in range(seeds))
        lowest = min(scores, key=scores.__getitem__)
        if lowest == here:
            break
        here = lowest
    left, middle, right = (scores[here + i] for i in (-1, 0, 1))
    vertex = here + (left - right) / (2 * (left + right - 2 * middle))
    losses = {str(step): round(math.exp(scores[step]), 4) for step in sorted(scores)}
    return {"step": here, "rate": rate(here), "vertex": round(vertex, 2), "losses": losses}


def digit_batches(
    images: torch.Tensor, labels: torch.Tensor, steps: int, size: int, seed: int
) -> list[tuple[Any, Any]]:
    """Batches of digits, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(images), generator=generator)[:size] for _ in range(steps)]
    return [(images[i], labels[i]) for i in chosen]

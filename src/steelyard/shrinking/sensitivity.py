"""How much the outputs mind an error in each weight: evidence from the model and inputs alone, without labels.

Decides which differences of outputs count. An error d of the weights changes the outputs by about ``d F d / 2``: in
nats of KL divergence from the original for classes, otherwise in squares of the outputs' standard deviation.

Sources: Y. LeCun, J. Denker, S. Solla, Optimal brain damage, NIPS 1989; labels drawn from the model instead of those of
the data: J. Martens, New insights and perspectives on the natural gradient method, JMLR 2020 (arXiv 1412.1193).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.learn.evaluate import evaluating
from steelyard.learn.kronecker import kronecker
from steelyard.learn.seeding import generator
from steelyard.learn.task import Batch, Split, Task, apply, first_batch

BATCHES = 32  # a gradient of each, at least: the mean of so many squares is near the truth for a whole tensor
DRAWS = 256  # at most, of a small model: for pairs of rows and columns it takes more of them
EASY = 1 << 18  # weights of a model of which so many are drawn at once


def draws(weights: int) -> int:
    """How many gradients are drawn for a model of so many weights: as many as take little time.

    >>> draws(10_000), draws(1_000_000), draws(22_700_000)
    (256, 67, 32)
    """
    return min(DRAWS, max(BATCHES, DRAWS * EASY // max(weights, 1)))


def repeated(task: Task, used: set[Split]) -> Iterator[Batch]:
    """Batches of both splits that may be looked at, again and again: each time labels are drawn anew.

    used: becomes those splits of which a batch was taken.
    """
    splits: tuple[Split, ...] = ("train", "valid")
    for epoch in range(DRAWS):
        for split in splits:
            for batch in task.batches(split, epoch if split == "train" else 0):
                used.add(split)
                yield batch


def sensitivity(
    model: nn.Module, batches: Iterable[Batch], *, classes: bool, seed: int = 0, most: int = BATCHES
) -> Weights:
    """The Fisher information of one example's outputs, as two factors for each matrix: see `kronecker`.

    classes: the last axis of the outputs are logits of which one is true; otherwise they are numbers, all of the same
    error. One backward pass for each of at most `most` batches: the gradient of drawn labels has mean zero, so that its
    square over a batch is the sum of the examples' squares. The model is left as it was. Raises ModelError where
    there is no batch, or a gradient is not finite.
    """
    draw = generator(seed, "sensitivity")

    def drawn(model: nn.Module, batch: Batch) -> Tensor:
        outputs = apply(model, batch)
        return _drawn(outputs, classes, draw) / math.sqrt(len(batch))

    return kronecker(model, islice(batches, most), drawn)


def has_classes(model: nn.Module, task: Task) -> bool:
    """Whether the last axis of the outputs are logits of which the target names one."""
    batch = first_batch(task, "valid")
    with evaluating(model):
        outputs = apply(model, batch)
    return not batch.targets.is_floating_point() and outputs.ndim > 1 and outputs.shape[-1] > 1


def _drawn(outputs: Tensor, classes: bool, draw: torch.Generator) -> Tensor:
    """A number whose gradient, squared and averaged over draws, is the information of all examples together."""
    if classes:
        flat = outputs.reshape(-1, outputs.shape[-1]).log_softmax(-1)
        labels = torch.multinomial(flat.detach().exp().cpu(), 1, generator=draw).to(flat.device)
        return flat.gather(1, labels).sum()
    spread = outputs.detach().std(correction=0).clamp_min(torch.finfo(outputs.dtype).tiny)
    signs = torch.randint(0, 2, outputs.shape, generator=draw).to(outputs.device, outputs.dtype) * 2 - 1
    return (outputs * signs / spread).sum()

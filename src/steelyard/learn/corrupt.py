"""Spoilt inputs: noise, shifts, rotations, missing values, in a stated strength and by a seed.

Decides what each kind does to a batch. Knows nothing of models or of what the damage costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.seeding import generator
from steelyard.learn.task import Batch, Checked, Split, Task, first_batch
from steelyard.learn.warp import warped


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each number of an input over the training split; of images one for all pixels."""

    mean: Tensor
    spread: Tensor


Spoil = Callable[[Tensor, float, Scale, torch.Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """One way to spoil inputs of shape (examples, ...)."""

    spoil: Spoil
    unit: str  # of the strength
    strengths: tuple[float, ...]  # usual ones, from little to much
    images: bool = False  # needs (examples, channels, height, width)

    def fits(self, task: Task) -> bool:
        """Whether the inputs of a task can be spoilt so."""
        found = first_batch(task, "train").inputs
        return isinstance(found, Tensor) and found.is_floating_point() and (not self.images or found.ndim == 4)


def _noise(x: Tensor, strength: float, scale: Scale, random: torch.Generator) -> Tensor:
    return x + strength * scale.spread * torch.randn(x.shape, generator=random, dtype=x.dtype)


def _missing(x: Tensor, strength: float, scale: Scale, random: torch.Generator) -> Tensor:
    gone = torch.rand(x.shape, generator=random, dtype=x.dtype) < strength
    return torch.where(gone, scale.mean, x)


def _shift(x: Tensor, strength: float, _scale: Scale, random: torch.Generator) -> Tensor:
    way = 2 * math.pi * torch.rand(len(x), generator=random, dtype=x.dtype)
    return warped(x, right=strength * way.cos(), down=strength * way.sin(), fill=float(x.min()))


def _rotate(x: Tensor, strength: float, _scale: Scale, random: torch.Generator) -> Tensor:
    side = torch.randint(2, (len(x),), generator=random).to(x.dtype) * 2 - 1
    return warped(x, angle=math.radians(strength) * side, fill=float(x.min()))


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": Corruption(_noise, "standard deviations of the training inputs", (0.1, 0.25, 0.5, 1.0)),
    "missing": Corruption(_missing, "share of the numbers, replaced by their mean", (0.05, 0.1, 0.25, 0.5)),
    "shift": Corruption(_shift, "pixels, in any direction", (0.5, 1.0, 1.5, 2.0), images=True),
    "rotate": Corruption(_rotate, "degrees, to either side", (5.0, 10.0, 20.0, 40.0), images=True),
}


def corrupted(task: Task, kind: str, strength: float, *, splits: tuple[Split, ...] = ("test",), seed: int = 0) -> Task:
    """The task with the inputs of some splits spoilt, in the same way whenever they are served.

    "noise": Gaussian, as a share of the standard deviation of the training inputs (of each column of a table, of all
    pixels of images). "missing": each number with that probability replaced by its mean over the training split.
    "shift", "rotate": images moved by so many pixels in a random direction, or turned by so many degrees to either
    side, resampled bilinearly. The training split, where it is chosen, is spoilt anew in each epoch.

    Raises UnknownNameError for another kind, ModelError for inputs that it does not fit or a negative strength.

    >>> from steelyard.learn.tasks import task
    >>> plain, spoilt = task("breast-cancer"), corrupted(task("breast-cancer"), "missing", 0.3)
    >>> a, b = (next(iter(t.batches("test", 0))).inputs for t in (plain, spoilt))
    >>> 0.25 < float((a != b).float().mean()) < 0.35
    True
    """
    if kind not in CORRUPTIONS:
        raise UnknownNameError("corruption", kind, CORRUPTIONS)
    if not 0 <= strength < math.inf:
        raise ModelError(f"strength={strength}: expected a finite number, 0 or more")
    if not CORRUPTIONS[kind].fits(task):
        wanted = "images of shape (channels, height, width)" if CORRUPTIONS[kind].images else "numbers"
        raise ModelError(f"the inputs of the task {task.name!r} cannot be spoilt by {kind!r}: it needs {wanted}, "
                         "in a single tensor")  # fmt: skip
    spoilt = _Spoilt(task, kind, float(strength), splits, seed)
    return replace(task, batches=spoilt, about={**task.about, "corruption": f"{kind} {strength:g}"})


@dataclass(frozen=True)
class _Spoilt(Checked):
    task: Task
    kind: str
    strength: float
    splits: tuple[Split, ...]
    seed: int

    @cached_property
    def scale(self) -> Scale:
        return _scale(self.task)

    def __call__(self, split: Split, epoch: int) -> Iterable[Batch]:
        found = self.task.batches(split, epoch)
        if split not in self.splits:
            return found
        return (_SizedBatches if hasattr(found, "__len__") else _Batches)(self, split, epoch, found)

    def spoil(self, batch: Batch, *purpose: object) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        x = batch.inputs.cpu()  # the same examples on every device
        scale = Scale(self.scale.mean.to(x.dtype), self.scale.spread.to(x.dtype))
        random = generator(self.seed, "corrupted", self.kind, *purpose)
        spoilt = CORRUPTIONS[self.kind].spoil(x, self.strength, scale, random)
        return replace(batch, inputs=spoilt.to(batch.inputs.device))


@dataclass(frozen=True)
class _Batches:
    by: _Spoilt
    split: Split
    epoch: int
    found: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.found):
            yield self.by.spoil(batch, self.split, self.epoch if self.split == "train" else 0, number)


@dataclass(frozen=True)
class _SizedBatches(_Batches):
    def __len__(self) -> int:
        return len(self.found)  # type: ignore[arg-type]


def _scale(task: Task) -> Scale:
    """Over the first epoch of the training split, in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in task.batches("train", 0):
        assert isinstance(batch.inputs, Tensor)
        x = batch.inputs.double().cpu()
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    if not count:
        raise ModelError(f"the train split of the task {task.name!r} is empty: its inputs have no scale")
    mean, square = total / count, squares / count
    if mean.ndim > 1:
        return Scale(mean, (square.mean() - mean.mean().square()).clamp_min(0).sqrt())
    return Scale(mean, (square - mean.square()).clamp_min(0).sqrt())

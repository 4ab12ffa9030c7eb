"""Deep compression: prune in stages, share what is left, code it; fine-tune in between.

Decides the order, the schedule of sparsities and when a stage went too far (by the validation split alone).
Knows nothing of files: every stage hands out Weights, and whoever writes them measures their size.

Source: Han, Mao, Dally, "Deep Compression", ICLR 2016; the cubic schedule is Zhu and Gupta, "To prune, or not to
prune", 2017; the soft targets are Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch.nn.functional as F  # noqa: N812  (the name that everybody uses)
from torch import Tensor, nn

from steelyard.codecs.bitmask import Bitmask
from steelyard.codecs.delta import Delta
from steelyard.codecs.entropy import Entropy
from steelyard.codecs.palette import Palette
from steelyard.core.packed import Packed, Plan, nest, smallest
from steelyard.core.transform import Transform, chain, each, on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import where
from steelyard.edit.pack import Pack
from steelyard.edit.prune import Prune, mask_of
from steelyard.edit.share import Share
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.constrain import masked, release, shared
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.examples import ExampleLoss
from steelyard.learn.labels import IGNORED
from steelyard.learn.run import train
from steelyard.learn.task import Batch, Split, Task, apply, first_batch, inner_loss
from steelyard.shrinking.settings import Settings

Bearable = Callable[[nn.Module], bool]  # whether validation bears what was done to the student

MATRICES = where(min_ndim=2, kind="float")
Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class Stage:
    """What one stage left: its weights, held as they would be written, and what was done."""

    name: str
    weights: Weights
    note: str
    valid: float  # the headline metric on the validation split
    examples: np.ndarray | None = None  # the same of each example, where it was measured on the weights as held


def deep_compression(model: nn.Module, task: Task, settings: Settings, seed: int = 0) -> Iterator[Stage]:
    """Yield the stages 'pruned', 'shared' and 'coded'; `model` is left as it was.

    The headline metric on the validation split is compared with the original's. Pruning ends at the sparsest stage
    that loses no more than ``settings.tolerance`` there; sharing tries four times as many values until it does. The
    test split is never looked at. Raises ModelError if there is nothing to prune.
    """
    original = headline(model, task)

    def bearable(student: nn.Module) -> bool:
        return bears(lost(task, original, headline(student, task)), settings.tolerance)

    student, lesson = copy.deepcopy(model), distilled(task, model)
    if not from_module(student).select(MATRICES):
        raise ModelError(f"{type(model).__name__} has no matrix or filter to prune; leave shrinking out")

    reached = _prune(student, lesson, bearable, settings, seed)
    pruned = from_module(student).settle()
    note = f"{reached:.1%} of the weights in matrices are zero"
    yield Stage("pruned", coded(sparse_plan(None))(pruned), note, headline(student, task))

    k = _share(student, lesson, bearable, settings, seed)
    held = from_module(student).settle()
    yield Stage("shared", coded(sparse_plan(k, plain=True))(held), f"at most {k} values a tensor, and zero",
                headline(student, task))  # fmt: skip
    yield Stage("coded", coded(sparse_plan(k))(held), "what is left, entropy coded", headline(student, task))


def lost(task: Task, before: Number, after: Number) -> Number:
    """How much worse the headline metric is, or is on each example: positive when `after` is worse than `before`."""
    found: Number = after - before if task.headline in task.lower_is_better else before - after
    return found


def bears(loss: float, tolerance: float) -> bool:
    """Whether a difference of two means is within the tolerance, but for the rounding of that difference.

    >>> 0.974 - 0.969 <= 0.005, bears(0.974 - 0.969, 0.005)
    (False, True)
    """
    return loss <= tolerance or math.isclose(loss, tolerance, rel_tol=1e-9)


def headline(model: nn.Module, task: Task, split: Split = "valid") -> float:
    """The mean of the task's first metric."""
    return float(next(iter(outcomes(model, task, split).values())).mean())


def sparse_plan(k: int | None, *, plain: bool = False) -> Plan:
    """How a pruned (and shared) tensor is held: whichever of mask, distances and dense codes is smallest.

    `k` is the number of values besides zero (None: not shared); `plain` leaves the entropy coder out.
    """
    last = None if plain else Entropy()
    if k is None:
        held: Plan = last
        return smallest(nest(Bitmask(), mask=Entropy(), values=held), nest(Delta(8), gaps=Entropy(), values=held), None)
    values = nest(Palette(k), codes=Entropy()) if not plain else Palette(k)
    dense = nest(Palette(k + 1), codes=Entropy()) if not plain else Palette(k + 1)
    mask = nest(Bitmask(), mask=Entropy(), values=values) if not plain else nest(Bitmask(), values=values)
    gaps = nest(Delta(8), gaps=Entropy(), values=values) if not plain else nest(Delta(), values=values)
    return smallest(mask, gaps, dense, None)


def coded(plan: Plan) -> Transform:
    """Matrices held as `plan` says, and what is left in half precision where that changes it by next to nothing."""
    return chain(on(MATRICES, Pack(plan)), vectors_halved())


def vectors_halved() -> Transform:
    """What is no matrix in half precision, where that changes it by next to nothing."""
    return on(~MATRICES & where(dtype="float32"), each(halved))


def vectors_lighter(rounded: Weights, original: Weights) -> Weights:
    """Each vector as it is held in `rounded`, or in half precision where that takes no more bytes; reads them."""
    halves = vectors_halved()(original)

    def lighter(item: Weight) -> Weight:
        held, half = item.read(), halves[item.name]
        return item if isinstance(held, Packed) and held.nbytes < half.spec.nbytes else half

    return on(~MATRICES, each(lighter))(rounded)


def halved(weight: Weight) -> Weight:
    """The weight in float16 if no value moves by more than its last bit there, or 2^-14 of the largest; reads it.

    Large running variances, and whatever else float16 cannot hold, stay as they are.
    """
    x = weight.array()
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    allowed = np.maximum(np.abs(x) * 2.0**-11, np.abs(x).max(initial=0) * 2.0**-14)
    close = np.isfinite(half).all() and (np.abs(half.astype(np.float32) - x) <= allowed).all()
    return Weight.of(weight.name, half, weight.origin) if close else weight


def distilled(task: Task, teacher: nn.Module) -> Task:
    """The task with what the teacher says as targets in training; validation keeps the true ones.

    For classes, at each position of an example if there are several, these are the teacher's probabilities, and the
    loss is the cross entropy with them (positions that do not count stay so). Where targets are numbers like the
    outputs, embeddings for example, and the task's loss of the outputs themselves as targets is 0, they are the
    teacher's outputs. Any other task is returned as it is.
    """
    kind = _lesson(teacher, task)
    if kind is None:
        return task
    teacher = copy.deepcopy(teacher)

    def batches(split: Split, epoch: int) -> Iterator[Batch]:
        for batch in task.batches(split, epoch):
            if split == "train":
                with evaluating(teacher):
                    outputs = apply(teacher, batch)
                told = outputs if kind == "numbers" else outputs.softmax(-1) * (batch.targets != IGNORED)[..., None]
                batch = replace(batch, targets=told)
            yield batch

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return _soft(outputs, targets) if targets.is_floating_point() else task.loss(outputs, targets)

    return replace(task, batches=batches, loss=task.loss if kind == "numbers" else loss)


def _soft(outputs: Tensor, chances: Tensor) -> Tensor:
    """-sum chances * log softmax(outputs) of each example, the mean over positions whose chances are not all 0."""
    classes = outputs.shape[-1]
    each = F.cross_entropy(outputs.reshape(-1, classes), chances.reshape(-1, classes), reduction="none")
    counted = (chances.sum(-1) > 0).reshape(len(outputs), -1).to(each.dtype)
    return each.reshape(len(outputs), -1).sum(1) / counted.sum(1).clamp_min(1)


def _lesson(model: nn.Module, task: Task) -> Literal["classes", "numbers"] | None:
    """What a teacher's outputs are good for as targets."""
    batch = first_batch(task, "valid")
    with evaluating(model):
        outputs, targets = apply(model, batch), batch.targets
        if not targets.is_floating_point():
            return "classes" if outputs.ndim > 1 and outputs.shape[:-1] == targets.shape else None
        loss = inner_loss(task)
        if outputs.shape != targets.shape or isinstance(loss, ExampleLoss):
            return None
        found = loss(outputs, outputs.to(targets.dtype))
    return "numbers" if bool((found.abs() <= 1e-4).all()) else None


def _prune(student: nn.Module, lesson: Task, bearable: Bearable, settings: Settings, seed: int) -> float:
    """Prune in cubic stages, then step back to the sparsest that validation bears; returns its sparsity.

    A stage that loses too much is not the end: the next one heals on. Only the last gets a second healing.
    """
    reached = [(0.0, copy.deepcopy(student.state_dict()))]
    for stage in range(1, settings.prune_stages + 1):
        fraction: float = settings.sparsity * (1 - (1 - stage / settings.prune_stages) ** 3)
        last = stage == settings.prune_stages
        for attempt in range(1 + last):
            weights = on(MATRICES, Prune(fraction))(from_module(student)).settle()
            into_module(weights, student)
            masked(student, mask_of(weights.select(MATRICES)))
            _heal(student, lesson, settings.prune_epochs, settings.rate, seed + 10 * stage + attempt)
            if bearable(student):
                break
        reached.append((fraction, copy.deepcopy(student.state_dict())))
    for fraction, state in reversed(reached):
        student.load_state_dict(state)
        if bearable(student):
            return fraction
    return 0.0


def _share(student: nn.Module, lesson: Task, bearable: Bearable, settings: Settings, seed: int) -> int:
    """Share values, more of them where validation asks for it; returns how many a tensor may have."""
    before, k = copy.deepcopy(student.state_dict()), settings.k
    while True:
        weights = on(MATRICES, Share(k))(from_module(student)).settle()
        into_module(weights, student)
        shared(student, weights.select(MATRICES))
        _heal(student, lesson, settings.share_epochs, settings.rate, seed + 100)
        if bearable(student) or k >= 256:
            return k
        student.load_state_dict(before)
        k = min(4 * k, 256)


def _heal(student: nn.Module, lesson: Task, epochs: int, rate: float, seed: int) -> None:
    """Train under the constraint, then make its result the plain tensors of the module."""
    if epochs:
        train(
            lesson, student, epochs=epochs, rate=rate, schedule="cosine", weight_decay=0.0, seed=seed, progress=False
        )  # fmt: skip
    release(student)

"""Whether a proof can come out at all, and whether its examples are free to make one: said before the search.

Decides when proof examples count as seen before, and when a tolerance is finer than rounding can be measured. What a
promise is, is `promise`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weight, Weights
from steelyard.errors import ModelError, ProofWarning, quoted
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import evaluating
from steelyard.learn.task import Batch, Split, Task, apply, device_of, per_example
from steelyard.shrinking.deep import MATRICES, lost
from steelyard.shrinking.promise import Promise, rounded

PROBE = 256  # validation examples at most, and half of them: not an evaluation
COPIED = 1e-3  # the chance of draws that are as even in number
FEW, FAR = 0.02, 100  # a share of copies that is told; how many times as many as nearly the same are no chance
SAMPLE = 256  # examples that are looked at, and numbers of each
STEP = math.sqrt(2 * math.pi * math.e) / 2**9  # root mean squares of a tensor: nine bits of Gaussian weights, coded


def unseen(task: Task, *, training: bool) -> str:
    """What is to be said of proof examples whose inputs are those of validation (or training) examples, too; '' mostly.

    Raises ModelError where that is so of half of them, and no more than a few are drawn twice in the proof split:
    data of few different examples repeat themselves in every split, and prove what they do all the same; copies do not.
    training: the training split is looked at, too, because what is trained for size has seen its targets.
    """
    proof = Counter(_rows(task.batches("test", 0)))
    examples, told = sum(proof.values()), []
    twice = sum(count for count in proof.values() if count > 1)
    if copied(proof.values()):
        twice = 0
        told.append(f"the {examples:,} proof examples are copies of {len(proof):,}")
    elif examples - len(proof) > FEW * examples and _no_chance(task, proof.values()):
        told.append(f"{examples - len(proof):,} of {examples:,} proof examples are copies of others")
    copies = bool(told)
    splits: tuple[Split, ...] = ("valid", "train") if training else ("valid",)
    for split in splits:
        others = Counter(_rows(task.batches(split, 0)))
        shared = sum(count for row, count in proof.items() if row in others)
        by_chance = twice * max(1.0, sum(others.values()) / max(examples, 1))
        name = {"valid": "validation", "train": "training"}[split]
        if shared and 2 * shared >= examples and 2 * by_chance < shared:
            raise ModelError(
                f"{shared:,} of {examples:,} proof examples of the task {quoted(task.name)} (its test split) have the "
                f"inputs of {name} examples: they would prove what was chosen by them; give a test split that nothing "
                "else has seen"
            )
        if shared > (0 if copies else by_chance + 4 * math.sqrt(by_chance)):
            told.append(f"{shared:,} of {examples:,} proof examples have the inputs of {name} examples")
    if told:
        warnings.warn(f"{'; '.join(told)}: what is proven may be too good; take them out", ProofWarning, stacklevel=2)
    return "; ".join(told)


def copied(counts: Collection[int]) -> bool:
    """Whether what is there so many times each was copied: draws of few different examples would differ more in number.

    As often as that is drawn at all, the numbers of draws are Poisson without its zeros; copies are told where their
    squares are as small as those of draws once in a thousand times.

    >>> copied([6] * 100), copied([1] * 100), copied([6, 9, 3, 5, 8, 4, 7, 10, 2, 6])
    (True, False, False)
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2

    found = np.array([*counts], dtype=np.float64)
    if len(found) < 2 or found.sum() < 1.5 * len(found):
        return False
    mean = float(found.mean())
    drawn = brentq(lambda rate: rate - mean * -math.expm1(-rate), 1e-9, mean)  # the rate of draws with this mean
    squares = float(np.square(found - mean).sum()) / (mean * (1 + drawn - mean))
    return bool(chi2.cdf(squares, len(found) - 1) < COPIED)


def _no_chance(task: Task, counts: Collection[int]) -> bool:
    """Whether many more pairs of inputs are the same than nearly the same (in one number, or 5 % of them, other).

    counts: how many times each is there. What few values make comes out nearly the same as well as the same.
    """
    taken: list[np.ndarray] = []
    for batch in task.batches("test", 0):
        found = np.concatenate([_some(x) for x in batch.arguments], axis=1)
        if not taken or found.shape[1] == taken[0].shape[1]:  # texts of other lengths are other texts
            taken.append(found)
        if sum(map(len, taken)) >= SAMPLE:
            break
    rows, examples = np.concatenate(taken)[:SAMPLE], sum(counts)
    if len(rows) < 2:
        return False
    few, near = max(1, rows.shape[1] // 20), 0
    for row in rows:
        other = (rows != row).sum(1)
        near += int(((other > 0) & (other <= few)).sum())
    same = sum(count * (count - 1) for count in counts) / (examples * (examples - 1))
    return same > max(FAR * near, 1) / (len(rows) * (len(rows) - 1))


def _some(x: Tensor) -> np.ndarray:
    """Numbers of each example, not more than some hundreds of them."""
    flat = torch.view_as_real(x) if x.is_complex() else x
    flat = flat.flatten(1) if flat.ndim > 1 else flat[:, None]
    found: np.ndarray = flat[:, :: max(1, flat.shape[1] // SAMPLE)].detach().cpu().double().numpy()
    return found


def _rows(batches: Iterable[Batch]) -> Iterable[int]:
    """A number for the inputs of each example: the same for the same bytes."""
    for batch in batches:
        parts = [_bytes(x) for x in batch.arguments]
        yield from (hash(b"".join(row)) for row in zip(*parts, strict=True))


def _bytes(x: Tensor) -> list[bytes]:
    """Those of each row."""
    flat = (x.flatten(1) if x.ndim > 1 else x[:, None]).detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def reachable(
    student: nn.Module, original: Weights, task: Task, before: np.ndarray, examples: int, promise: Promise
) -> None:
    """Raise ModelError where not even weights of nine bits could be proven within the tolerance by so many examples.

    For metrics that are not right or wrong, of which `provable` knows nothing: what nine bits change in some validation
    examples, which is half of what they lose in the largest file that a search makes, has a spread. before: the metric
    of the original on all validation examples, in their order. student: is given other weights.
    """
    into_module(_rounded(original), student)
    found = _probed(student, task, min(PROBE, len(before) // 2))
    worse = lost(task, before[: len(found)], found)
    if len(worse) < 2 or not np.isfinite(worse).all() or promise.would(worse, examples):
        return
    needed, bound = promise.needed(worse), promise.foreseen(worse, examples)
    raise ModelError(
        f"{examples:,} proof examples cannot prove a tolerance of {promise.tolerance:g}: by {len(worse)} validation "
        f"examples, {task.headline} may fall by {rounded(bound, 2)} in truth where weights are rounded to nine bits, "
        "which is finer than any file that shrink makes; take more than that"
        f"{f', or {needed:,} examples' if needed else ''}"
    )


def _probed(student: nn.Module, task: Task, most: int) -> np.ndarray:
    """The metric of the first validation examples, about so many."""
    found: list[np.ndarray] = []
    metric, device = task.metrics[task.headline], device_of(student)
    with evaluating(student):
        for batch in task.batches("valid", 0):
            batch = batch.to(device)
            found.append(per_example(metric, apply(student, batch), batch, task.headline).double().cpu().numpy())
            if sum(map(len, found)) >= most:
                break
    return np.concatenate(found)


def _rounded(original: Weights) -> Weights:
    def rounded(weight: Weight) -> Weight:
        if not MATRICES(weight) or not weight.spec.size:
            return weight
        x = weight.array()
        step = STEP * math.sqrt(float(np.square(x.astype(np.float64)).mean()))
        return Weight.of(weight.name, (np.rint(x / step) * step).astype(x.dtype) if step else x, weight.origin)

    return original.with_items(map(rounded, original.values()))

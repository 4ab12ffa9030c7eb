"""The search of `shrink`: candidates, what each loses on validation data, and which of them the proof accepts.

Decides which sizes are tried and the order in which they are measured. How the bits of a size are shared among tensors
is `edit.ratedistortion`; what outputs mind is `sensitivity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from torch import nn

from steelyard.core.transform import on
from steelyard.core.weights import Weight, Weights
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.errors import ModelError, VerdictError
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.intervals import student
from steelyard.learn.task import Batch, Split, Task, apply, first_batch
from steelyard.shrinking.deep import MATRICES, lost, vectors_halved
from steelyard.shrinking.journal import Journal
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.sensitivity import sensitivity
from steelyard.shrinking.tight import Tight, tighten

SIZES = tuple(round(8 * 0.85**i, 3) for i in range(22))  # bits for each weight of a matrix: 8 to 0.26
SAFER = (6, 4, 2, 1)  # the proof begins so many sizes above the smallest hopeful one
PRICES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # of a bit of the weights, in bits of the training labels
FLOOR = 1e-3  # of a tensor's mean sensitivity: that no example reached an element says little of others
Say = Callable[[str, float], None]  # what is being done, and the share of the whole that is done


@dataclass(frozen=True)
class Candidate:
    """One way to hold the whole model, and how it did."""

    name: str
    weights: Weights  # packed as a file would hold them
    valid: np.ndarray  # how much worse each validation example came out
    test: np.ndarray | None = None  # the same of the proof; None: not asked

    @property
    def bytes(self) -> int:
        """What the tensors take in a file, without its header."""
        return sum(held_bytes(weight) for weight in self.weights.values())


class Search:
    """The state of one search; its methods are called in their order."""

    def __init__(
        self, model: nn.Module, task: Task, original: Weights, promise: Promise, journal: Journal, seed: int, say: Say
    ):
        self.model, self.task, self.original, self.promise = model, task, original, promise
        self.journal, self.seed, self.say = journal, seed, say
        self.student = copy.deepcopy(model)
        self.before: dict[Split, np.ndarray] = {}  # the metric of the original, by example
        self.measured: dict[int, Candidate] = {}  # by the index of its size
        self.others: list[Candidate] = []  # that were trained
        self.tried: list[Candidate] = []  # in the proof
        self.evaluations = 0

    def precondition(self) -> None:
        """Raise ModelError for what no search could end well with."""
        self.say("measuring the original", 0.0)
        for split in ("valid", "test"):
            found = outcomes(self.model, self.task, split)[self.task.headline]  # type: ignore[arg-type]
            if not np.isfinite(found).all():
                wrong = found[~np.isfinite(found)][0]
                raise ModelError(f"the metric {self.task.headline!r} of the original is {wrong} for some {split} "
                                 "examples: mend the metric, or leave them out")  # fmt: skip
            self.before[split] = found  # type: ignore[index]
        examples, tolerance = len(self.before["test"]), self.promise.tolerance
        if _whole(self.before["test"]) and self.promise.least(examples) > tolerance:
            raise ModelError(
                f"{examples} proof examples cannot prove a tolerance of {tolerance:g}, even if none of them changes: "
                f"take at least {self.promise.least(examples):.2g}, or {_enough(self.promise)} examples"
            )
        self._better_than_chance()

    def _better_than_chance(self) -> None:
        """Each output is judged by the target of another example: a model that has learned something does worse."""
        shuffled = outcomes(self.model, _crossed(self.task), "valid")[self.task.headline]
        if student(lost(self.task, self.before["valid"], shuffled), 0.9)[0] <= 0:
            raise ModelError(
                f"the original has {self.task.headline} {self.before['valid'].mean():.4g} on validation data, and "
                f"{shuffled.mean():.4g} on other examples' targets: no better than chance, so that any file would do; "
                "train it first"
            )

    @cached_property
    def minds(self) -> Weights:
        """What the outputs mind of an error in each element of each matrix."""
        return self.journal.weights("sensitivity", self._sensitivity)

    def _sensitivity(self) -> Weights:
        self.say("sensitivities", 0.05)
        served = chain(self.task.batches("train", 0), self.task.batches("valid", 0))
        found = sensitivity(self.model, served, classes=has_classes(self.model, self.task), seed=self.seed)
        matrices = self.original.select(MATRICES)
        return matrices.with_items(Weight.of(name, _floored(found.find(name).array())) for name in matrices)

    def smallest(self) -> int:
        """The smallest size that validation data hold to be provable; raises VerdictError if there is none."""
        low, high = -1, len(SIZES)
        while high - low > 1:  # by the search half
            middle = (low + high) // 2
            low, high = (middle, high) if self._hopeful(self.size(middle).valid[::2]) else (low, middle)
        while low >= 0 and not self._hopeful(self.size(low).valid[1::2]):  # by the other half
            low -= 1
        if low < 0:
            raise VerdictError(f"every form of these weights loses more than {self.promise.tolerance:g} of "
                               f"{self.task.headline} on validation data: nothing is written")  # fmt: skip
        return low

    def size(self, index: int) -> Candidate:
        """The candidate of a size, measured on validation data."""
        if index not in self.measured:
            name = f"{SIZES[index]:g} bits"
            self.say(f"measuring {name}", 0.1 + 0.05 * len(self.measured))
            made = self.journal.weights(name, lambda: self._held(SIZES[index]))
            worse = self.journal.of(f"{name}, validation", lambda: self.worse(made, "valid").tolist())
            self.measured[index] = Candidate(name, made, np.array(worse))
        return self.measured[index]

    def _held(self, bits: float) -> Weights:
        """The original's weights, packed at so many bits for each weight of a matrix."""
        rounding = RateDistortion(bits=bits, by=self.minds)
        return vectors_halved()(on(MATRICES, rounding)(self.original))

    def worse(self, weights: Weights, split: Split) -> np.ndarray:
        """How much worse each example of a split comes out with these weights, in the unit of the metric."""
        into_module(weights, self.student)
        self.evaluations += 1
        return lost(self.task, self.before[split], outcomes(self.student, self.task, split)[self.task.headline])

    def _hopeful(self, worse: np.ndarray) -> bool:
        """Whether the proof examples would prove it if they came out like these."""
        return self.promise.would(worse, len(self.before["test"]))

    def trained(self, epochs: int) -> None:
        """Candidates that were trained to be small, from the original as their teacher; each of them is measured.

        epochs: at the first price of a bit; half as many at each higher one.
        """
        examples = sum(len(batch) for batch in self.task.batches("train", 0))
        if not examples:
            raise ModelError(
                f"the task {self.task.name!r} has no training examples: shrink it without training, epochs=0"
            )
        prices = tuple(price * math.log(2) / examples for price in PRICES)
        told = Tight(tolerance=self.promise.tolerance, prices=prices, epochs=epochs, more_epochs=-(-epochs // 2))
        key = f"trained {epochs} within {self.promise.tolerance:g}"  # the climb ends where the tolerance is passed
        for i, stage in enumerate(tighten(self.model, self.task, told, self.seed, checkpoint=self.journal.place(key))):
            self.say(f"trained: {stage.name}", 0.5 + 0.4 * min(1.0, (i + 1) / (len(PRICES) + 2)))
            worse = lost(self.task, self.before["valid"], stage.examples)
            self.others.append(Candidate(f"{key}, {stage.name}", stage.weights, worse))

    def proven(self, smallest: int) -> Candidate:
        """The smallest candidate that the proof accepts: from the safest on, until one fails.

        Raises VerdictError if the first one fails.
        """
        sizes = [self.size(index) for index in sorted({max(smallest - more, 0) for more in (*SAFER, 0)})]
        smaller = [c for c in self.others if c.bytes < sizes[-1].bytes]
        hopeful = [c for c in smaller if self._hopeful(c.valid[::2]) and self._hopeful(c.valid[1::2])]
        order = sorted([*sizes, *hopeful], key=lambda c: -c.bytes)
        accepted = None
        for i, found in enumerate(order):
            self.say(f"proving {found.name}", 0.9 + 0.08 * i / len(order))
            worse = self.journal.of(f"{found.name}, proof", lambda f=found: self.worse(f.weights, "test").tolist())
            found = replace(found, test=np.array(worse))
            self.tried.append(found)
            if not self.promise.kept(found.test):
                break
            accepted = found
        if accepted is None:
            raise VerdictError(self.alternative(self.tried[0].bytes, self.tried[0].test))
        return accepted

    def alternative(self, size: int, worse: np.ndarray) -> str:
        """What could be promised of the safest candidate, of so many bytes, which failed on the proof examples."""
        needed, bound = self.promise.needed(worse), self.promise.bound(worse)
        more = f"{needed:,} examples like these would prove {self.promise.tolerance:g}" if needed else \
               f"no number of examples like these would prove {self.promise.tolerance:g}"  # fmt: skip
        return (
            f"the safest candidate ({size:,} bytes) may lose {bound:.4g} of {self.task.headline} on the {len(worse)} "
            f"proof examples (measured: {worse.mean():.4g}), the tolerance is {self.promise.tolerance:g}: {more}; "
            f"a tolerance of {bound:.2g} would have been kept. Nothing is written"
        )


def held_bytes(weight: Weight) -> int:
    """The bytes of a weight as it is held."""
    return int(weight.read().nbytes)


def has_classes(model: nn.Module, task: Task) -> bool:
    """Whether the last axis of the outputs are logits of which the target names one."""
    batch = first_batch(task, "valid")
    with evaluating(model):
        outputs = apply(model, batch)
    return not batch.targets.is_floating_point() and outputs.ndim > 1 and outputs.shape[-1] > 1


def _crossed(task: Task) -> Task:
    """The task with the targets of each validation batch handed on to the next example."""

    def batches(split: Split, epoch: int) -> Sequence[Batch]:
        return [replace(batch, targets=batch.targets.roll(1, 0)) for batch in task.batches(split, epoch)]

    return replace(task, batches=batches)


def _whole(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _enough(promise: Promise) -> int:
    """The examples that would prove the tolerance if none of them changed."""
    needed = promise.needed(np.zeros(2))
    assert needed is not None  # nothing is lost
    return needed


def _floored(sensitivities: np.ndarray) -> np.ndarray:
    return np.maximum(sensitivities, sensitivities.mean() * FLOOR)

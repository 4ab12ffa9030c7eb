"""Students with fewer blocks and narrower layers, each trained on with the original as its teacher.

Decides what goes at each rung of the ladder. Whether a rung is borne, and how fast it is, is for whoever climbs it.

Sources: blocks by what is missed least (A. Veit et al., NIPS 2016); units by the first-order Taylor criterion of whole
units (P. Molchanov et al., Importance estimation for neural network pruning, CVPR 2019).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from functools import partial

from torch import nn

from steelyard.core.weights import Weights
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.blocks import blocks, prune_blocks_
from steelyard.learn.evaluate import evaluating
from steelyard.learn.evidence import score
from steelyard.learn.run import Run, train
from steelyard.learn.structured import prune_structured_
from steelyard.learn.task import Task, first_batch
from steelyard.shrinking.deep import distilled
from steelyard.shrinking.journal import Journal

KEPT = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # of the multiplications, at each rung of narrowing
EIGHTS = 8  # units together: what the registers of processors hold
BATCHES = 16  # for the scores of units
RATE = 2e-3
Rung = tuple[str, nn.Module]  # what was done, and the student
Rungs = Generator[Rung, bool | None, None]  # who climbs sends False if the last one is not borne


class _Ended(ModelError):
    """There is nothing more to remove."""


class Ladder:
    """Two ways down from the original, a rung at a time; each rung begins at the one before.

    epochs: of training on each rung. What each rung gave is kept in the journal, and the training under way, too.
    progress: called with the run after each step of training.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        journal: Journal,
        epochs: int,
        seed: int,
        progress: Callable[[Run], None] | None = None,
    ):
        self.model, self.task, self.journal, self.epochs, self.seed = model, task, journal, epochs, seed
        self.progress = progress or False
        self.lesson = distilled(task, model)

    def shallower(self) -> Rungs:
        """One residual block less at each rung, until one is not borne; nothing where the model has none."""
        with evaluating(self.model):
            count = len(blocks(self.model, self.task))
        student = self.model
        for gone in range(1, count + 1):
            name = f"{gone} of {count} blocks gone"
            student = self._trained(name, student, lambda s: prune_blocks_(s, self.task, split="train"))
            if (yield name, student) is False:
                return

    def narrower(self, start: str, student: nn.Module) -> Rungs:
        """Fewer units in all layers together, by multiplications; ends where no more can go.

        Below a rung that is not borne comes one between it and the last that was, and that is the end. start: what was
        done to the student before, for the names.
        """
        before, shares = 1.0, [*KEPT[::-1]]
        while shares:
            share = shares.pop()
            name = f"{start}, " * bool(start) + f"{share:.0%} of the multiplications"
            try:
                narrow = self._trained(name, student, partial(self._narrow, share=share / before))
            except _Ended:
                return
            if (yield name, narrow) is False:
                if share not in KEPT:
                    return
                shares = [round(math.sqrt(before * share), 2)]
            else:
                before, student = share, narrow

    def _narrow(self, student: nn.Module, share: float) -> None:
        by = score(student, self.task, "taylor", batches=BATCHES)
        batch = first_batch(self.task, "train")
        try:
            prune_structured_(student, batch, 1 - share, budget="multiplications", by=by, multiple=EIGHTS)
        except ModelError as error:  # which leaves the student as it was
            raise _Ended(str(error)) from error

    def _trained(self, name: str, before: nn.Module, remove: Callable[[nn.Module], object]) -> nn.Module:
        """A copy of `before` without what `remove` takes out of it, trained on."""
        question = f"{name}, {self.epochs} epochs"

        def made() -> Weights:
            student = copy.deepcopy(before)
            remove(student)
            place = self.journal.under_way(question)
            train(self.lesson, student, epochs=self.epochs, rate=RATE, schedule="cosine", weight_decay=0.0, keep="last",
                  seed=self.seed, progress=self.progress, checkpoint=place, resume=place is not None)  # fmt: skip
            return from_module(student)

        student = copy.deepcopy(self.model)
        into_module(self.journal.weights(question, made), student, resize=True)
        return student

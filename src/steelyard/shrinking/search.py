"""The search of `shrink`: candidates, what each loses on validation data, and which of them the proof accepts.

Decides which sizes are tried and the order in which they are measured. How the bits of a size are shared among tensors
is `edit.ratedistortion`; what outputs mind is `sensitivity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from torch import nn

from steelyard.core.transform import on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where, where
from steelyard.edit._kept import Kept
from steelyard.edit.kronecker import OUTPUTS
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.errors import ModelError, VerdictError
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import outcomes
from steelyard.learn.task import Split, Task, first_batch
from steelyard.shrinking import looks
from steelyard.shrinking.budget import ANYHOW, USUAL, Budget
from steelyard.shrinking.deep import lost, vectors_lighter
from steelyard.shrinking.foresight import reachable, unseen
from steelyard.shrinking.journal import Journal
from steelyard.shrinking.order import Chain, Evidence, Step, accepted, chances, evidence, middle, planned
from steelyard.shrinking.precondition import Learned, finite, of_original, provable, repeatable, trainable
from steelyard.shrinking.promise import Promise, rounded
from steelyard.shrinking.sensitivity import draws, has_classes, repeated, sensitivity
from steelyard.shrinking.tight import Tight, tighten
from steelyard.shrinking.work import Meter, Say, Work

SIZES = tuple(round(8 * 0.93**i, 3) for i in range(48))  # bits for each weight of a matrix: 8 to 0.26
EVEN = 0.5  # the chance of a proof at which a candidate is hopeful
PRICES = (0.01, 0.64)  # of a bit of the weights, in bits of the training labels: the first, and one of the last
FURTHER = 2.5  # times the epochs at the first price are those at all others
MEMORY = 1 << 30  # bytes that may be kept for all sizes; what there is no room for is worked out anew for each
EXAMPLES = "examples"  # that are evaluated: a kind of work
ASKED = ", proof"  # of a candidate, in the journal
USED = "splits"  # in the metadata of sensitivities: those whose batches they were measured on


@dataclass(frozen=True)
class Candidate:
    """One way to hold the whole model, and how it did."""

    name: str  # in the journal
    called: str  # in what people read
    weights: Weights  # packed as a file would hold them
    valid: np.ndarray | None  # how much worse each validation example came out; None: not asked
    test: np.ndarray | None = None  # the same of the proof
    asked: Promise | None = None  # which these were to prove
    trained: bool = False  # by which its weights moved, beside being rounded

    @property
    def bytes(self) -> int:
        """What the tensors take in a file, without its header."""
        return sum(held_bytes(weight) for weight in self.weights.values())

    @property
    def most(self) -> float:
        """That the metric may have fallen in truth, by what the proof was asked."""
        assert self.asked is not None
        assert self.test is not None
        return self.asked.bound(self.test)

    @property
    def holds(self) -> bool:
        """Whether the proof accepted it."""
        return self.asked is not None and self.test is not None and self.asked.kept(self.test)


class Search:
    """The state of one search; its methods are called in their order."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        original: Weights,
        promise: Promise,
        journal: Journal,
        seed: int,
        say: Say,
        budget: Budget = USUAL,
    ):
        self.model, self.task, self.original, self.promise = model, task, original, promise
        self.journal, self.seed, self.say, self.budget = journal, seed, say, budget
        self.work = Work(say)
        self.student = copy.deepcopy(model)
        self.before: dict[Split, np.ndarray] = {}  # the metric of the original, by example
        self.measured: dict[int, Candidate] = {}  # by the index of its size
        self.made: dict[int, Candidate] = {}  # the same, and those that were made for the proof alone
        self.others: list[Candidate] = []  # that were trained
        self.tried: list[Candidate] = []  # in the proof
        self.kept = Kept(MEMORY)  # of what the sensitivities say, taken apart
        self.files: dict[tuple[str, str], int] = {}  # bytes of the file of a candidate, by its name and the suffix
        self.evaluations = 0  # passes over a split, of whatever model
        self.epochs = 0  # of training
        self.seen_before = ""  # of proof examples
        self.learned = Learned()  # by the original

    def precondition(self, *, training: bool = False) -> None:
        """Raise ModelError for what no search could end well with. training: what is made is trained, too."""
        finite(self.original)
        if training:
            trainable(self.model)
        repeatable(self.model, self.task)  # first, because what runs for the first time takes longer
        self.work.tell("comparing the splits")
        self.seen_before = unseen(self.task, training=training)
        for split in ("valid", "test"):
            self.work.tell("measuring the original")
            start = self.work.clock()
            found, learned = of_original(self.model, self.task, split)  # type: ignore[arg-type]
            self.learned = learned or self.learned
            self.learned.bear(self.promise.tolerance)
            self.evaluations += 1
            self.work.took(EXAMPLES, len(found), self.work.clock() - start)
            self.before[split] = found  # type: ignore[index]
        examples = len(self.before["test"])
        provable(examples, self.promise, shares=self.learned.shares)
        if not self.learned.shares:
            reachable(self.student, self.original, self.task, self.before["valid"], examples, self.promise)

    def plan(self, epochs: int) -> None:
        """Count what there is to do, and guess what none of it has taken yet."""
        self.epochs = epochs
        work, told = self.work, self._told(epochs) if epochs else None
        first = first_batch(self.task, "train" if epochs else "valid")
        work.left |= {"sensitivities": 1, "files": 1}
        drawn = draws(self.original.size) * len(first)
        work.guesses["sensitivities"] = {EXAMPLES: 4.0 * drawn}
        work.priors |= {"sizes": 3e-7 * self.original.size + 0.01, "files": 1e-8 * self.original.size + 1.0}
        if told is not None:
            work.left["epochs"] = _epochs(told)
            trained = self._training_examples
            work.guesses["epochs"] = {EXAMPLES: 5.0 * trained, "sensitivities": 1.1 * trained / max(drawn, 1)}
        self._expect(self.budget.looks, self.budget.prices, self.budget.proofs)

    def _expect(self, looks: int, stages: int, proofs: float) -> None:
        """So many sizes are still to be looked at, stages of training to be measured, candidates to be proven."""
        valid, test = len(self.before["valid"]), len(self.before["test"])
        self.work.left[EXAMPLES] = (looks + stages) * valid + (proofs + 1) * test  # the file once more
        self.work.left["sizes"] = looks + proofs / 2

    @cached_property
    def minds(self) -> Weights:
        """What the outputs mind of errors in each matrix: evidence of `kronecker`."""
        return self._made("sensitivities", "sensitivity", self._sensitivity)

    def _sensitivity(self) -> Weights:
        used: set[Split] = set()
        served, classes = repeated(self.task, used), has_classes(self.model, self.task)
        found = sensitivity(self.model, served, classes=classes, seed=self.seed, most=draws(self.original.size))
        return found.with_meta(**{USED: " ".join(sorted(used))})

    def sizes(self) -> None:
        """Measure sizes, by halving what is likely, around the smallest that validation data hold to be provable.

        Raises VerdictError if validation examples lose more than the tolerance in the largest.
        """
        low, high = -1, len(SIZES)
        assert self.minds is not None  # the time of the first size is its own
        while high - low > 1 and len(self.measured) < self.budget.looks:
            at = middle(low, high)
            low, high = (at, high) if self.hopeful(self._measured(at)) else (low, at)
        safest = self._measured(0) if low < 0 else None
        if safest is not None and safest.mean() > self.promise.tolerance:
            raise VerdictError(
                f"even at {SIZES[0]:g} bits for each weight {safest.mean():.3g} of {self.task.headline} is lost on the "
                f"{len(safest)} validation examples, the tolerance is {self.promise.tolerance:g}: {self._few()}"
                "nothing is written"
            )

    def _few(self) -> str:
        """What is to be said where much of the largest size goes into the heads of tensors; '' mostly."""
        least, most = (sum(held_bytes(w) for w in self._held(SIZES[i]).values()) for i in (-1, 0))
        few = f"the {self.original.size:,} weights are so few that the heads of packed tensors take most of that; keep"
        return f"{few} them as they are; " if 2 * least > most else ""

    def _measured(self, index: int) -> np.ndarray:
        """What a size loses on validation data."""
        if index not in self.measured:
            found = self.size(index)
            self.work.tell(f"measuring {found.called}")
            worse = self.journal.of(f"{found.name}, validation", lambda: self.worse(found.weights, "valid").tolist())
            self.measured[index] = replace(found, valid=np.array(worse))
        valid = self.measured[index].valid
        assert valid is not None
        return valid

    def size(self, index: int) -> Candidate:
        """The candidate of a size."""
        if index in self.measured:
            return self.measured[index]
        if index not in self.made:
            name, called = sized(index), f"rounded, asked for {SIZES[index]:.3g} bits a weight"
            weights = self._made("sizes", name, lambda: self._held(SIZES[index]), called)
            self.made[index] = Candidate(name, called, weights, None)
        return self.made[index]

    def _made(self, kind: str, question: str, compute: Callable[[], Weights], called: str = "") -> Weights:
        """The answer of the journal, whose making counts as work of a kind."""
        self.work.tell(f"making {called or question}")
        start, found = self.work.clock(), self.journal.found
        made = self.journal.weights(question, compute)
        if self.journal.found == found:
            self.work.took(kind, 1, self.work.clock() - start)
        return made

    def _held(self, bits: float) -> Weights:
        """The original's weights, packed at so many bits for each weight."""
        rounded = partial(RateDistortion(bits=bits, by=self.minds).rounded, kept=self.kept)
        return vectors_lighter(on(_Minded(self.minds), rounded)(self.original), self.original)

    def worse(self, weights: Weights, split: Split) -> np.ndarray:
        """How much worse each example of a split comes out with these weights, in the unit of the metric."""
        start = self.work.clock()
        into_module(weights, self.student)
        self.evaluations += 1
        found = outcomes(self.student, self.task, split)[self.task.headline]
        self.work.took(EXAMPLES, len(found), self.work.clock() - start)
        return lost(self.task, self.before[split], found)

    def hopeful(self, worse: np.ndarray) -> bool:
        """Whether the proof rather holds than fails, by what validation examples say."""
        return self.chance(*self.evidence(worse)) >= EVEN

    def evidence(self, worse: np.ndarray) -> Evidence:
        """What validation examples say."""
        return evidence(worse, shares=self.learned.shares)

    def chance(self, mean: float, variance: float, share: float = 1.0) -> float:
        """That of a proof which may spend a share of the error, by a mean and variance of validation examples."""
        seen, examples = len(self.before["valid"]), len(self.before["test"])
        promise = replace(self.promise, share=share)
        return promise.chance(mean, variance, seen, examples, shares=self.learned.shares)

    def trained(self, epochs: int) -> None:
        """Candidates that were trained to be small, from the original as their teacher; each of them is measured.

        epochs: at the first price of a bit; two and a half times as many at all further ones together.
        """
        told = self._told(epochs)
        self._expect(0, self.budget.prices, self.budget.proofs)
        ends = f"within {self.promise.tolerance:g} at {self.promise.level:.6g}"  # the climb
        key = f"trained {epochs} {ends}, {self.budget.prices} prices"
        meter = Meter(self.work, "epochs", f"training, {told.epochs} epochs at the first price of a bit")
        stages = tighten(self.model, self.task, told, self.seed, checkpoint=self.journal.place(key), borne=self.hopeful,
                         progress=meter, before=self.before["valid"])  # fmt: skip
        for i, stage in enumerate(stages):
            self.evaluations += 1
            assert stage.examples is not None
            worse = lost(self.task, self.before["valid"], stage.examples)
            called = _called(stage.name, told)
            self.others.append(Candidate(f"{key}, {stage.name}", called, stage.weights, worse, trained=True))
            meter.what = called
            meter.at(_epochs(told, i))
            self._expect(0, self.budget.prices - 1 - i, self.budget.proofs)
            self.work.tell(meter.what)

    def _told(self, epochs: int) -> Tight:
        """How the training is pressed."""
        if not self._training_examples:
            raise ModelError(
                f"the task {self.task.name!r} has no training examples: shrink it without training, epochs=0"
            )
        prices = np.geomspace(*PRICES, self.budget.prices) * (math.log(2) / self._training_examples)
        more = math.ceil(FURTHER * epochs / max(len(prices) - 1, 1))
        return Tight(self.promise.tolerance, tuple(prices.tolist()), epochs, more, rungs=len(prices), brief=True)

    @cached_property
    def _training_examples(self) -> int:
        return sum(len(batch) for batch in self.task.batches("train", 0))

    def found_again(self, epochs: int) -> None:
        """What this search has left in the journal, and every other size that is there."""
        self.plan(epochs)
        self.sizes()
        if epochs:
            self.trained(epochs)
        for index in range(len(SIZES)):
            if self.journal.known(f"{sized(index)}, validation"):
                self._measured(index)
            elif sized(index) in self.journal.known(sized(index)):
                self.size(index)

    def proven(self, chains: list[Chain] | None = None) -> Candidate:
        """The smallest candidate that the proof accepts.

        chains: what it is asked, by validation data alone (None: what saves most in the mean). Raises VerdictError if
        not one step holds.
        """
        if chains is None:
            most = self.budget.evaluations - ANYHOW - len(self.measured) - len(self.others)
            chains = planned(self.steps, most, sum(held_bytes(weight) for weight in self.original.values()))
        left = {
            step: sum(s.chance for s in chain.steps[i:-1]) for chain in chains for i, step in enumerate(chain.steps)
        }

        def holds(step: Step, share: float) -> bool:
            self._expect(0, 0, 1 + left[step])
            self.tried.append(self.asked(self.candidate(step), replace(self.promise, share=share)))
            return self.tried[-1].holds

        if not accepted(chains, holds):
            last = self.tried[-1]
            assert last.test is not None
            assert last.asked is not None
            raise VerdictError(self.alternative(f"{last.bytes:,} bytes without its header", last.test, last.asked))
        held = [candidate for candidate in self.tried if candidate.holds]
        return min(held, key=lambda found: found.bytes)  # the last one, unless sizes were foreseen wrongly

    def asked(self, found: Candidate, promise: Promise) -> Candidate:
        """A candidate and what the proof says of it."""
        self.work.tell(f"proving {found.called}")
        worse = self.journal.of(found.name + ASKED, lambda: self.worse(found.weights, "test").tolist())
        return replace(found, test=np.array(worse), asked=promise)

    def steps(self, share: float = 1.0) -> list[Step]:
        """Each size, and what was trained, as a proof would meet it that may spend a share of the error."""
        chance = partial(self.chance, share=share)
        seen = {index: self.evidence(self._measured(index)) for index in self.measured}
        sizes, found = self._foreseen_bytes(), chances(SIZES, seen, chance)
        steps = [Step(sizes[i], held, i, False, i in seen) for i, held in enumerate(found)]
        for i, candidate in enumerate(self.others):
            assert candidate.valid is not None
            steps.append(Step(float(candidate.bytes), chance(*self.evidence(candidate.valid)), i, True))
        return steps

    @property
    def reserved(self) -> bool:
        """Whether the proof kept a part of the error for a second chain."""
        return any(found.asked is not None and found.asked.share < 1 for found in self.tried)

    def candidate(self, step: Step) -> Candidate:
        """That of a step."""
        return self.others[step.index] if step.trained else self.size(step.index)

    def _foreseen_bytes(self) -> list[float]:
        """Of each size: a line through those that were measured."""
        bits, found = [SIZES[i] for i in self.measured], [c.bytes for c in self.measured.values()]
        slope = self.original.select(where(kind="float")).size / 8
        rest = float(np.mean([b - slope * a for a, b in zip(bits, found, strict=True)]))
        return [max(slope * size + rest, 1.0) for size in SIZES]

    def alternative(self, size: str, worse: np.ndarray, promise: Promise) -> str:
        """What could be promised of the safest candidate, of that size, which failed on the proof examples."""
        needed, bound = promise.needed(worse), promise.bound(worse)
        more = f"{needed:,} examples like these would prove {promise.tolerance:g}" if needed else \
               f"no number of examples like these would prove {promise.tolerance:g}"  # fmt: skip
        again = replace(promise, look=looks.following(self.journal))
        stricter = (
            f" (from now on {rounded(again.bound(worse), 3)}: that would be look {again.look}, which is at "
            f"{again.level:.4g} instead of {promise.level:.4g})"
        )
        counted = promise.look > 1 or self.journal.place("") is not None
        return (
            f"the safest candidate ({size}) may lose {rounded(bound, 4)} of {self.task.headline} on the {len(worse)} "
            f"proof examples (measured: {worse.mean():.4g}), the tolerance is {promise.tolerance:g}: {more}; "
            f"a tolerance of {rounded(bound, 3)} would have been kept{stricter if counted else ''}. Nothing is written"
        )


def sized(index: int) -> str:
    """What the journal calls a size."""
    return f"{SIZES[index]:g} bits"


def held_bytes(weight: Weight) -> int:
    """The bytes of a weight as it is held."""
    return int(weight.read().nbytes)


@dataclass(frozen=True)
class _Minded(Where):
    """Of which the outputs are known to mind errors; of tables that are buffers no gradient tells: they stay."""

    minds: Weights

    def __call__(self, weight: Weight) -> bool:
        return weight.name + OUTPUTS in self.minds

    def under(self, weight: Weight, alias: str) -> bool:
        return self(weight) or alias + OUTPUTS in self.minds


def _epochs(told: Tight, stage: int | None = None) -> int:
    """Of training and weighing until a stage (None: the last) is reached."""
    prices = told.rungs if stage is None else stage + 1
    return told.epochs + (prices - 1) * told.more_epochs


def _called(stage: str, told: Tight) -> str:
    """What people read of a stage of training: the price of a bit beside the first one."""
    return f"trained, price of a bit ×{float(stage.removeprefix('price ')) / told.prices[0]:.3g}"

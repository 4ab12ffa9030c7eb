"""Files that run, and which of them wins: the fastest, or the one that takes least memory, within a tolerance.

Decides which files are made, which are worth measuring, and the order of the proof. What students there are is
`narrower`; how a file is rounded is `deploy.int8`, how it is measured `deploy.apart`; what a promise is `promise`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from steelyard.deploy import apart
from steelyard.deploy.int8 import FORMS, quantized
from steelyard.deploy.onnx import write_onnx
from steelyard.deploy.session import OnnxModule
from steelyard.errors import ModelError, VerdictError
from steelyard.formats.base import staging, writing
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.run import Run
from steelyard.learn.task import Batch, Split, first_batch, per_example
from steelyard.shrinking.deep import lost
from steelyard.shrinking.narrower import Ladder, Rung, Rungs
from steelyard.shrinking.search import EXAMPLES, Search
from steelyard.shrinking.settings import Aim
from steelyard.shrinking.work import Meter

CALIBRATION = 8  # batches whose activations say how wide a range of eight bits has to be
PEAKS = 3  # processes for each file: what they hold differs by a percent
PLAIN = "float32"
ALIKE, APART = 0.1, 1.05  # chances, and ratios of gains, that are not told apart
USUAL = 3  # rungs of a ladder: validation ends most of them before their last
# seconds before any was measured: of a form of eight bits, of a file in a race or of a process that says what it took
# at most, and of the last look at the one that won
FORM, TURN, PEAK, CHECK = 0.05, 0.05, 0.15, 1.5


@dataclass(frozen=True)
class Contender:
    """A file that runs, and how it did."""

    name: str
    file: Path
    module: nn.Module  # the student whose weights it has, in float32
    valid: np.ndarray  # how much worse each validation example came out
    digest: str  # of the file, before anything was measured
    costs: np.ndarray | None = None  # of the original over its own, by round; None: not measured
    test: np.ndarray | None = None  # how much worse each proof example came out; None: not asked

    @property
    def gain(self) -> float:
        """How many times faster, or less, than the original in float32."""
        return float("nan") if self.costs is None else float(np.median(self.costs))

    @property
    def gain_at_least(self) -> float:
        """The lower end of the interval of the median at 95 %, one-sided: an order statistic of the rounds."""
        assert self.costs is not None
        return lower_median(self.costs)

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.file.stat().st_size


class Contest:
    """The state of one contest; its methods are called in their order. `folder` is where the files lie meanwhile."""

    def __init__(self, search: Search, aim: Aim, folder: Path):
        self.search, self.aim, self.folder = search, aim, folder
        self.task, self.promise = search.task, search.promise
        self.made: list[Contender] = []
        self.failed: dict[str, str] = {}  # what could not be made, and why
        self.front: list[Contender] = []  # of which the proof may be asked
        self.tried: list[Contender] = []  # in the proof
        self.batch = [x.numpy() for x in first_batch(self.task, "valid").arguments]
        self.original = folder / "original.onnx"
        self.work = search.work
        self._meter = Meter(self.work, "epochs", "")

    @property
    def measured_on(self) -> list[np.ndarray]:
        """What decides: one example where time counts, a batch where memory does."""
        return [x[:1] for x in self.batch] if self.aim == "latency" else self.batch

    def enter(self, epochs: int) -> None:
        """Make the files: of the original, and of students as long as validation bears them."""
        self.work.priors |= {"exports": 1.0, "forms": FORM, "checks": CHECK}
        self.work.priors["turns"] = TURN if self.aim == "latency" else PEAK * PEAKS
        self.work.guesses["epochs"] = {EXAMPLES: 4.0 * len(self.search.before["valid"])}
        self._expect(2 * USUAL if epochs else 0, epochs, 1)
        with self.work.on("exports", "making the original in ONNX"):
            self._write(self.search.model, self.original)
        for form in FORMS:
            self._add("as it is", self.search.model, form, self.original)
        if not epochs:
            return
        search = self.search
        ladder = Ladder(search.model, self.task, search.journal, epochs, search.seed, self._trains)
        borne = self._climbed(ladder.shallower(), epochs, USUAL)
        starts = [("", self.search.model), *borne[-1:]]
        for i, (start, student) in enumerate(starts):
            self._climbed(ladder.narrower(start, student), epochs, USUAL * (len(starts) - 1 - i))

    def _trains(self, run: Run) -> None:
        self._meter(run)

    def _expect(self, rungs: int, epochs: int, others: int = 0) -> None:
        """So many rungs are still to be trained and made in all their forms, and so many others to be made."""
        exports, test = rungs + others, len(self.search.before["test"])
        self.work.left |= {"epochs": rungs * epochs, "exports": exports, "forms": exports * len(FORMS), "checks": 1}
        self.work.left |= {"turns": len(self.made) + exports * (1 + len(FORMS)), EXAMPLES: 2 * test}
        self._meter = Meter(self.work, "epochs", "training a student")

    def _climbed(self, rungs: Rungs, epochs: int, then: int) -> list[Rung]:
        """The rungs that validation bears, each made in all its forms.

        then: rungs that are still to come after these.
        """
        borne: list[Rung] = []
        bears: bool | None = None  # the last one
        while True:
            self._expect(max(USUAL - len(borne), 1) + then, epochs)
            try:
                name, student = rungs.send(bears)
            except StopIteration:
                break
            plain = self.folder / f"{len(self.made)}-{len(self.failed)}.onnx"
            worse = lost(self.task, self.search.before["valid"], self._outcomes(student, "valid"))
            bears = self.search.hopeful(worse[::2])
            if not bears:
                self.failed[f"{name}, {PLAIN}"] = f"loses {worse[::2].mean():.4f} of {self.task.headline}"
                continue
            with self.work.on("exports", f"making {name}, {PLAIN}"):
                self._write(student, plain)
                self.made.append(self._measured(f"{name}, {PLAIN}", plain, student))
            for form in FORMS:
                self._add(name, student, form, plain)
            borne.append((name, student))
        return borne

    def _write(self, module: nn.Module, file: Path) -> None:
        with evaluating(module):
            write_onnx(module, first_batch(self.task, "valid").arguments, file)

    def _add(self, name: str, student: nn.Module, form: str, plain: Path) -> None:
        name = f"{name}, {form}"
        file = self.folder / f"{len(self.made)}-{len(self.failed)}.onnx"
        with self.work.on("forms", f"making {name}"):
            try:
                quantized(plain, file, form, ([x.numpy() for x in b.arguments] for b in self._calibration()))
                self.made.append(self._measured(name, file, student))
            except ModelError as error:
                self.failed[name] = str(error)

    def _calibration(self) -> Iterable[Batch]:
        return islice(self.task.batches("train", 0), CALIBRATION)

    def _measured(self, name: str, file: Path, student: nn.Module) -> Contender:
        digest = apart.digest(file)
        worse = lost(self.task, self.search.before["valid"], self._outcomes(OnnxModule(file), "valid"))
        return Contender(name, file, student, worse, digest)

    def _outcomes(self, model: nn.Module, split: Split) -> np.ndarray:
        self.search.evaluations += 1
        return outcomes(model, self.task, split)[self.task.headline]

    def ranked(self) -> list[Contender]:
        """The contenders that gain and that validation holds to be provable, from the least gain on (`front`).

        Raises VerdictError where there is none.
        """
        hopeful = [c for c in self.made if self.search.hopeful(c.valid)]
        if not hopeful:
            least = min(self.made, key=lambda c: float(c.valid.mean()), default=None)
            raise VerdictError(
                f"every form of this model that runs loses more than {self.promise.tolerance:g} of "
                f"{self.task.headline} on validation data{_closest(least)}: nothing is written"
            )
        turns = 1 + len(hopeful)
        self.work.left |= {"epochs": 0, "exports": 0, "forms": 0, "turns": turns}
        with self.work.on("turns", "measuring what is gained", turns):
            gains = self._gains(hopeful)
        hopeful = [replace(c, costs=costs) for c, costs in zip(hopeful, gains, strict=True)]
        self.made = [next((h for h in hopeful if h.name == c.name), c) for c in self.made]
        gaining = [c for c in hopeful if c.gain_at_least > 1]
        if not gaining:
            raise VerdictError(self.no_gain(max(hopeful, key=lambda c: c.gain)))
        chances = [self.search.chance(*self.search.evidence(c.valid)) for c in gaining]
        self.front = [gaining[i] for i in front([c.gain for c in gaining], chances)]
        return self.front

    def no_gain(self, best: Contender) -> str:
        """That there is nothing to gain here, and whether there is in bytes."""
        what = "smaller, not faster here" if self.aim == "latency" else "smaller in the file, not in memory"
        before, after = self.original.stat().st_size, best.bytes
        size = f" ({after:,} bytes instead of {before:,}: {what})" if after < before else ""
        kind = "faster than" if self.aim == "latency" else "in less memory than"
        return (
            f"no form within the tolerance runs {kind} ONNX Runtime in float32 on this processor; the best, "
            f"{best.name!r}, has {best.gain:.2f} times its {'speed' if self.aim == 'latency' else 'room'}{size}: "
            "nothing is written; more tolerance, or epochs, makes narrower ones, and aim='file' a smaller file"
        )

    def _gains(self, found: list[Contender]) -> list[np.ndarray]:
        files = [self.original, *(c.file for c in found)]
        if self.aim == "latency":
            seconds = apart.race(files, self.measured_on)
            return list(seconds[0] / seconds[1:])
        peaks = [[apart.peak(file, self.measured_on) for _ in range(PEAKS)] for file in files]
        if None in peaks[0]:
            raise ModelError("what memory a process takes is read from /proc, which this system does not have")
        return list(np.array(peaks[0], float) / np.array(peaks[1:], float))

    def proven(self, front: list[Contender]) -> Contender:
        """The one that gains most of those that the proof accepts, from the safest on until one fails.

        Raises VerdictError if the first one fails.
        """
        accepted, test = None, len(self.search.before["test"])
        for i, found in enumerate(front):
            self.work.left[EXAMPLES] = (len(front) - i) * test
            with self.work.on(EXAMPLES, f"proving {found.name}", test):
                worse = lost(self.task, self.search.before["test"], self._outcomes(OnnxModule(found.file), "test"))
            self.tried.append(replace(found, test=worse))
            if not self.promise.kept(worse):
                break
            accepted = self.tried[-1]
        self.work.left[EXAMPLES] = 0
        if accepted is None:
            raise VerdictError(self.search.alternative(f"{self.tried[0].bytes:,} bytes", worse, self.promise))
        return accepted

    def finished(self, found: Contender, target: Path | None) -> Contender:
        """The winner under the name `target`, once another process has read it there and done with it what was proven.

        Raises VerdictError if it does something else; nothing is left under the name then.
        """
        if target is None:
            self._check(found, found.file)
            return found
        with staging(target, target) as (file, unproven):
            file.write(found.file.read_bytes())
            os.fsync(file.fileno())
            self._check(found, unproven)
            with writing(target):
                unproven.replace(target)
        return replace(found, file=target)

    def _check(self, found: Contender, file: Path) -> None:
        batches = list(self.task.batches("test", 0))
        try:
            digest, outputs = apart.answers(file, [[x.numpy() for x in batch.arguments] for batch in batches])
        except ModelError as error:
            raise VerdictError(f"the finished file does not run, nothing is kept: {error}") from error
        if digest != found.digest:
            raise VerdictError("the finished file has other bytes than the one that was proven: nothing is kept")
        name, metric = self.task.headline, self.task.metrics[self.task.headline]
        values = [per_example(metric, torch.from_numpy(o), b, name) for o, b in zip(outputs, batches, strict=True)]
        worse = lost(self.task, self.search.before["test"], torch.cat(values).double().numpy())
        if found.test is None or worse.tolist() != found.test.tolist():
            raise VerdictError(
                f"the finished file, run by another process, loses {worse.mean():.4g} of {name} on the proof examples, "
                "and not what it lost before it was written: nothing is kept"
            )


def front(gains: Sequence[float], chances: Sequence[float]) -> list[int]:
    """Which contenders the proof is asked about, from the least gain on, by what each gains and its chance to hold.

    What gains less mostly loses less, so that it costs nothing to ask about it on the way to one that gains more, and
    it is there if that one fails; few validation examples tell them apart by chance. Left out is what is clearly less
    likely to hold than one that gains more, and what gains nearly as much as one that is as likely.

    >>> front([1.4, 1.7, 2.0, 3.0], [0.9, 0.88, 0.92, 0.5])
    [0, 1, 2, 3]
    >>> front([1.4, 1.7, 1.75, 2.0], [0.9, 0.7, 0.9, 0.9])
    [0, 2, 3]
    >>> front([1.4, 1.42], [0.9, 0.9]), front([1.4, 1.42], [0.9, 0.6])
    ([1], [0, 1])
    """
    found: list[int] = []
    for i in sorted(range(len(gains)), key=lambda i: -gains[i]):
        less = chances[i] < max((chances[k] for k in found), default=0.0) - ALIKE
        near = found and gains[found[-1]] < APART * gains[i] and chances[i] <= chances[found[-1]] + ALIKE
        if not less and not near:
            found.append(i)
    return found[::-1]


def lower_median(values: np.ndarray, confidence: float = 0.95) -> float:
    """A number that the true median exceeds at this confidence, whatever the distribution; of one value, that one.

    >>> lower_median(np.arange(1.0, 32.0))
    11.0
    """
    from scipy.stats import binom

    rank = max(int(binom.ppf(1 - confidence, len(values), 0.5)), 1)
    return float(np.sort(values)[rank - 1])


def _closest(least: Contender | None) -> str:
    return "" if least is None else f" (least of all {least.name!r}: {least.valid.mean():.4g})"

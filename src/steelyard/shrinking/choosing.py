"""What came out of a search, and another point of its curve without a new one: proven, or refused.

Decides which of the candidates that a search has left are asked, and what each further look at the same proof examples
costs.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from torch import nn

from steelyard.core.table import Table
from steelyard.core.weights import Weights
from steelyard.edit._kept import Kept
from steelyard.errors import ModelError, VerdictError
from steelyard.formats.module import from_module
from steelyard.learn.task import Task, check_model, check_task
from steelyard.shrinking import account, looks
from steelyard.shrinking.budget import Budget
from steelyard.shrinking.deep import MATRICES
from steelyard.shrinking.finishing import finished
from steelyard.shrinking.journal import Journal, fingerprint, kept
from steelyard.shrinking.order import Chain, Step, ordered
from steelyard.shrinking.precondition import provable, writable
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.search import Candidate, Search, held_bytes
from steelyard.shrinking.work import Say

AIM = "file: smaller, and no faster; for that there is aim latency"
PLAIN = "plain safetensors"  # what the original is written as for its bytes


@dataclass(frozen=True)
class Shrunk:
    """What came out: the weights as the file holds them, and how they were found.

    It keeps what the search found, packed as files hold it, for `choose`.
    """

    weights: Weights  # re-read
    proof: Table  # one row: before, after, the bound, the bytes
    why: Table  # a row for each tensor
    curve: Table  # a row for each candidate that was made, the largest first
    running: Table | None = None  # time and memory before and after, of a file that runs; None: it holds weights alone
    search: Search | None = field(default=None, repr=False, compare=False)  # None: there is nothing to choose from

    def __str__(self) -> str:
        """The promise."""
        return str(self.proof)

    def choose(
        self, target: str | Path | None = None, *, tolerance: float | None = None, bytes: int | None = None
    ) -> Shrunk:
        """Another point of the curve, without a new search: the smallest within a tolerance, or the safest of a size.

        Candidates are taken from the curve by validation data, and the test split is asked once more, at a higher
        confidence (`Promise.level`), because whoever looks at several points finds one that passes by luck: all that
        is chosen later is as sure together as the first result is alone. What was proven within the same tolerance
        before is told once more, and asked about no more.

        Args:
            target: the file to write, or to replace (None: none).
            tolerance: how much worse the metric may be in truth (None: as much as in the search).
            bytes: of the finished file, at most: of those candidates the one that loses least (None: any).

        Raises ModelError where neither is given, and for what `shrink` refuses; VerdictError where no candidate is so
        small, or none keeps the promise, with what would have been kept. Nothing is left under the name then.

        ::

            found = sy.shrink(model, task, "small.safetensors", tolerance=0.01)
            smaller = found.choose("smaller.safetensors", tolerance=0.02)
            safer = found.choose(bytes=2 * found.proof.rows[0]["bytes"])
        """
        if self.search is None:
            raise ModelError("there is no curve of files of weights to choose from: shrink with aim='file'")
        with self.search.journal.alone():
            return _chosen(self.search, target, tolerance, bytes)


def choose(
    model: nn.Module,
    task: Task,
    target: str | Path | None = None,
    *,
    checkpoint: str | Path,
    tolerance: float | None = None,
    bytes: int | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Shrunk:
    """`Shrunk.choose` of all that searches with this checkpoint have found, whether they ended well or not.

    Nothing is searched anew: of what the folder has, candidates are asked by the test split alone. model, task, seed:
    those of the searches. Raises ModelError where no search in the folder has come to its proof.

    ::

        sy.choose(model, task, "small.safetensors", checkpoint="kept", tolerance=0.02)
    """
    search = reopened(model, task, checkpoint, seed=seed, say=say)
    with search.journal.alone():
        return _chosen(search, target, tolerance, bytes)


def _chosen(search: Search, target: str | Path | None, tolerance: float | None, bytes: int | None) -> Shrunk:
    began, place = time.perf_counter(), None
    if tolerance is None and bytes is None:
        raise ModelError("choose: expected a tolerance, or bytes, or both")
    if bytes is not None and (not isinstance(bytes, int) or bytes < 1):
        raise ModelError(f"bytes={bytes!r}: expected a whole number of bytes, of the finished file")
    if target is not None:
        place = writable(target, "file")
    promise = Promise(search.promise.tolerance if tolerance is None else tolerance, search.promise.confidence,
                      search.task.ordered)  # fmt: skip
    asked = {"tolerance": promise.tolerance, "confidence": promise.confidence, "bytes": bytes, "aim": "chosen"}
    again = copy.copy(search)
    again.promise = replace(promise, look=looks.number(search.journal, asked))
    again.tried, again.evaluations = [], 0
    known = _answered(again)
    if bytes is None and known:
        return told(again, min(known, key=lambda found: found.bytes), place, began)
    again.learned.bear(promise.tolerance)
    provable(len(again.before["test"]), again.promise, shares=again.learned.shares)
    order = _by_tolerance(again) if bytes is None else _by_bytes(again, bytes, account.kind(place))
    same = [found for found in known if found.name == again.candidate(order[0]).name]
    if bytes is not None and same:
        return told(again, same[0], place, began)
    looks.taken(search.journal, asked)
    return told(again, again.proven([Chain(order, 1.0)]), place, began, asked)


def _answered(search: Search) -> list[Candidate]:
    """What was proven already within the same tolerance: it is told once more, and asked about no more."""
    every = [*search.made.values(), *search.measured.values(), *search.others]
    named, found = {candidate.name: candidate for candidate in every}, []
    for answer in looks.answers(search.journal, search.promise.tolerance, search.promise.confidence):
        if answer["candidate"] in named:
            then = replace(search.promise, look=answer["look"], share=answer["share"])
            found.append(search.asked(named[answer["candidate"]], then))
    return found


def _known(search: Search) -> list[Step]:
    """The candidates that there are, with their bytes as they are."""
    steps = [step for step in search.steps() if step.trained or step.index in search.made]
    return [replace(step, bytes=float(search.candidate(step).bytes)) for step in steps]


def _by_tolerance(search: Search) -> tuple[Step, ...]:
    steps = _known(search)
    first = [step for step in steps if step.chance >= search.promise.level] or [max(steps, key=lambda s: s.chance)]
    return ordered(steps, first, search.budget.proofs, sum(held_bytes(w) for w in search.original.values()))


def _by_bytes(search: Search, most: int, suffix: str) -> tuple[Step, ...]:
    """The one of at most so many bytes that is likeliest to be proven."""
    files = {step: account.file_bytes(search, search.candidate(step), suffix) for step in _known(search)}
    within = [step for step, size in files.items() if size <= most]
    if not within:
        raise VerdictError(
            f"the smallest of the {len(files)} candidates takes {min(files.values()):,} bytes, and none {most:,} or "
            "less: search with more tolerance, which makes smaller ones; nothing is written"
        )
    return (max(within, key=lambda step: (step.chance, -step.bytes)),)


def told(
    search: Search, found: Candidate, target: Path | None, began: float, asked: looks.Asked | None = None
) -> Shrunk:
    """The finished file of what was proven, and its tables. asked: what it answers; None: it did so before."""
    assert found.asked is not None
    assert found.test is not None
    if asked is None:
        search.tried = [found]
    else:
        looks.answer(search.journal, asked, found.name, found.asked.share)
    search.kept = Kept(0)  # no further size is made
    kept, sizes = finished(search, found, target)
    search.say("done", 1.0)
    meta = {"before": PLAIN, "splits": account.splits(search), "aim": AIM}
    proof = account.proof(search, found.test, found.asked, sizes, time.perf_counter() - began, meta)
    curve = account.curve(search, found, account.kind(target))
    return Shrunk(kept, proof, account.why(search, found), curve, search=search)


def opened(model: nn.Module, task: Task, checkpoint: str | Path | None, seed: int) -> tuple[Weights, Journal]:
    """The weights of a model, and what is known of a search for them."""
    original = from_module(model).settle()
    if not original.select(MATRICES):
        raise ModelError(f"{type(model).__name__} has no matrix or filter to shrink")
    about = {"model": fingerprint(original), "task": task.name, "data": str(task.about), "seed": seed}
    return original, Journal(checkpoint, about)


def reopened(model: nn.Module, task: Task, checkpoint: str | Path, *, seed: int = 0, say: Say | None = None) -> Search:
    """What all searches in a folder have found, for `choose`: nothing is made or measured that the folder has.

    Raises ModelError where no search in it has come to its proof.
    """
    check_task(task)
    check_model(model)
    if not isinstance(checkpoint, (str, PathLike)) or not kept(checkpoint):
        raise ModelError(f"{checkpoint}: no search is kept in a folder of that name: search with it as the checkpoint "
                         "first")  # fmt: skip
    original, journal = opened(model, task, checkpoint, seed)
    records = looks.searches(journal)
    if not records:
        raise ModelError(
            f"{checkpoint}: no search there has come to its proof: let one end first, with the same folder"
        )
    whole: Search | None = None
    for record in records:
        promise = Promise(record["tolerance"], record["confidence"], task.ordered, record["look"])
        budget = Budget.of(record["evaluations"], training=bool(record["epochs"]))
        part = Search(model, task, original, promise, journal, seed, say or silent, budget)
        if whole is None:
            part.precondition(training=bool(record["epochs"]))
        else:
            part.before, part.learned, part.seen_before = whole.before, whole.learned, whole.seen_before
            part.others, part.measured, part.made = whole.others, whole.measured, whole.made
        part.found_again(record["epochs"])
        whole = part
    assert whole is not None
    return whole


def silent(_what: str, _done: float) -> None:
    """Say nothing."""

"""The smallest file within a tolerance: search, then proof on examples that the search has not seen.

Decides the order of the work, and which file gets the name. What sizes are tried is `search`, what a promise is
`promise`.

Source: candidates are tested from the largest to the smallest on the same proof examples, and the first that fails ends
it: fixed sequence testing keeps the error of the whole at that of one test (A. N. Angelopoulos et al., Learn then Test,
2021, arXiv 2110.01052, section 3.2). Of two such sequences each spends its share of the error.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

from torch import nn

from steelyard import formats
from steelyard.deploy.onnx import require
from steelyard.errors import ModelError
from steelyard.learn.options import check_choice, check_not_negative
from steelyard.learn.task import Task, check_model, check_task
from steelyard.shrinking import account, looks, running
from steelyard.shrinking.budget import Budget
from steelyard.shrinking.choosing import Shrunk, opened, silent, told
from steelyard.shrinking.contest import Contest
from steelyard.shrinking.precondition import writable
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.search import Search
from steelyard.shrinking.settings import TOLERANCE, Aim
from steelyard.shrinking.work import Say

SPLITS = "train: widths, students and ranges; valid: one half ends each ladder, both rank; test: proves, nothing else"


def shrink(
    model: nn.Module,
    task: Task,
    target: str | Path | None = None,
    *,
    aim: Aim = "file",
    tolerance: float = TOLERANCE,
    confidence: float = 0.95,
    epochs: int = 30,
    evaluations: int = 12,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    say: Say | None = None,
) -> Shrunk:
    """Find the smallest file of a model's weights whose headline metric falls by at most `tolerance`, and prove it.

    The task's training inputs say how much the outputs mind an error in each weight; its validation split is for the
    search, which decides what the proof is asked, and in what order; its test split proves, and nothing else looks at
    it. The file is written, re-read by another process, compared bit for bit and measured before it gets
    the name `target`. The model is left as it was.

    What comes back prints as the promise; ``.proof`` is a table of it (one row), ``.why`` has a row for each tensor,
    ``.curve`` one for each candidate, ``.weights`` are those of the file, and ``.choose(...)`` takes another of them.

    Args:
        model: trained.
        task: its data, loss and metrics; the first metric counts.
        target: the file to write, or to replace (None: none). A path; what is to be least, `aim` says.
        aim: what is to be least: 'file', the bytes of a file of weights; 'latency', the processor seconds of one
            example in ONNX Runtime on one thread here, or 'memory', what a batch takes there at most: then the file is
            ONNX (``.onnx``, of eight bits, of fewer blocks and narrower layers, or both), and it is compared with
            the original in ONNX Runtime in float32. Needs the extra ``deploy``.
        tolerance: how much worse the metric may be in truth, in its own unit: 0.005 is half a point of accuracy.
        confidence: of the promise; one-sided.
        epochs: of training for size (`tighten`), after what rounding alone gives; two and a half times as many at all
            higher prices of a bit together; a third as many after each narrowing, for latency and memory. 0 leaves
            training (and narrowing) out: only inputs are needed then, no labels.
        evaluations: at most so many passes over all examples of the validation or the test split, those of the
            original and of the finished file included; for the bytes of a file alone. More of them find a smaller one.
        seed: of everything random.
        checkpoint: a folder that keeps what was found, so that a search that was broken off, or one with another
            tolerance, goes on from there.
        say: called with what is being done and the share of the time that is gone, by what each kind of work has
            taken so far: after `seconds` about ``seconds * (1 - share) / share`` are to come.

    Raises ModelError before the search for a tolerance that the test split cannot prove or that a model which has
    learned nothing would keep, a metric that is not a number or comes out otherwise each time, weights that are not
    finite, a model that is no better than chance, and FormatError for a target that cannot be written; VerdictError
    where no candidate keeps the promise, with the best honest alternative, and where the file does not hold what it
    was meant to. Nothing is left under the name then.
    """
    check_task(task)
    check_model(model)
    check_choice("aim", aim, get_args(Aim))
    check_not_negative(epochs=epochs)
    if epochs != int(epochs):
        raise ModelError(f"epochs={epochs!r}: expected a whole number, 0 or more")
    promise, budget = Promise(tolerance, confidence, task.ordered), Budget.of(evaluations, training=bool(epochs))
    if say is not None and not callable(say):
        raise ModelError(f"say: expected a function of (what, share), found a {type(say).__name__}")
    if aim != "file":
        require()
    place = None if target is None else writable(target, aim)
    began = time.perf_counter()
    original, journal = opened(model, task, checkpoint, seed)
    asked = {"tolerance": tolerance, "confidence": confidence, "epochs": epochs, "evaluations": evaluations, "aim": aim}
    with journal.alone():
        promise = replace(promise, look=looks.number(journal, asked))
        search = Search(model, task, original, promise, journal, seed, say or silent, budget)
        search.precondition(training=bool(epochs))
        if aim != "file":
            return _won(search, asked, place, began)
        search.plan(epochs)
        search.sizes()
        if epochs:
            search.trained(epochs)
        looks.taken(journal, asked)
        found = search.proven()
        return told(search, found, place, began, asked)


def _won(search: Search, asked: looks.Asked, target: Path | None, began: float) -> Shrunk:
    """The winner of a contest of files that run, and its tables."""
    aim: Aim = asked["aim"]
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(search, aim, Path(folder))
        contest.enter(-(-asked["epochs"] // 3))
        front = contest.ranked()
        looks.taken(search.journal, asked)
        found = contest.proven(front)
        with search.work.on("checks", "re-reading and timing the file"):
            found = contest.finished(found, target)
            speed = running.measured(contest.original, found.file, contest.batch)
        sizes = (contest.original.stat().st_size, found.bytes)
        search.say("done", 1.0)
        meta = {"before": "ONNX in float32", "splits": SPLITS, "aim": aim}
        assert found.test is not None
        proof = account.proof(search, found.test, search.promise, sizes, time.perf_counter() - began, meta)
        tables = (proof, running.left(contest, found), running.entries(contest, found))
        return Shrunk(formats.open(found.file).settle(), *tables, speed)

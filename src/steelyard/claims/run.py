"""Runs claims in several processes and tells the results as one Table.

Decides how the work is spread, and that a crash of one check is a result and not an end. Torch is imported in
the working processes only, and computes there with one thread each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from types import FrameType

from steelyard.claims import CHAPTERS, CLAIMS
from steelyard.claims.check import Outcome, run_check
from steelyard.core.table import Column, Table
from steelyard.errors import MissingExtraError, RecipeError, UnknownNameError

Progress = Callable[[int, int, str], None]  # (done, total, id of the one that is done)


def run_claims(
    ids: Sequence[str] | None = None,
    *,
    chapters: Sequence[str] | None = None,
    processes: int = 2,
    progress: Progress | None = None,
) -> Table:
    """Measure claims and compare each with its bar.

    Args:
        ids: which; None = all, in the order of CLAIMS.
        chapters: only those of these letters; None = all.
        processes: how many working processes. They are spawned, so a script that calls this needs the usual
            ``if __name__ == "__main__":``. 1 still uses a process of its own; 0 runs in this one.
        progress: called after each claim.

    Returns a row per claim: chapter, id, claim, measured, bar, verdict, seconds. The meta has the numbers by
    id under ``measured``, the method under ``method``, and how many passed and failed.

    Raises UnknownNameError for an id or a chapter that is not there, MissingExtraError without torch.
    """
    chosen = choose(ids, chapters)
    if find_spec("torch") is None:
        raise MissingExtraError("measuring the claims", "torch", "learn")
    if processes < 0:
        raise RecipeError(f"processes is 0 or more, not {processes}")
    start = time.perf_counter()
    found: dict[str, Outcome] = {}
    for outcome in _inside(chosen) if processes == 0 else _outside(chosen, processes):
        found[outcome.id] = outcome
        if progress is not None:
            progress(len(found), len(chosen), outcome.id)
    return _table([found[name] for name in chosen], time.perf_counter() - start)


def choose(ids: Sequence[str] | None, chapters: Sequence[str] | None) -> list[str]:
    """The ids to run, each once, in the order of CLAIMS."""
    for letter in chapters or ():
        if letter.upper() not in CHAPTERS:
            raise UnknownNameError("chapter", letter, CHAPTERS)
    wanted = [name.upper() for name in ids or CLAIMS]
    for name in wanted:
        if name not in CLAIMS:
            raise UnknownNameError("claim", name, CLAIMS)
    letters = {letter.upper() for letter in chapters or CHAPTERS}
    return [name for name in CLAIMS if name in wanted and name[0] in letters]


def measure(name: str) -> Outcome:
    """One claim, measured in this process."""
    try:
        check = CLAIMS[name]
    except Exception as error:  # noqa: BLE001 - a check that cannot be imported has failed
        return _failed(name, f"{type(error).__name__}: {error}")
    return run_check(check)


def _inside(names: Sequence[str]) -> Iterator[Outcome]:
    return (measure(name) for name in names)


def _outside(names: Sequence[str], processes: int) -> Iterator[Outcome]:
    """Outcomes as they come; later chapters are the longer work and start first."""
    if not names:
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(processes, len(names)), context, initializer=_prepare)
    try:
        futures = {pool.submit(measure, name): name for name in reversed(names)}
        for future in as_completed(futures):
            yield _outcome(future, futures[future])
    except BaseException:  # interrupted: nothing that was started goes on
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    pool.shutdown()


def _prepare() -> None:
    """One thread for each process; an interrupt is the parent's to handle, and its end removes temporary files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
    raise SystemExit(1)


def _outcome(future: Future[Outcome], name: str) -> Outcome:
    error = future.exception()
    return future.result() if error is None else _failed(name, f"the process ended: {error}")


def _failed(name: str, message: str) -> Outcome:
    return Outcome(name, CLAIMS.rows[name].about, "", "", passed=False, seconds=0.0, failure=message)


def _table(outcomes: Sequence[Outcome], seconds: float) -> Table:
    rows = [
        {
            "chapter": o.chapter,
            "id": o.id,
            "claim": o.claim,
            "measured": o.evidence,
            "bar": o.bar,
            "verdict": "pass" if o.passed else "FAIL",
            "seconds": o.seconds,
        }
        for o in outcomes
    ]
    passed = sum(o.passed for o in outcomes)
    meta = {
        "passed": passed,
        "failed": len(outcomes) - passed,
        "seconds": seconds,
        "measured": {o.id: dict(o.measured) for o in outcomes},
        "method": {o.id: o.method for o in outcomes},
    }
    columns = [
        *(Column("chapter"), Column("id"), Column("claim"), Column("measured"), Column("bar"), Column("verdict")),
        Column("seconds", "s"),
    ]
    return Table.of("claims about weights, measured", columns, rows, meta)

"""Runs claims in several processes and tells the results as one Table.

Decides how the work is spread, and that a crash of one check is a result and not an end. Torch is imported in
the working processes only, and computes there with one thread each. An interrupt is this process's to handle:
the others never see it, are ended at once, and what they left of temporary files goes with the folder of this run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from importlib.util import find_spec
from multiprocessing import resource_tracker

from steelyard.claims import CHAPTERS, CLAIMS
from steelyard.claims.check import Outcome, run_check
from steelyard.core.table import Cell, Column, Table
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
    id under ``measured``, each beside its bar under ``figures``, the method under ``method``, why a measurement
    failed under ``failure``, and how many passed and failed. `by_claim` makes tables to read of it.

    Raises UnknownNameError for an id or a chapter that is not there, MissingExtraError without torch.
    """
    chosen = choose(ids, chapters)
    if find_spec("torch") is None:
        raise MissingExtraError("measuring the claims", "torch", "learn")
    if processes < 0:
        raise RecipeError(f"processes is 0 or more, not {processes}")
    start = time.perf_counter()
    found: dict[str, Outcome] = {}
    with closing(_inside(chosen) if processes == 0 else _outside(chosen, processes)) as outcomes:
        for outcome in outcomes:
            found[outcome.id] = outcome
            if progress is not None:
                progress(len(found), len(chosen), outcome.id)
    return _table([found[name] for name in chosen], time.perf_counter() - start)


def choose(ids: Sequence[str] | None, chapters: Sequence[str] | None) -> list[str]:
    """The ids to run, each once, in the order of CLAIMS."""
    filled = {name[0] for name in CLAIMS}  # a chapter may have no claim
    for letter in chapters or ():
        if letter.upper() not in filled:
            raise UnknownNameError("chapter", letter, filled)
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


def _inside(names: Sequence[str]) -> Generator[Outcome, None, None]:
    return (measure(name) for name in names)


def _outside(names: Sequence[str], processes: int) -> Generator[Outcome, None, None]:
    """Outcomes as they come; later chapters are the longer work and start first."""
    if not names:
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with tempfile.TemporaryDirectory(prefix="steelyard-claims-", ignore_cleanup_errors=True) as scratch:
        pool = ProcessPoolExecutor(min(processes, len(names)), context, initializer=_prepare, initargs=(scratch,))
        try:
            with _uninterrupted():  # the processes start here
                futures = {pool.submit(measure, name): name for name in reversed(names)}
            for future in as_completed(futures):
                yield _outcome(future, futures[future])
        except BaseException:  # interrupted: nothing that was started goes on
            with _uninterrupted():
                _end(pool, set(multiprocessing.active_children()) - before)
            raise
        pool.shutdown()


def _end(pool: ProcessPoolExecutor, children: set[multiprocessing.process.BaseProcess]) -> None:
    """End the processes wherever they are; a long computation would not notice a gentler request."""
    pool.shutdown(wait=False, cancel_futures=True)
    for child in children:
        child.kill()
    for child in children:
        child.join()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold interrupts back until the end; processes that start within never receive one (but see `_prepare`)."""
    if sys.platform == "win32":  # there is no mask of signals
        yield
        return
    resource_tracker.ensure_running()  # or starting the first process would start it, and lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(scratch: str) -> None:
    """One thread for each process, a folder for temporary files, and no interrupts where there is no mask of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = scratch
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _outcome(future: Future[Outcome], name: str) -> Outcome:
    error = future.exception()
    return future.result() if error is None else _failed(name, f"the process ended: {error}")


def _failed(name: str, message: str) -> Outcome:
    return Outcome(name, CLAIMS.rows[name].about, "", (), passed=False, seconds=0.0, failure=message)


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
        "figures": {o.id: o.figures for o in outcomes},
        "method": {o.id: o.method for o in outcomes},
        "failure": {o.id: o.failure for o in outcomes if o.failure},
    }
    columns = [
        *(Column("chapter"), Column("id"), Column("claim"), Column("measured"), Column("bar"), Column("verdict")),
        Column("seconds", "s"),
    ]
    return Table.of("claims about weights, measured", columns, rows, meta)


def by_claim(table: Table) -> dict[str, Table]:
    """What `run_claims` found as a table for each claim, by its id: a row for each figure, beside its bar.

    The title says what is claimed and the verdict; the meta how it was measured, or why it could not be.
    """
    columns = (
        Column("figure", about="what was measured"),
        Column("measured"),
        Column("bar", about="what the number must keep to; - where it is told for its own sake"),
        Column("holds"),
    )
    return {str(row["id"]): _figures(table, row, columns) for row in table.rows}


def _figures(table: Table, row: Mapping[str, Cell], columns: Sequence[Column]) -> Table:
    told = {name: table.meta[name].get(row["id"]) for name in ("failure", "method")}
    meta = {name: said for name, said in told.items() if said}
    return Table.of(f"{row['id']} {row['verdict']}: {row['claim']}", columns, table.meta["figures"][row["id"]], meta)


def verdicts(table: Table) -> Table:
    """What `run_claims` found without the figures: a short row for each claim."""
    columns = [c for c in table.columns if c.name in ("id", "claim", "verdict", "seconds")]
    rows = [{c.name: row[c.name] for c in columns} for row in table.rows]
    return Table(table.title, tuple(columns), tuple(rows), table.meta)

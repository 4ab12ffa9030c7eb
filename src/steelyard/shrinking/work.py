"""How far a long work is, by what its parts have taken so far.

Decides how the share that is done follows from counts of what is left and measured seconds of each kind. Knows nothing
of what the parts are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steelyard.learn.run import Run

Say = Callable[[str, float], None]  # what is being done, and the share of the time that is gone


class Work:
    """Counts of what is left, and what each kind has taken.

    say: called with what is being done and the share of the time of the whole that is gone, so that after `seconds`
    there are ``seconds * (1 - share) / share`` to come.

    >>> work = Work(lambda what, share: None)
    >>> work.left["evaluations"] = 3
    >>> with work.on("evaluations", "measuring"):
    ...     pass
    >>> work.left["evaluations"]
    2
    """

    def __init__(self, say: Say, clock: Callable[[], float] = time.perf_counter):
        self.say, self.clock = say, clock
        self.left: dict[str, float] = defaultdict(float)  # of each kind, in its own unit
        self.guesses: dict[str, dict[str, float]] = {}  # kind: takes so many times what others take, the most of these
        self.priors: dict[str, float] = {}  # kind: seconds of one, where nothing like it was measured
        self._taken: dict[str, tuple[float, float]] = {}  # count and seconds
        self._began = clock()

    @contextmanager
    def on(self, kind: str, what: str, count: float = 1) -> Iterator[None]:
        """Within the block so much of a kind is done."""
        self.tell(what)
        start = self.clock()
        yield
        self.took(kind, count, self.clock() - start)

    def took(self, kind: str, count: float, seconds: float) -> None:
        """So much of a kind has been done, in so many seconds."""
        before = self._taken.get(kind, (0.0, 0.0))
        self._taken[kind] = before[0] + count, before[1] + seconds
        if kind in self.left:
            self.left[kind] = max(self.left[kind] - count, 0)

    def tell(self, what: str) -> None:
        """Say what is done now, and how far the whole is: 0 as long as nobody has counted what is left."""
        gone = self.clock() - self._began
        to_come = sum(count * self.each(kind) for kind, count in self.left.items() if count)
        self.say(what, gone / (gone + to_come) if self.left and gone + to_come else 0.0)

    def each(self, kind: str) -> float:
        """The seconds of one of a kind: measured, or by those that are like it."""
        count, seconds = self._taken.get(kind, (0.0, 0.0))
        if count:
            return seconds / count
        if kind in self.guesses:
            return max(self.each(like) * times for like, times in self.guesses[kind].items())
        return self.priors.get(kind, 0.0)


class Meter:
    """The epochs of several runs, one after the other, as work: called with the run after each step.

    What was done before this process began has no seconds, and is not counted into those of an epoch.
    """

    def __init__(self, work: Work, kind: str, what: str):
        self.work, self.kind, self.what = work, kind, what
        self._whole, self._base = work.left[kind], 0.0
        self._last: tuple[Run, float, float] | None = None  # the run, how far it was, when

    def at(self, epochs: float) -> None:
        """So many epochs of the whole are done, in this process or before."""
        self._base, self._last = epochs, None
        self.work.left[self.kind] = max(self._whole - epochs, 0)

    def __call__(self, run: Run) -> None:
        done, now = run.done * run.epochs, self.work.clock()
        if self._last is not None and self._last[0] is run:
            self.work.took(self.kind, done - self._last[1], now - self._last[2])
        self._last = run, done, now
        self.work.left[self.kind] = max(self._whole - self._base - done, 0)
        self.work.tell(self.what)

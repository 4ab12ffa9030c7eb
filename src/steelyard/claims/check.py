"""One claim: what is said, how it is measured, and the bar that the measurement must pass.

Decides what passing means. Knows nothing of processes or of what is measured.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SHOWN = 6  # numbers that are shown, or as many as have bars

Direction = Literal["<=", ">=", "<", "=="]

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Bar:
    """A number that a measurement is held against.

    >>> str(Bar("error", "<=", 1e-6)), Bar("error", "<=", 1e-6).holds(float("nan"))
    ('error <= 1e-06', False)
    """

    what: str  # the name of the measured number
    direction: Direction
    number: float

    def holds(self, value: float) -> bool:
        """Whether `value` passes; NaN never does."""
        return not math.isnan(value) and _HOLDS[self.direction](value, self.number)

    @property
    def limit(self) -> str:
        """The bar without what is held against it."""
        return f"{self.direction} {self.number:g}"

    def __str__(self) -> str:
        return f"{self.what} {self.limit}"


@dataclass(frozen=True)
class Check:
    """A claim and its measurement. `measure` returns a number for each bar, and further numbers as evidence."""

    id: str
    claim: str
    method: str
    bars: tuple[Bar, ...]
    measure: Callable[[], Mapping[str, float]]

    @property
    def chapter(self) -> str:
        """The letter that the id begins with."""
        return self.id[0]


@dataclass(frozen=True)
class Outcome:
    """What a check found. Plain data: it travels between processes."""

    id: str
    claim: str
    method: str
    bars: tuple[Bar, ...]
    passed: bool
    seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""  # why there is no measurement

    @property
    def chapter(self) -> str:
        """The letter that the id begins with."""
        return self.id[0]

    @property
    def bar(self) -> str:
        """All bars in a line."""
        return ", ".join(map(str, self.bars))

    @property
    def first(self) -> dict[str, float]:
        """The first measured numbers, all that have bars among them; `measured` has all."""
        return dict(list(self.measured.items())[: max(SHOWN, len(self.bars))])

    @property
    def evidence(self) -> str:
        """The first numbers in a line, or why there are none."""
        return self.failure or "; ".join(f"{name} {value:.4g}" for name, value in self.first.items())

    @property
    def figures(self) -> list[dict[str, str | float | bool | None]]:
        """Each bar beside what was measured, and then those of the first numbers that have no bar."""
        rows: list[dict[str, str | float | bool | None]] = []
        for bar in self.bars:
            value = self.measured.get(bar.what)
            holds = value is not None and bar.holds(value)
            rows.append({"figure": bar.what, "measured": value, "bar": bar.limit, "holds": holds})
        held = {bar.what for bar in self.bars}
        further = {name: value for name, value in self.first.items() if name not in held}
        return rows + [{"figure": n, "measured": v, "bar": None, "holds": None} for n, v in further.items()]


def run_check(check: Check) -> Outcome:
    """Measure one claim. A measurement that raises, or lacks a number, is a failed check with its message."""
    start = time.perf_counter()
    measured: dict[str, float] = {}
    failure = ""
    try:
        found = {name: float(value) for name, value in check.measure().items()}
        measured = {
            bar.what: found[bar.what] for bar in check.bars if bar.what in found
        } | found  # those with bars first
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in a check is its result
        failure = f"{type(error).__name__}: {error}"
    missing = [bar.what for bar in check.bars if bar.what not in measured]
    if missing and not failure:
        failure = f"the check did not measure {missing[0]!r}"
    passed = not failure and all(bar.holds(measured[bar.what]) for bar in check.bars)
    seconds = time.perf_counter() - start
    return Outcome(check.id, check.claim, check.method, check.bars, passed, seconds, measured, failure)

"""A live view on a terminal: the totals with the course of the loss, the tensors of the last look, and the faults.

Decides what is drawn and how often; on what is no terminal nothing is. Computes nothing but where a mark stands.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

from steelyard.errors import ModelError, printable
from steelyard.learn.seeding import python_unmoved
from steelyard.learn.watch.sinks import Sink

with python_unmoved():
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

SECONDS = 0.25  # between two pictures
COURSE = 40  # values of the loss that are drawn
FAULTS = 5  # that are shown, the last ones
COLUMNS = ("weight norm", "gradient norm", "update ratio")
BLOCKS = "▁▂▃▄▅▆▇█"
DECADES = 8  # the scale of update ratios: 1e-8 to 1


class Terminal(Sink):
    """The view on standard error; `rows` tensors are shown, the first of the model."""

    def __init__(self, rows: str = "12", console: Console | None = None):
        if not rows.isdigit():
            raise ModelError(f"the sink 'terminal:{rows}': expected how many tensors are shown, such as terminal:12")
        self._rows = int(rows)
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._step, self._drawn = 0, 0.0
        self._totals: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=COURSE)
        self._tensors: dict[str, dict[str, float]] = {}
        self._faults: deque[str] = deque(maxlen=FAULTS)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers in; draw them if the last picture is old enough."""
        self._step = step
        for name, value in values.items():
            what, _, tensor = name.partition("/")
            if tensor:
                self._tensors.setdefault(tensor, {})[what] = value
            else:
                self._totals[name] = value
        if "loss" in values:
            self._losses.append(values["loss"])
        if time.monotonic() - self._drawn > SECONDS:
            self._draw()

    def fault(self, step: int, text: str) -> None:
        """Show it at once."""
        self._faults.append(f"step {step}: {text}")
        self._draw()

    def close(self) -> None:
        """Leave the last picture standing."""
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        totals = "  ".join(f"{printable(name)} {value:.4g}" for name, value in self._totals.items())
        head = Text(f"step {self._step}  {totals}  {course(list(self._losses))}")
        table = Table("tensor", *COLUMNS, f"1e-{DECADES} … 1", box=None)
        shown = list(self._tensors.items())[: self._rows]
        for name, of in shown:
            cells = [
                f"{of[what]:.3g}" if what in of else "" for what in ("weight norm", "gradient norm", "update ratio")
            ]
            table.add_row(printable(name), *cells, place(of.get("update ratio")))
        rest = len(self._tensors) - len(shown)
        more = [Text(f"and {rest} more tensors", style="dim")] if rest > 0 else []
        return Group(head, table, *more, *(Text(fault, style="bold red") for fault in self._faults))


def course(values: Sequence[float]) -> str:
    """The course of some values in one line; what is not finite is a cross.

    >>> course([3.0, 2.0, 1.0, float("nan")])
    '█▅▁×'
    """
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    width = (high - low) or 1.0
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[round((v - low) / width * steps)] if math.isfinite(v) else "×" for v in values)


def place(ratio: float | None) -> str:
    """Where an update ratio stands on a scale of decades; the last mark is 1 and above.

    >>> place(1e-3), place(None)
    ('·····●···', '')
    """
    if ratio is None or not math.isfinite(ratio):
        return ""
    at = 0 if ratio <= 0 else min(max(round(math.log10(ratio)) + DECADES, 0), DECADES)
    return "·" * at + "●" + "·" * (DECADES - at)

"""How a cell is written for a human: one function from a value and its unit to text.

Decides the wording of numbers and nothing else: alignment is in ``text``, mark-up in ``html``. Bytes are
decimal (1 kB = 1000 B), as file managers and network tools count them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from steelyard.core.table import Cell, Table
from steelyard.errors import printable

LONGEST = 1000  # characters of a word: a hostile name has a hundred million
MOST = 64  # members of a list
_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def written(value: Cell, unit: str = "", *, exact: bool = False) -> str:
    """The text of one cell.

    >>> [written(v, u) for v, u in ((44000, "B"), (0.9725, "%"), (-0.0012, "pp"), (31.44, "x"), (0.012, "s"))]
    ['44.0 kB', '97.25 %', '-0.12 pp', '31.4×', '12.0 ms']
    >>> written(44000, "B", exact=True)
    '44,000 B (44.0 kB)'
    >>> written([64, 3, 7, 7]), written(None), written(True)
    ('64×3×7×7', '-', 'yes')

    A word of more than 1,000 characters loses its middle, and a list of more than 64 members its end.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return printable(value if len(value) <= LONGEST else f"{value[: LONGEST // 2]}…{value[-LONGEST // 2 :]}")
    if isinstance(value, Sequence):
        return _sequence(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if unit == "B":
        return _bytes(value, exact)
    return _number(value, unit)


def is_number(value: Cell) -> bool:
    """Whether a cell is aligned to the right; truth values are words, not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def in_points(table: Table) -> Table:
    """The table with differences of shares as the points that they are called: plotly writes a share as percent alone.

    >>> in_points(Table.of("", {"loss": "pp"}, [{"loss": 0.018}, {"loss": None}])).column("loss")
    [1.8, None]
    """
    names = [column.name for column in table.columns if column.unit == "pp"]
    if not names:
        return table
    rows = [{name: _points(v) if name in names else v for name, v in row.items()} for row in table.rows]
    return replace(table, rows=tuple(rows))


def _points(value: Cell) -> Cell:
    """A hundred times each number, without the noise of binary fractions."""
    if isinstance(value, (list, tuple)):
        return [_points(v) for v in value]
    return round(value * 100, 10) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _sequence(values: Sequence[Cell]) -> str:
    if len(values) > MOST:
        return f"{_sequence(values[:MOST])}… ({len(values)} in all)"
    if values and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return "×".join(map(str, values))
    return "[" + ", ".join(written(v) for v in values) + "]"


def _bytes(value: float, exact: bool) -> str:
    whole = f"{value:,.0f} B"
    size, step = abs(value), 0
    while size >= 999.5 and step < len(_PREFIXES) - 1:
        size, step = size / 1000, step + 1
    if step == 0:
        return whole
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    short = f"{'-' if value < 0 else ''}{size:.{digits}f} {_PREFIXES[step]}"
    return f"{whole} ({short})" if exact else short


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value * 100:.2f} %"
    if unit == "pp":
        return f"{value * 100:+.2f} pp"
    if unit == "x":
        return f"{value:.2g}×" if 0 < abs(value) < 0.095 else f"{_digits(value)}×"
    if unit == "s":
        return _seconds(value)
    if unit == "bits":
        return f"{_digits(value)} bits"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}"


def _digits(value: float) -> str:
    """Three significant digits, thousands whole."""
    if isinstance(value, int) or abs(value) >= 999.5:
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def _seconds(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0 s"
    if size < 0.9995:
        scale, name = (1e3, "ms") if size >= 0.9995e-3 else (1e6, "µs")
        return f"{_digits(float(value * scale))} {name}"
    if size < 99.95:
        return f"{_digits(float(value))} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

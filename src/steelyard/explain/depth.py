"""The signal as a picture: scale against depth, forwards and backwards, from the table of ``signal``.

Decides what the scales are relative to, and how they look in a line of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steelyard.core.table import Column, Table

WIDTH = 30  # characters of the picture
FORWARDS, BACKWARDS, BOTH = ">", "<", "x"


def against_depth(signal: Table) -> Table:
    """A row for each layer in the order of execution: the spread relative to that of the first layer (forwards), dL/da
    relative to that of the last one (backwards), and both as marks ``>`` and ``<`` on a logarithmic axis.

    >>> rows = [{"layer": "a", "verdict": "healthy", "spread": 1.0, "gradient": 1e-3}]
    >>> rows += [{"layer": "b", "verdict": "healthy", "spread": 10.0, "gradient": 1e-2}]
    >>> table = against_depth(Table.of("signal", dict.fromkeys(rows[0], ""), rows))
    >>> table.columns[-1].name, [str(mark).strip() for mark in table.column(table.columns[-1].name)]
    ('1e-1 to 1e+1', ['<              >', '<              >'])
    """
    spreads, slopes = signal.column("spread"), signal.column("gradient")
    forwards = _relative(spreads, next(filter(None, spreads), None))
    backwards = _relative(slopes, next(filter(None, reversed(slopes)), None))
    logs = [math.log10(v) for v in (*forwards, *backwards) if v and math.isfinite(v)]
    low, high = min(-1, math.floor(min(logs, default=0))), max(1, math.ceil(max(logs, default=0)))
    picture = f"1e{low:+d} to 1e{high:+d}"
    rows = [
        {
            "layer": row["layer"],
            "verdict": row["verdict"],
            "forwards": there,
            "backwards": back,
            picture: _marks(there, back, low, high),
        }
        for row, there, back in zip(signal.rows, forwards, backwards, strict=True)
    ]
    columns = (
        Column("layer"),
        Column("verdict"),
        Column("forwards", about="spread of the activations, relative to that of the first layer"),
        Column("backwards", about="rms of dL/da, relative to that of the last layer"),
        Column(picture, about="forwards > and backwards < on a logarithmic axis"),
    )
    return Table.of("scale against depth: forwards >, backwards <", columns, rows, signal.meta)


def _relative(values: Sequence[Any], reference: Any) -> list[float | None]:
    return [None if v is None or not reference else v / reference for v in values]


def _marks(forwards: float | None, backwards: float | None, low: int, high: int) -> str:
    """Both values on an axis between two powers of ten; what is 0 or not finite stands at its end."""
    line = [" "] * WIDTH
    for value, mark in ((backwards, BACKWARDS), (forwards, FORWARDS)):
        if value is not None:
            log = math.log10(value) if 0 < value < math.inf else high if value > 0 else low
            place = round((log - low) / (high - low) * (WIDTH - 1))
            line[place] = mark if line[place] == " " else BOTH
    return "".join(line).rstrip()

"""Starts compared as a picture: for each start a bar of what they are ranked by, from the table of ``compare_starts``.

Decides how a value between 0 and the largest one looks in a line of text.
"""

from __future__ import annotations

import math

from steelyard.core.table import Column, Table

WIDTH = 30  # characters of the longest bar


def ranked_by(compared: Table) -> str:
    """The column that the ranks come from: the metric after training, or else the score."""
    names = [column.name for column in compared.columns]
    return names[names.index("start") + 1]


def in_bars(compared: Table) -> Table:
    """The table without its measurements, and with a bar for what each start is ranked by: at most 1, or the largest.

    >>> rows = [{"rank": 1, "start": "he", "score": 0.5, "verdict": "healthy", "why": ""}]
    >>> table = in_bars(Table.of("starts compared", dict.fromkeys(rows[0], ""), rows))
    >>> table.columns[-2].name, len(str(table.column("0 to 1")[0]))
    ('0 to 1', 15)
    """
    by, names = ranked_by(compared), [column.name for column in compared.columns]
    values = [float(v) for v in compared.column(by) if isinstance(v, (int, float)) and math.isfinite(v)]
    top = max([1.0, *values])
    picture = f"0 to {top:.3g}"
    shown = [name for name in ("depth", "rank", "start", by, "verdict", picture, "why") if name in (*names, picture)]
    known = {column.name: column for column in compared.columns} | {picture: Column(picture, "", f"{by} as a bar")}
    rows = [{**row, picture: _bar(row[by], top)} for row in compared.rows]
    rows = [{name: row[name] for name in shown} for row in rows]
    return Table.of(compared.title, [known[name] for name in shown], rows, compared.meta)


def _bar(value: object, top: float) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    return "█" * round(max(float(value), 0.0) / top * WIDTH)

"""A table as aligned text: for a terminal (its width, bold heads) or for a pipe (no escapes, nothing cut).

Decides the layout. Several rows are a grid; one row, or a terminal too narrow for the grid, is a list of
names and values. Written by hand because a table library costs more time to import than reading a header.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from steelyard.core.table import Cell, Column, Table
from steelyard.errors import printable
from steelyard.report.units import is_number, written

_GAP = 2
_NARROWEST = 12  # characters that a column of words keeps on a narrow terminal


def text(table: Table, width: int | None = None, colour: bool = False) -> str:
    """The table as lines of text.

    >>> sizes = Table("sizes", (Column("file"), Column("bytes", "B")), ({"file": "a", "bytes": 1200},
    ...     {"file": "long", "bytes": 7}))
    >>> print(text(sizes), end="")
    sizes
    file    bytes
    ────  ───────
    a     1.20 kB
    long      7 B

    ``width`` is that of the terminal in characters, None where nothing may be cut; ``colour`` adds bold and dim.
    """
    lines = [_bold(printable(table.title), colour)] if table.title else []
    if len(table.rows) == 1:
        lines += _record(table.columns, table.rows[0], colour)
    elif table.rows:
        lines += _grid(table, width, colour)
    else:
        lines.append("(no rows)")
    lines += [_dim(line, colour) for line in _wrapped(_notes(table), width)]
    return "\n".join(lines) + "\n"


def _record(columns: Sequence[Column], row: Mapping[str, Cell], colour: bool) -> list[str]:
    """One row as names and values, bytes to the last one."""
    names = [printable(c.name) for c in columns]
    widest = max(map(cells, names), default=0)
    values = [written(row[c.name], c.unit, exact=True) for c in columns]
    return [f"{_dim(_pad(n, widest), colour)}{' ' * _GAP}{v}" for n, v in zip(names, values, strict=True)]


def _grid(table: Table, width: int | None, colour: bool) -> list[str]:
    columns = table.columns
    right = [_is_numeric(table, c) for c in columns]
    heads = [printable(c.name) for c in columns]
    body = [[written(row[c.name], c.unit) for c in columns] for row in table.rows]
    widths = [max(map(cells, column)) for column in zip(heads, *body, strict=True)]
    least = [_NARROWEST] * len(columns)
    if width is not None and sum(widths) + _GAP * len(widths) > width:
        least[0] = _distinct([row[0] for row in body], widths[0])
    fitted = _fit(widths, right, least, width)
    if fitted is None:
        blocks = [_record(columns, row, colour) for row in table.rows]
        return [line for block in blocks for line in (*block, "")][:-1]
    rule = (" " * _GAP).join("─" * w for w in fitted)
    lines = [_bold(_line(heads, fitted, right), colour), _dim(rule, colour)]
    return lines + [_line(row, fitted, right) for row in body]


def _is_numeric(table: Table, column: Column) -> bool:
    values = [row[column.name] for row in table.rows if row[column.name] is not None]
    return bool(values) and all(map(is_number, values))


def _distinct(names: Sequence[str], width: int) -> int:
    """The narrowest column in which different names still look different."""
    wanted = len(set(names))
    fits = (w for w in range(_NARROWEST, width) if len({_cut(name, w) for name in names}) == wanted)
    return next(fits, width)


def _fit(widths: list[int], right: list[bool], least: list[int], width: int | None) -> list[int] | None:
    """Column widths for a terminal: columns of words give way, widest first; None if that is not enough."""
    total = sum(widths) + _GAP * (len(widths) - 1)
    if width is None or total <= width:
        return widths
    fitted = list(widths)
    for _ in range(total - width):
        words = [i for i, r in enumerate(right) if not r and fitted[i] > least[i]]
        if not words:
            return None
        fitted[max(words, key=lambda i: fitted[i])] -= 1
    return fitted


def _line(texts: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [_pad(_cut(t, w), w, r) for t, w, r in zip(texts, widths, right, strict=True)]
    return (" " * _GAP).join(padded).rstrip()


def cells(line: str) -> int:
    """How many columns of a terminal a line takes: wide characters take two, combining ones none."""
    if line.isascii():
        return len(line)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in line)


def _pad(line: str, width: int, right: bool = False) -> str:
    space = " " * (width - cells(line))
    return space + line if right else line + space


def _cut(line: str, width: int) -> str:
    """The middle makes way: the start and the end of a tensor's name both matter."""
    if cells(line) <= width:
        return line
    head, tail = line, ""
    while cells(head) > width // 2:
        head = head[:-1]
    for i in range(len(line) - 1, 0, -1):
        if cells(head) + 1 + cells(line[i:]) > width:
            break
        tail = line[i:]
    return f"{head}…{tail}"


def _notes(table: Table) -> str:
    """What the table says of itself, except which program wrote it; nested data is left to JSON."""
    known = {k: v for k, v in table.meta.items() if k not in ("steelyard", "python")}
    plain = {k: v for k, v in known.items() if isinstance(v, (str, int, float))}
    return "; ".join(f"{printable(str(k))}: {written(v)}" for k, v in plain.items())


def _wrapped(line: str, width: int | None) -> list[str]:
    """A line of prose, if there is any, broken between words where a terminal would break it within one."""
    if not line or width is None or cells(line) <= width:
        return [line] if line else []
    import textwrap  # seldom needed

    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)


def _bold(line: str, colour: bool) -> str:
    return f"\x1b[1m{line}\x1b[0m" if colour else line


def _dim(line: str, colour: bool) -> str:
    return f"\x1b[2m{line}\x1b[0m" if colour else line

"""Table: what came out. Columns with units, rows, and where the numbers come from. Computes nothing.

Every verb returns one; text, JSON, CSV, HTML and pictures render it (in ``report``).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steelyard.errors import UnknownNameError

Cell = str | int | float | bool | None | Sequence["Cell"]

# A unit tells a renderer how to write a number: 'B' bytes, 's' seconds, '%' a fraction times 100 (stored as
# the fraction), 'pp' percentage points (stored as a fraction's difference), 'x' a ratio; '' = as it is.
UNITS = ("", "B", "s", "%", "pp", "x", "bits")


@dataclass(frozen=True)
class Column:
    """A column: its name, its unit, and one line on what it means."""

    name: str
    unit: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UnknownNameError("unit", self.unit, UNITS)


@dataclass(frozen=True)
class Table:
    """Rows under named columns, and the provenance of what they say.

    >>> t = Table.of("sizes", {"file": "", "bytes": "B"}, [{"file": "a", "bytes": 12}])
    >>> t.column("bytes")
    [12]
    >>> t
    Table('sizes', 1 row of file, bytes)
    >>> print(t)
    sizes
    file   a
    bytes  12 B
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        title: str,
        columns: Mapping[str, str] | Sequence[Column],
        rows: Iterable[Mapping[str, Any]],
        meta: Mapping[str, Any] | None = None,
    ) -> Table:
        """A table from `columns` (name -> unit, or Column objects) and rows keyed by column name.

        Numpy scalars become Python numbers, a missing cell is None, and a cell under no column raises
        UnknownNameError.
        """
        heads = tuple(Column(n, u) for n, u in columns.items()) if isinstance(columns, Mapping) else tuple(columns)
        names = [c.name for c in heads]
        clean = []
        for row in rows:
            for name in row:
                if name not in names:
                    raise UnknownNameError("column", name, names)
            clean.append({name: _cell(row.get(name)) for name in names})
        return Table(title, heads, tuple(clean), {**(meta or {}), **provenance()})

    @staticmethod
    def joined(tables: Mapping[str, Table], by: str) -> Table:
        """The rows of several tables below each other, behind a column `by` that says which table each is of.

        The columns are those of all, in the order in which they appear; the title is that of the first table.

        >>> t = Table.of("sizes", {"bytes": "B"}, [{"bytes": 12}])
        >>> Table.joined({"a": t, "b": t}, "file").rows[1]
        {'file': 'b', 'bytes': 12}
        """
        columns = {by: Column(by)}
        for table in tables.values():
            columns |= {column.name: column for column in table.columns if column.name not in columns}
        rows = ({by: name, **row} for name, table in tables.items() for row in table.rows)
        return Table.of(next(iter(tables.values())).title, tuple(columns.values()), rows)

    def column(self, name: str) -> list[Any]:
        """The cells of one column, top to bottom; raises UnknownNameError for a column that is not there."""
        if all(c.name != name for c in self.columns):
            raise UnknownNameError("column", name, [c.name for c in self.columns])
        return [row[name] for row in self.rows]

    def __str__(self) -> str:
        """The table as it stands in a terminal that is wide enough."""
        from steelyard.report.text import text  # how it looks is decided there, once it is to be looked at

        return text(self).rstrip("\n")

    def __repr__(self) -> str:
        names = ", ".join(column.name for column in self.columns)
        return f"Table({self.title!r}, {len(self.rows)} row{'s' * (len(self.rows) != 1)} of {names})"

    def to_data(self) -> dict[str, Any]:
        """Plain data, valid JSON: a number that JSON lacks becomes 'NaN', 'Infinity' or '-Infinity'."""
        columns = [{"name": c.name, "unit": c.unit} | ({"about": c.about} if c.about else {}) for c in self.columns]
        rows = [{k: _plain(v) for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "columns": columns, "rows": rows, "meta": _plain(dict(self.meta))}

    def to_json(self, indent: int | None = None) -> str:
        """`to_data` as text."""
        return json.dumps(self.to_data(), indent=indent, ensure_ascii=False, allow_nan=False)


def provenance() -> dict[str, str]:
    """What made a number: the version of this package and of Python."""
    from steelyard import __version__

    return {"steelyard": __version__, "python": ".".join(map(str, sys.version_info[:3]))}


def _cell(value: Any) -> Cell:
    if isinstance(value, (list, tuple)):
        return [_cell(v) for v in value]
    scalar: Cell = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars, neither imported
    return scalar


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)

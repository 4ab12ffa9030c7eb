"""Tables as data for other programs: JSON, one object per table and line, and CSV. Numbers stay exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from steelyard.core.table import Cell, Table
from steelyard.errors import printable


def json_lines(tables: Iterable[Table]) -> str:
    """One JSON object per table, each on a line of its own.

    >>> json_lines([Table("sizes", (), ())])
    '{"title": "sizes", "columns": [], "rows": [], "meta": {}}\\n'
    """
    return "".join(f"{table.to_json()}\n" for table in tables)


def csv_text(table: Table) -> str:
    """One table with a header line (RFC 4180, lines end in LF); no value is rounded, a missing one is empty.

    Words are as in every text for people: what could steer a terminal or break a line is escaped.

    >>> csv_text(Table.of("sizes", {"name": "", "shape": ""}, [{"name": "a,b", "shape": [2, 3]}]))
    'name,shape\\n"a,b",2x3\\n'
    """
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [column.name for column in table.columns]
    writer.writerow(map(printable, names))
    writer.writerows([_field(row[name]) for name in names] for row in table.rows)
    return out.getvalue()


def _field(value: Cell) -> object:
    """Truth values as in JSON, a list of whole numbers as 2x3, other lists with semicolons."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence):
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        return ("x" if whole else ";").join(str(_field(v)) for v in value)
    return "" if value is None else value

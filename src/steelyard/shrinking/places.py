"""Where the bytes of a finished file lie, as pictures, and by what to know it again. Knows no torch."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.report.plots import Bars, Treemap

HEADER = "the header"  # which no tensor is called
REST = (
    "Areas are bytes of the finished file. What is left beside the tensors, its header, says what they are called, "
    "what shapes they have and how they are held."
)


def known_by(file: str, source: str | None) -> dict[str, str]:
    """What a page says of a finished file beside its promise: of what, when, and the digest if it is one file."""
    found = {} if source is None else {"of": source}
    found["date"] = date.today().isoformat()
    if Path(file).is_file():
        with open(file, "rb") as content:  # a part at a time
            found["sha256 of the new file"] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def area(tensors: Table, name: str, size: str, whole: Any) -> Treemap:
    """The bytes of each tensor, the column `size`, and what is left of `whole`, those of the file.

    >>> table = Table.of("held", {"name": "", "after": "B"}, [{"name": "a", "after": 7}])
    >>> area(table, "name", "after", 10).table.column("bytes")
    [7, 3]
    """
    rows = [{"tensor": row[name], "bytes": row[size]} for row in tensors.rows]
    rest = {"tensor": HEADER, "bytes": whole - sum(row["bytes"] for row in rows)}  # type: ignore[misc]
    found = Table.of("the finished file", [Column("tensor"), Column("bytes", "B")], [*rows, rest])
    alt = "areas in proportion to the bytes that each tensor takes in the finished file"
    return Treemap(found, "tensor", "bytes", alt=alt)


def before_and_after(tensors: Table, name: str, columns: tuple[str, str], count: int = 30) -> Bars:
    """Two bars for each of the largest tensors: of more, none could be read."""
    rows = sorted(tensors.rows, key=lambda row: -int(row[columns[0]]))  # type: ignore[arg-type]
    return Bars(replace(tensors, rows=tuple(rows[:count])), name, columns, title="before and after", log=True)

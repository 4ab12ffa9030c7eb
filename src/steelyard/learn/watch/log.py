"""What was watched: an SQLite file, or a database in memory, that grows with the training.

Decides when rows are written. Knows nothing of torch, or of what stands in the tables.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from numbers import Real
from pathlib import Path
from typing import Any

from steelyard.core.table import Table
from steelyard.errors import WeightsError
from steelyard.learn.watch.reading import SqliteLog
from steelyard.learn.watch.schema import ENDED, INTEGER, TABLES, TEXT, VERSION, to_cell

SECONDS = 1.0  # between two writes
ROWS = 20_000  # that wait at most


class Log:
    """The log of a watch. `note` adds a number of the user's own; `table` reads what there is, also while it grows.

    >>> log = Log()
    >>> log.add("notes", [(0, "loss", 2.3)])
    >>> log.table("notes").rows[0]["value"]
    2.3
    """

    def __init__(self, path: str | Path | None = None, meta: Mapping[str, str] | None = None):
        """A new log: in that file, which must not exist, or in memory."""
        if path is not None and Path(path).suffix == ".parquet":
            raise WeightsError(f"{path}: a log that grows is SQLite; name it run.sqlite, and make Parquet of it with "
                               "log.to_parquet(folder)")  # fmt: skip
        if path is not None and Path(path).exists():
            if Path(path).is_dir():
                raise WeightsError(f"{path} is a folder: name a file in it for the log, such as "
                                   f"{Path(path) / 'run.sqlite'}")  # fmt: skip
            raise WeightsError(f"{path} exists: choose another name for the log, or remove it")
        self.path = None if path is None else Path(path)
        self._base = _connect(str(path) if path is not None else ":memory:")
        self._waiting: dict[str, list[tuple[Any, ...]]] = {name: [] for name in TABLES}
        self._written = time.monotonic()
        self.noted = 0  # the step to which a note belongs
        self.url: str | None = None  # of its live page
        self.listener: Callable[[str, float], None] | None = None  # is told of each note
        _create(self._base, meta or {})

    def note(self, **values: Any) -> None:
        """Log numbers of this step: ``log.note(loss=loss)``, by which faults of the whole are found, or any others.

        A tensor of one element is a number, too.

        They belong to the coming step of the optimizer if the model ran since the last one, else to that one.
        """
        rows = [(self.noted, what, _number(what, value)) for what, value in values.items()]
        self.add("notes", rows)
        for row in rows if self.listener is not None else ():
            self.listener(*row[1:])

    def add(self, name: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Rows of the table of that name, a value for each column."""
        self._waiting[name].extend(rows)
        if time.monotonic() - self._written > SECONDS or len(self._waiting[name]) > ROWS:
            self.write()

    def write(self) -> None:
        """Write what waits; who reads the file sees it from now on."""
        with self._base:
            for name, rows in self._waiting.items():
                if rows:
                    marks = ", ".join("?" * len(TABLES[name]))
                    cells = (tuple(map(to_cell, row)) for row in rows)
                    self._base.executemany(f'INSERT INTO "{name}" VALUES ({marks})', cells)
                    rows.clear()
        self._written = time.monotonic()

    def table(self, name: str, *, tensor: str | None = None) -> Table:
        """The table of that name, in the order of the steps; of one tensor if it is given.

        Raises UnknownNameError for a table or a tensor that is not there.
        """
        return self._read().table(name, tensor=tensor)

    def to_parquet(self, folder: str | Path) -> list[Path]:
        """Write every table to a file of its own in that folder, as `LogFile.to_parquet` does."""
        return self._read().to_parquet(folder)

    def _read(self) -> SqliteLog:
        self.write()
        return SqliteLog(str(self.path or "in memory"), lambda: nullcontext(self._base))

    def close(self) -> None:
        """Write what waits and, if the log is a file, let go of it; a log in memory can still be read."""
        self.write()
        with self._base:
            self._base.execute("INSERT OR IGNORE INTO meta VALUES (?, '1')", (ENDED,))
        if self.path is not None:
            with suppress(sqlite3.OperationalError):  # who reads just now still needs the file beside it
                self._base.execute("PRAGMA journal_mode = DELETE")  # one file again

    def into_memory(self) -> None:
        """Go on without the file, which its owner will remove."""
        base = _connect(":memory:")
        self._base.backup(base)
        self._base.close()
        self._base, self.path = base, None


def _connect(where: str) -> sqlite3.Connection:
    try:
        base = sqlite3.connect(where, check_same_thread=False)
        base.execute("PRAGMA journal_mode = WAL")  # others read while it grows
        base.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error as error:
        raise WeightsError(f"the log cannot be written to {where}: {error}") from error
    return base


def _create(base: sqlite3.Connection, meta: Mapping[str, str]) -> None:
    with base:
        for name, columns in TABLES.items():
            listed = ", ".join(f'"{c.name}" {_kind(c.name)}' for c in columns)
            base.execute(f'CREATE TABLE "{name}" ({listed})')
        base.execute('CREATE TABLE "columns" ("table" TEXT, "column" TEXT, unit TEXT, about TEXT)')
        described = [(name, c.name, c.unit, c.about) for name, columns in TABLES.items() for c in columns]
        base.executemany('INSERT INTO "columns" VALUES (?, ?, ?, ?)', described)
        base.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT)")
        rows = {"steelyard.watch": str(VERSION), **meta}
        base.executemany("INSERT INTO meta VALUES (?, ?)", list(rows.items()))


def _kind(column: str) -> str:
    return "TEXT" if column in TEXT else "INTEGER" if column in INTEGER else "REAL"


def _number(what: str, value: Any) -> float:
    try:
        return float(value if isinstance(value, Real) else value.item())  # a tensor's item() asks for no gradient
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"note: {what} is no number and no tensor of one element: {error}") from error

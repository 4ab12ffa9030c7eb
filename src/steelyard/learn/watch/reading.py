"""A log that was kept, or is still growing, as Tables: an SQLite file, or a folder of Parquet files.

Decides how a log is recognised and read in pieces. Knows nothing of what is in it, or of torch.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.errors import FormatError, UnknownNameError
from steelyard.learn.watch.schema import TABLES, VERSION, columns_of, from_cell

PIECE = 50_000  # rows that are read at a time
Row = Sequence[Any]


class LogFile(ABC, Mapping[str, Table]):
    """A log: its tables by name, each read when it is asked for; made by `read_log`."""

    where: str

    @property
    @abstractmethod
    def meta(self) -> Mapping[str, str]:
        """What the watch said of itself: model, optimizer, version of torch."""

    @abstractmethod
    def pieces(self, name: str, after: int = 0, tensor: str | None = None) -> Iterator[list[Row]]:
        """The rows of a table, or those of a tensor, behind the first `after` of the table; so many at a time."""

    def table(self, name: str, *, tensor: str | None = None) -> Table:
        """The table of that name, in the order of the steps; of one tensor if it is given.

        Raises UnknownNameError for a table or a tensor that is not there.
        """
        columns = columns_of(name)
        if tensor is not None:
            if Column("tensor") not in columns:
                raise UnknownNameError("table by tensor", name, [n for n, c in TABLES.items() if Column("tensor") in c])
            known = [str(row[0]) for piece in self.pieces("tensors") for row in piece]
            if tensor not in known:
                raise UnknownNameError("tensor in the log", tensor, known)
        names = [c.name for c in columns]
        rows = (dict(zip(names, row, strict=True)) for piece in self.pieces(name, tensor=tensor) for row in piece)
        meta = {name: value for name, value in self.meta.items() if not name.startswith("steelyard.")}
        return Table.of(f"watch, {name}", columns, rows, {**meta, "log": self.where})

    def to_parquet(self, folder: str | Path) -> list[Path]:
        """Write every table to a file of its own in that folder: norms.parquet, steps.parquet, ...

        Columns have the types of the log, with `unit` and `about` in their metadata. The folder is made if it is not
        there; files of these names are replaced, each as a whole. Raises MissingExtraError without pyarrow, FormatError
        where the folder cannot be written.
        """
        from steelyard.learn.watch.parquet import write

        return write(self, Path(folder))

    def __getitem__(self, name: str) -> Table:
        return self.table(name)

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def __contains__(self, name: object) -> bool:
        return name in TABLES


class SqliteLog(LogFile):
    """A log in a database, also while a watch writes it. `connect` gives a connection for the time of a reading."""

    def __init__(self, where: str, connect: Callable[[], AbstractContextManager[sqlite3.Connection]]):
        self.where, self._connect = where, connect

    @property
    def meta(self) -> Mapping[str, str]:
        with self._connect() as base:
            return dict(base.execute("SELECT name, value FROM meta"))

    def pieces(self, name: str, after: int = 0, tensor: str | None = None) -> Iterator[list[Row]]:
        names = [c.name for c in columns_of(name)]
        which, given = ("", ()) if tensor is None else ("AND tensor = ?", (tensor,))
        query = f'SELECT rowid, * FROM "{name}" WHERE rowid > ? {which} ORDER BY rowid LIMIT {PIECE}'
        while True:
            with self._connect() as base:
                found = base.execute(query, (after, *given)).fetchall()
            if found:
                after = found[-1][0]  # rows are never deleted: they are counted by their rowid
                yield [[from_cell(n, value) for n, value in zip(names, row[1:], strict=True)] for row in found]
            if len(found) < PIECE:
                return


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads; raises FormatError for what is no log."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            if base.execute("SELECT value FROM meta WHERE name = 'steelyard.watch'").fetchone() != (str(VERSION),):
                raise FormatError("this log is of another version", path=path)
            yield base
    except sqlite3.Error as error:
        raise FormatError(f"expected the log of a watch, an SQLite file: {error}", path=path) from error


def read_log(path: str | Path) -> LogFile:
    """The log in an SQLite file, which a watch wrote or still writes, or in a folder of Parquet files: Tables by name.

    ::

        log = sy.read_log("run.sqlite")
        log["faults"], log["steps"], log.table("norms", tensor="head.weight")
        log.to_parquet("run")            # norms.parquet, steps.parquet, ... for pandas, polars, DuckDB

    Raises FormatError if there is no log, MissingExtraError for Parquet without pyarrow.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        from steelyard.learn.watch.parquet import ParquetLog

        return ParquetLog(path if path.is_dir() else path.parent)
    if not path.is_file():
        raise FormatError("there is no such file", path=path)
    with _opened(path):
        return SqliteLog(str(path), lambda: _opened(path))


def watched(path: str | Path, name: str = "norms", *, tensor: str | None = None) -> Table:
    """A table of the log in that file or folder: "steps", "norms", "notes", "tensors", "faults"; see `read_log`.

    Raises FormatError if there is no log, UnknownNameError for a table or a tensor that is not there.
    """
    return read_log(path).table(name, tensor=tensor)

"""What was watched: an SQLite file, or a database in memory, whose tables are read as Tables.

Decides which tables and columns there are, with their units, and when rows are written. Knows nothing of torch.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from numbers import Real
from pathlib import Path
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.errors import FormatError, UnknownNameError, WeightsError

VERSION = 1
SECONDS = 1.0  # between two writes
ROWS = 20_000  # that wait at most

_TEXT = ("tensor", "shape", "dtype", "what", "layer", "kind", "verdict")
_TEXT = (*_TEXT, "fault", "where", "severity", "evidence", "remedy")
_KINDS = {"step": "INTEGER", "examples": "INTEGER", **dict.fromkeys(_TEXT, "TEXT")}  # the others are REAL
TABLES: Mapping[str, tuple[Column, ...]] = {
    "tensors": (
        Column("tensor"),
        Column("shape"),
        Column("dtype"),
        Column("trainable", about="1 if it had requires_grad when the watch began"),
    ),
    "steps": (
        Column("step", about="counts the optimizer's steps from 0"),
        Column("seconds", "s", "since the watch began, at the end of the step"),
        Column("rate", about="the learning rate of the first parameter group"),
        Column("gradient norm", about="Euclidean, over all tensors, as the optimizer got it"),
        Column("update ratio", "x", "||W_after - W|| / ||W|| over all tensors"),
    ),
    "norms": (
        Column("step"),
        Column("tensor"),
        Column("weight norm", about="||W||, Euclidean, before the step"),
        Column("gradient norm", about="||g||, as the optimizer got it"),
        Column("update norm", about="||W_after - W||"),
        Column("update ratio", "x", "||W_after - W|| / ||W||"),
    ),
    "values": (
        Column("step"),
        Column("tensor"),
        Column("what", about="weight (before the step) or gradient"),
        Column("min"),
        Column("1 %", about="quantiles, and zeros, of 16,384 values at most, evenly spaced"),
        Column("25 %"),
        Column("median"),
        Column("75 %"),
        Column("99 %"),
        Column("max"),
        Column("zeros", "%"),
        Column("not finite", "%"),
    ),
    "layers": (
        Column("step"),
        Column("layer"),
        Column("kind"),
        Column("verdict", about="of the signal and the gradient, against what came in and the end of the model"),
        Column("rms", about="root mean square of the activation"),
        Column("spread", about="rms of the activation after the mean over the examples is taken away"),
        Column("gradient", about="rms of dL/d(activation)"),
        Column("dead", "%", "units that are zero for the whole batch, after a rectifier"),
        Column("saturated", "%", "activations at their limits"),
        Column("peaked", "%", "queries of attention with 97 % on a single key"),
        Column("drift", about="nats from the running statistics of a batch normalisation to the batch, median"),
    ),
    "noise": (
        Column("step", about="the second of the two"),
        Column("examples", about="in the batch of the step"),
        Column("gradient square", about="|G|², estimated from the gradients of two steps in a row"),
        Column("variance", about="tr(Σ), the variance of the gradient of one example"),
        Column("noise scale", about="tr(Σ) / |G|² in examples, averaged over looks"),
    ),
    "faults": (
        Column("step"),
        Column("fault"),
        Column("where"),
        Column("severity"),
        Column("evidence"),
        Column("remedy"),
    ),
    "notes": (Column("step"), Column("what"), Column("value", about="as it was noted: a loss, an accuracy")),
}


class Log:
    """The log of a watch. `note` adds a number of the user's own; `table` reads what there is, also while it grows.

    >>> log = Log()
    >>> log.add("notes", [(0, "loss", 2.3)])
    >>> log.table("notes").rows[0]["value"]
    2.3
    """

    def __init__(self, path: str | Path | None = None, meta: Mapping[str, str] | None = None):
        """A new log: in that file, which must not exist, or in memory."""
        if path is not None and Path(path).exists():
            raise WeightsError(f"{path} exists: choose another name for the log, or remove it")
        self.path = None if path is None else Path(path)
        self._base = _connect(str(path) if path is not None else ":memory:")
        self._waiting: dict[str, list[tuple[Any, ...]]] = {name: [] for name in TABLES}
        self._written = time.monotonic()
        self.noted = 0  # the step to which a note belongs
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
                    cells = (tuple(map(_to_cell, row)) for row in rows)
                    self._base.executemany(f'INSERT INTO "{name}" VALUES ({marks})', cells)
                    rows.clear()
        self._written = time.monotonic()

    def table(self, name: str, *, tensor: str | None = None) -> Table:
        """The table of that name, in the order of the steps; of one tensor if it is given.

        Raises UnknownNameError for a table or a tensor that is not there.
        """
        self.write()
        return _read(self._base, name, tensor, str(self.path or "in memory"))

    def close(self) -> None:
        """Write what waits and, if the log is a file, let go of it; a log in memory can still be read."""
        self.write()
        if self.path is not None:
            self._base.execute("PRAGMA journal_mode = DELETE")  # one file again


def watched(path: str | Path, name: str = "norms", *, tensor: str | None = None) -> Table:
    """A table of the log in that file, which a watch wrote or still writes: "steps", "norms", "notes", "tensors".

    Raises FormatError if the file is no log of a watch, UnknownNameError for a table or a tensor that is not there.
    """
    if not Path(path).is_file():
        raise FormatError("there is no such file", path=path)
    try:
        with closing(sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)) as base:
            if base.execute("SELECT value FROM meta WHERE name = 'steelyard.watch'").fetchone() != (str(VERSION),):
                raise FormatError("this log is of another version", path=path)
            return _read(base, name, tensor, str(path))
    except sqlite3.DatabaseError as error:
        raise FormatError(f"expected the log of a watch, an SQLite file: {error}", path=path) from error


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
            listed = ", ".join(f'"{c.name}" {_KINDS.get(c.name, "REAL")}' for c in columns)
            base.execute(f'CREATE TABLE "{name}" ({listed})')
        base.execute('CREATE TABLE "columns" ("table" TEXT, "column" TEXT, unit TEXT, about TEXT)')
        described = [(name, c.name, c.unit, c.about) for name, columns in TABLES.items() for c in columns]
        base.executemany('INSERT INTO "columns" VALUES (?, ?, ?, ?)', described)
        base.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT)")
        rows = {"steelyard.watch": str(VERSION), **meta}
        base.executemany("INSERT INTO meta VALUES (?, ?)", list(rows.items()))


def _number(what: str, value: Any) -> float:
    try:
        return float(value if isinstance(value, Real) else value.item())  # a tensor's item() asks for no gradient
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"note: {what} is no number and no tensor of one element: {error}") from error


def _to_cell(value: Any) -> Any:
    """SQLite has no NaN and makes it NULL, which stands for a number that there is not: written as text."""
    return "NaN" if value != value else value


def _from_cell(name: str, value: Any) -> Any:
    return math.nan if value == "NaN" and name not in _TEXT else value


def _read(base: sqlite3.Connection, name: str, tensor: str | None, where: str) -> Table:
    if name not in TABLES:
        raise UnknownNameError("table of a log", name, TABLES)
    columns = TABLES[name]
    chosen, values = "", ()
    if tensor is not None:
        known = [row[0] for row in base.execute('SELECT tensor FROM "tensors"')]
        if all(c.name != "tensor" for c in columns):
            raise UnknownNameError("table by tensor", name, [n for n, cs in TABLES.items() if Column("tensor") in cs])
        if tensor not in known:
            raise UnknownNameError("tensor in the log", tensor, known)
        chosen, values = "WHERE tensor = ?", (tensor,)
    found = base.execute(f'SELECT * FROM "{name}" {chosen} ORDER BY rowid', values)
    names = [c.name for c in columns]
    meta = dict(base.execute("SELECT name, value FROM meta"))
    rows = [{name: _from_cell(name, value) for name, value in zip(names, row, strict=True)} for row in found]
    return Table.of(f"watch, {name}", columns, rows, {**meta, "log": where})

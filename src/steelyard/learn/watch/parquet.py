"""A log as Parquet: a folder with a file for each table, units and meanings in the metadata of the columns.

Parquet cannot be appended to, so a watch writes SQLite, and this is made of it. Needs the package pyarrow, which only
this file imports.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steelyard.errors import FormatError, MissingExtraError, quoted
from steelyard.formats.base import Sink, replacing
from steelyard.learn.watch.reading import LogFile, Row
from steelyard.learn.watch.schema import INTEGER, TABLES, TEXT, VERSION, columns_of

MARK = b"steelyard.watch"  # the version of the log, in the metadata of each file


class _File(io.RawIOBase):
    """What pyarrow writes into, over a file that is replaced as a whole."""

    def __init__(self, sink: Sink):
        self._sink = sink

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._sink.write(data)


def _arrow() -> tuple[Any, Any]:
    """pyarrow, and its part for Parquet; raises MissingExtraError without them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("a log in Parquet", error.name or "?", "parquet") from error
    return pyarrow, pyarrow.parquet


def write(log: LogFile, folder: Path) -> list[Path]:
    """Write the tables of a log into a folder, piece by piece; the files, in the order of the tables."""
    _arrow()
    if folder.exists() and not folder.is_dir():
        raise FormatError("expected a folder to write Parquet files in, found a file; choose another name", path=folder)
    if not folder.parent.is_dir():
        raise FormatError(f"the folder {quoted(str(folder.parent))} is not there; create it first", path=folder)
    folder.mkdir(exist_ok=True)
    meta = log.meta
    return [_write(log, name, folder / f"{name}.parquet", meta) for name in TABLES]


def _write(log: LogFile, name: str, path: Path, meta: Mapping[str, str]) -> Path:
    pa, pq = _arrow()
    schema = _schema(pa, name, meta)
    with replacing(path) as sink, pq.ParquetWriter(_File(sink), schema) as writer:
        for rows in log.pieces(name):
            columns = zip(*rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return path


def _schema(pa: Any, name: str, meta: Mapping[str, str]) -> Any:
    kinds = {**dict.fromkeys(TEXT, pa.string()), **dict.fromkeys(INTEGER, pa.int64())}
    fields = [
        pa.field(c.name, kinds.get(c.name, pa.float64()), metadata={"unit": c.unit, "about": c.about})
        for c in columns_of(name)
    ]
    return pa.schema(fields, metadata={**meta, MARK.decode(): str(VERSION)})


class ParquetLog(LogFile):
    """A log in a folder of Parquet files."""

    def __init__(self, folder: Path):
        self.where, self._folder = str(folder), folder
        with self._opened("steps"):
            pass

    @property
    def meta(self) -> Mapping[str, str]:
        with self._opened("steps") as file:
            found = file.schema_arrow.metadata
        return {key.decode(): value.decode() for key, value in found.items() if not key.startswith(b"ARROW:")}

    def pieces(self, name: str, after: int = 0, tensor: str | None = None) -> Iterator[list[Row]]:
        names = [c.name for c in columns_of(name)]
        with self._opened(name) as file:
            missing = [n for n in names if n not in file.schema_arrow.names]
            if missing:
                raise FormatError(f"there is no column {quoted(missing[0])}", path=self._folder / f"{name}.parquet")
            for batch in file.iter_batches(columns=names):
                rows = list(zip(*(batch.column(n).to_pylist() for n in names), strict=True))
                skipped, after = rows[after:], max(after - len(rows), 0)
                yield _of(skipped, names, tensor)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        pa, pq = _arrow()
        path = self._folder / f"{name}.parquet"
        if not path.is_file():
            raise FormatError(f"expected the log of a watch, and there is no {path.name} in it", path=self._folder)
        try:
            with pq.ParquetFile(path) as file:
                if (file.schema_arrow.metadata or {}).get(MARK) != str(VERSION).encode():
                    raise FormatError("this is no table of a log, or of one of another version", path=path)
                yield file
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"expected a table of a log, a Parquet file: {error}", path=path) from error


def _of(rows: Sequence[Row], names: Sequence[str], tensor: str | None) -> list[Any]:
    if tensor is None:
        return list(rows)
    at = names.index("tensor")
    return [row for row in rows if row[at] == tensor]

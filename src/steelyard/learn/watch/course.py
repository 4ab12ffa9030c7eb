"""The course of a training, from its log: what there is to draw and to say, in tables that do not grow with it.

Decides how a course is thinned: into at most `BINS` stretches of as many steps each, whose number doubles when the
training outgrows them. Reads what is new only, so that it can be asked again and again while the log grows. Knows
nothing of torch, or of how anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.core.table import Cell, Column, Table
from steelyard.learn.watch.reading import LogFile, Row
from steelyard.learn.watch.schema import ENDED, TABLES, columns_of

BINS = 240
ROWS = 48  # of a table of layers over time; more are put together by the modules that hold them
SCALES = ("rms", "gradient")  # what a layer does, on a scale of decades ...
SHARES = ("dead", "saturated", "peaked", "drift")  # ... and on a plain one
COUNTS = ("rate", "gradient norm", "update ratio")  # of each step


class Binned:
    """Values by step and name: their mean, smallest and largest in each stretch; those that are not finite left out.

    log: means are geometric, and values that are not positive are left out.

    >>> losses = Binned(bins=2)
    >>> losses.add([0, 1, 2], ["loss"] * 3, [4.0, 2.0, 1.0])
    >>> losses.width, losses.mean().tolist()
    (2, [[3.0], [1.0]])
    """

    def __init__(self, *, log: bool = False, bins: int = BINS):
        self.names: dict[str, int] = {}
        self.width, self.bins, self.log = 1, bins, log
        self._sum = np.zeros((bins, 0))
        self._count = np.zeros((bins, 0))
        self._low, self._high = np.full((bins, 0), np.inf), np.full((bins, 0), -np.inf)
        self.steps = 0  # the last one, and 1

    def add(self, steps: Sequence[int], names: Sequence[str], values: Sequence[float | None]) -> None:
        """Values of some names at some steps, which are not before those added already, by more than a stretch."""
        step, value = np.array(steps, np.int64), np.array(values, float)  # None becomes NaN
        for name in dict.fromkeys(names):
            self.names.setdefault(name, len(self.names))
        column = np.array([self.names[name] for name in names], np.int64)
        if not step.size:
            return
        self._grow(int(step.max()) + 1)
        good = np.isfinite(value) & ((value > 0) | (not self.log))
        step, value, column = step[good], value[good], column[good]
        flat, value = step // self.width * len(self.names) + column, np.log10(value) if self.log else value
        for kept, found in (
            (self._sum, np.bincount(flat, value, self._sum.size)),
            (self._count, np.bincount(flat, minlength=self._sum.size)),
        ):
            kept += found.reshape(kept.shape)
        np.minimum.at(self._low.reshape(-1), flat, value)
        np.maximum.at(self._high.reshape(-1), flat, value)

    def _grow(self, steps: int) -> None:
        self.steps = max(self.steps, steps)
        new = len(self.names) - self._sum.shape[1]
        if new:
            empty = np.zeros((self.bins, new))
            self._sum, self._count = np.hstack([self._sum, empty]), np.hstack([self._count, empty])
            self._low, self._high = np.hstack([self._low, empty + np.inf]), np.hstack([self._high, empty - np.inf])
        while self.steps > self.width * self.bins:
            self.width *= 2
            self._sum, self._count = _paired(self._sum, np.add, 0.0), _paired(self._count, np.add, 0.0)
            self._low = _paired(self._low, np.minimum, np.inf)
            self._high = _paired(self._high, np.maximum, -np.inf)

    @property
    def starts(self) -> list[int]:
        """The first step of each stretch so far."""
        return list(range(0, self.steps, self.width))

    def mean(self) -> np.ndarray:
        """(stretches, names), NaN where there is nothing."""
        with np.errstate(invalid="ignore"):
            return self._out(self._sum / self._count)

    def low(self) -> np.ndarray:
        """The smallest, (stretches, names)."""
        return self._out(np.where(self._count > 0, self._low, np.nan))

    def high(self) -> np.ndarray:
        """The largest, (stretches, names)."""
        return self._out(np.where(self._count > 0, self._high, np.nan))

    def _out(self, x: np.ndarray) -> np.ndarray:
        x = x[: len(self.starts)]
        return np.power(10.0, x) if self.log else x


def _paired(x: np.ndarray, merge: Callable[..., Any], empty: float) -> np.ndarray:
    """Two rows in one, and as many empty ones behind them."""
    merged = merge(x[::2], x[1::2])
    return np.vstack([merged, np.full_like(merged, empty)])


class Course:
    """What a log says over time; `update` reads on, the rest are tables of what was read so far."""

    def __init__(self, log: LogFile, bins: int = BINS):
        self.log, self._bins = log, bins
        self.meta = {name: value for name, value in log.meta.items() if not name.startswith("steelyard.")}
        self._read = dict.fromkeys(TABLES, 0)  # rows of each table
        self.notes: dict[str, Binned] = {}
        self.counts = {name: Binned(log=True, bins=bins) for name in COUNTS}
        self.ratios = Binned(log=True, bins=bins)  # of the matrices, by tensor
        self.layers = {name: Binned(log=name in SCALES, bins=bins) for name in (*SCALES, *SHARES)}
        self.noise = Binned(log=True, bins=bins)
        self._tensors: dict[str, Row] = {}
        self._norms: dict[str, Row] = {}  # the last ones
        self._looked: dict[str, Row] = {}
        self._faults: list[Row] = []
        self._seconds: dict[int, float] = {}  # of the steps with faults
        self._first_notes: dict[str, float] = {}
        self._last_notes: dict[str, float] = {}
        self._step: Row | None = None  # the last row of steps

    def update(self) -> bool:
        """Read what is new; whether there was anything."""
        before = dict(self._read)
        for name, take in (
            ("tensors", self._take_tensors),
            ("faults", self._take_faults),
            ("steps", self._take_steps),
            ("norms", self._take_norms),
            ("layers", self._take_layers),
            ("noise", self._take_noise),
            ("notes", self._take_notes),
        ):
            for piece in self.log.pieces(name, self._read[name]):
                self._read[name] += len(piece)
                take(piece)
        return before != self._read

    @property
    def ended(self) -> bool:
        """Whether the watch has ended; False for one whose process was killed."""
        return ENDED in self.log.meta

    def _take_tensors(self, rows: Iterable[Row]) -> None:
        self._tensors |= {str(row[0]): row for row in rows}

    def _take_faults(self, rows: Sequence[Row]) -> None:
        self._faults += rows
        if self._step is not None:  # a fault may be written after its step was read
            self._seconds[self._step[0]] = self._step[1]

    def _take_steps(self, rows: Sequence[Row]) -> None:
        wanted = {row[0] for row in self._faults} - self._seconds.keys()
        self._seconds |= {row[0]: row[1] for row in rows if row[0] in wanted}
        steps = [row[0] for row in rows]
        for i, name in enumerate(COUNTS, 2):
            self.counts[name].add(steps, [name] * len(rows), [row[i] for row in rows])
        self._step = rows[-1]

    def _take_norms(self, rows: Sequence[Row]) -> None:
        wide = [row for row in rows if "x" in str(self._tensors[row[1]][1])]
        self.ratios.add([r[0] for r in wide], [r[1] for r in wide], [r[5] for r in wide])
        self._norms |= {str(row[1]): row for row in rows}

    def _take_layers(self, rows: Sequence[Row]) -> None:
        names = [c.name for c in columns_of("layers")]
        steps, layers = [row[0] for row in rows], [str(row[1]) for row in rows]
        for name, binned in self.layers.items():
            at = names.index(name)
            binned.add(steps, layers, [row[at] for row in rows])
        self._looked |= dict(zip(layers, rows, strict=True))

    def _take_noise(self, rows: Sequence[Row]) -> None:
        self.noise.add([row[0] for row in rows], ["noise scale"] * len(rows), [row[4] for row in rows])

    def _take_notes(self, rows: Sequence[Row]) -> None:
        for what in dict.fromkeys(str(row[1]) for row in rows):
            mine = [row for row in rows if row[1] == what]
            self._first_notes.setdefault(what, mine[0][2])
            self._last_notes[what] = mine[-1][2]
            binned = self.notes.setdefault(what, Binned(bins=self._bins))
            binned.add([row[0] for row in mine], [what] * len(mine), [row[2] for row in mine])

    # --- tables

    def summary(self) -> Table:
        """One row: how far, how fast, the first and the last of what was noted, the last rate and norms."""
        step, seconds, *counts = self._step or (None, None, None, None, None)
        columns = [Column("steps"), Column("tensors"), Column("time", "s"), Column("time of a step", "s")]
        row: dict[str, Cell] = {"steps": 0 if step is None else step + 1, "tensors": len(self._tensors)}
        row |= {"time": seconds, "time of a step": None if seconds is None else seconds / (step + 1)}
        for what, first in self._first_notes.items():
            columns += [Column(f"{what}, first"), Column(f"{what}, last")]
            row |= {f"{what}, first": first, f"{what}, last": self._last_notes[what]}
        units = {c.name: c.unit for c in columns_of("steps")}
        columns += [*(Column(name, units[name]) for name in COUNTS), Column("faults")]
        row |= dict(zip(COUNTS, counts, strict=True)) | {"faults": len(self._faults)}
        return self._table("watched", columns, [row])

    def faults(self) -> Table:
        """The faults that were named, with the time of their steps."""
        first, *others = columns_of("faults")
        columns = (first, Column("time", "s", "since the watch began"), *others)
        rows = [[row[0], self._seconds.get(row[0]), *row[1:]] for row in self._faults]
        return self._table("faults", columns, [_named(columns, row) for row in rows])

    def tensors(self) -> Table:
        """Each tensor, with its norms at the last step."""
        norms = columns_of("norms")[2:]
        columns = (*columns_of("tensors"), *norms)
        rows = [[*row, *self._norms.get(name, [None] * 6)[2:]] for name, row in self._tensors.items()]
        return self._table("tensors, last step", columns, [_named(columns, row) for row in rows])

    def looked(self) -> Table:
        """Each layer, as it was at its last look."""
        columns = columns_of("layers")
        columns = (*columns[1:], columns[0])
        rows = [[*row[1:], row[0]] for row in self._looked.values()]
        return self._table("layers, last look", columns, [_named(columns, row) for row in rows])

    def over_time(self, binned: Binned, name: str, unit: str = "") -> Table:
        """A row for each stretch of steps: the smallest, the mean and the largest value."""
        columns = [Column("step", about=f"the first of {binned.width}"), Column("lowest", unit)]
        columns += [Column(name, unit, "mean"), Column("highest", unit)]
        if not binned.names:
            return self._table(name, columns, [])
        parts = binned.starts, *(_cells(x[:, 0]) for x in (binned.low(), binned.mean(), binned.high()))
        return self._table(
            name, columns, [_named(columns, row) for row in zip(*parts, strict=True) if row[2] is not None]
        )

    def spread(self) -> Table:
        """A row for each stretch: how the update ratios of the matrices are spread."""
        columns = [Column("step"), *(Column(n, "x") for n in ("lowest", "25 %", "median", "75 %", "highest"))]
        found, rows = self.ratios.mean(), []
        for step, values in zip(self.ratios.starts, found, strict=True):
            values = values[np.isfinite(values)]
            if values.size:
                rows.append(_named(columns, [step, *np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()]))
        return self._table("update ratio of the matrices", columns, rows)

    def by_layer(self, binned: Binned, name: str, unit: str = "") -> Table:
        """A row for each layer and stretch of steps; of more than `ROWS` layers, for each module that holds some."""
        columns = [Column("step"), Column("layer"), Column(name, unit)]
        found, groups = binned.mean(), grouped(list(binned.names))
        rows = []
        for group, members in groups.items():
            values = found[:, [binned.names[m] for m in members]]
            rows += [
                {"step": step, "layer": group, name: mean}
                for step, mean in zip(binned.starts, _means(values, binned), strict=True)
                if mean is not None
            ]
        return self._table(f"{name} by layer", columns, rows)

    def shares(self, name: str) -> Table:
        """A row for each look and each layer that has that share, if it was ever above zero."""
        binned = self.layers[name]
        unit = next(c.unit for c in columns_of("layers") if c.name == name)
        table = self.by_layer(binned, name, unit)
        some = {row["layer"] for row in table.rows if row[name]}
        return self._table(table.title, table.columns, [row for row in table.rows if row["layer"] in some])

    def _table(self, title: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> Table:
        return Table.of(title, columns, rows, self.meta)


def grouped(names: Sequence[str], most: int = ROWS) -> dict[str, list[str]]:
    """The names, each alone; if there are more than `most`, by what comes before their last dots.

    >>> grouped(["h.0.q", "h.0.k", "h.1.q", "h.1.k"], most=2)
    {'h.0': ['h.0.q', 'h.0.k'], 'h.1': ['h.1.q', 'h.1.k']}
    """
    depth = max((name.count(".") + 1 for name in names), default=1)
    groups = {name: [name] for name in names}
    while len(groups) > most and depth > 1:
        depth -= 1
        groups = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return groups


def _means(values: np.ndarray, binned: Binned) -> list[float | None]:
    """The mean of each row, geometric where the others are, of what is known."""
    known = np.isfinite(values)
    filled = np.where(known, values, 1.0)
    count = known.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if binned.log:
            return _cells(np.power(10.0, np.where(known, np.log10(filled), 0).sum(1) / count))
        return _cells(np.where(known, filled, 0).sum(1) / count)


def _cells(values: np.ndarray) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def _named(columns: Sequence[Column], row: Iterable[Any]) -> dict[str, Any]:
    return dict(zip((c.name for c in columns), row, strict=True))

"""A column of a table from the other columns: classification or regression on a CSV file.

Decides the types of the columns, their encoding and the splits. Knows nothing of models but their names.
"""

from __future__ import annotations

import csv as reader
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from steelyard.errors import ModelError, UnknownNameError, printable, quoted
from steelyard.learn.data import Examples, stratified
from steelyard.learn.measures import absolute_error, accuracy, cross_entropy, squared_error
from steelyard.learn.models import model as build
from steelyard.learn.task import SPLITS, Interface, Split, Task

Kind = Literal["auto", "classification", "regression"]
MOST_VALUES = 50  # of a column of text: each becomes an input of its own


@dataclass(frozen=True)
class Frame:
    """The cells of a table as text, and the line of the file on which each row begins."""

    path: str
    names: tuple[str, ...]
    cells: np.ndarray  # (rows, columns) of text
    lines: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What is to be predicted from what."""

    frame: Frame
    target: str
    wanted: np.ndarray  # (rows,) of text
    inputs: np.ndarray  # (rows, features) float32
    features: tuple[str, ...]
    rows: dict[Split, np.ndarray]

    @property
    def name(self) -> str:
        return f"csv:{Path(self.frame.path).name}:{self.target}"


def csv(
    *,
    path: str,
    target: str,
    seed: int = 0,
    batch_size: int = 32,
    model: str = "mlp",
    kind: Kind = "auto",
) -> Task:
    """Predict the column ``target`` of a CSV file with a header line from all its other columns.

    A column of numbers is standardised (by the training rows); a column of text is one-hot, in the order of its
    sorted values. A target of text, or of at most 20 different whole numbers, is a class ("auto");
    otherwise it is a number, and its standardised value is learned. Raises ModelError, naming line and column,
    for a missing file, a ragged row, an empty cell, text amid numbers, names that hardly repeat or a target of one
    class, and UnknownNameError for a target that is no column.
    """
    frame = _read(path)
    if target not in frame.names:
        raise UnknownNameError("column", target, frame.names)
    wanted = frame.cells[:, frame.names.index(target)]
    classification = _is_classes(wanted, kind, frame, target)
    if classification and len(set(wanted.tolist())) < 2:
        raise ModelError(
            f"{printable(path)}: the column {quoted(target)} is {quoted(str(wanted[0]))} in every row, nothing to tell "
            "apart: expected at least two classes, choose another target"
        )
    labels = np.unique(wanted, return_inverse=True)[1] if classification else np.zeros(len(wanted), np.int64)
    rows = stratified(labels, seed)
    _enough(frame, rows)
    inputs, features = _inputs(frame, target, rows["train"])
    if not features:
        raise ModelError(f"{printable(path)}: {quoted(target)} is the only column, nothing to predict it from")
    problem = Problem(frame, target, wanted, inputs, tuple(features), rows)
    return (_classification if classification else _regression)(problem, seed, batch_size, model)


def _classification(problem: Problem, seed: int, batch_size: int, model: str) -> Task:
    classes = sorted(np.unique(problem.wanted).tolist(), key=_natural)
    labels = np.array([classes.index(value) for value in problem.wanted], np.int64)
    interface = Interface((len(problem.features),), len(classes))
    data = _examples(problem, labels, seed, batch_size)
    return Task(
        name=problem.name,
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=interface,
        classes=tuple(classes),
        features=problem.features,
        about={"seed": seed, "file": problem.frame.path, "target": problem.target, "examples": data.sizes},
    )


def _regression(problem: Problem, seed: int, batch_size: int, model: str) -> Task:
    values = np.array(_numbers(problem.wanted), np.float64)
    mean, spread = values[problem.rows["train"]].mean(), values[problem.rows["train"]].std() or 1.0
    interface = Interface((len(problem.features),), 1)
    data = _examples(problem, ((values - mean) / spread).astype(np.float32), seed, batch_size)
    return Task(
        name=problem.name,
        build=partial(build, model, interface),
        batches=data,
        loss=squared_error,
        metrics={"squared error": squared_error, "absolute error": absolute_error},
        interface=interface,
        features=problem.features,
        lower_is_better=("squared error", "absolute error"),
        about={"seed": seed, "file": problem.frame.path, "target": problem.target, "examples": data.sizes}
        | {"mean": float(mean), "spread": float(spread)},  # of the target: errors are in units of the spread
    )


def _read(path: str) -> Frame:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = reader.reader(file, strict=True)
            found = [(lines.line_num, row) for row in lines if row]
    except OSError as error:
        raise ModelError(f"{printable(path)}: {error.strerror or error}: give the path of a CSV file") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{printable(path)}: not UTF-8 at byte {error.start}: convert it to UTF-8 first") from error
    except reader.Error as error:
        raise ModelError(f"{printable(path)}, line {lines.line_num}: {error}") from error
    if len(found) < 2:
        raise ModelError(f"{printable(path)}: expected a header line and rows, found {len(found)} lines")
    names = tuple(name.strip() for name in found[0][1])
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{printable(path)}, line 1: the column {quoted(twice)} is named twice")
    for line, row in found[1:]:
        _check_row(path, line, row, names)
    cells = np.array([[cell.strip() for cell in row] for _, row in found[1:]])
    return Frame(path, names, cells, tuple(line for line, _ in found[1:]))


def _check_row(path: str, line: int, row: Sequence[str], names: Sequence[str]) -> None:
    where = f"{printable(path)}, line {line}"
    if len(row) != len(names):
        raise ModelError(f"{where}: expected {len(names)} cells, found {len(row)}")
    for name, cell in zip(names, row, strict=True):
        if not cell.strip():
            raise ModelError(f"{where}: the column {quoted(name)} is empty: fill it in, or leave the row out")


def _is_classes(wanted: np.ndarray, kind: Kind, frame: Frame, target: str) -> bool:
    if kind not in ("auto", "classification", "regression"):
        raise UnknownNameError("kind of target", str(kind), ("auto", "classification", "regression"))
    if kind == "auto":
        _check_amid_numbers(frame, target, "give kind='classification' if it is the name of a class")
    numbers = _numbers(wanted)
    if kind == "regression" and numbers is None:
        row = next(i for i, cell in enumerate(wanted) if _number(cell) is None)
        raise ModelError(
            f"{printable(frame.path)}, line {frame.lines[row]}: the column {quoted(target)} is "
            f"{quoted(str(wanted[row]))}, expected a number"
        )
    if kind != "auto":
        return kind == "classification"
    return numbers is None or (len(set(numbers)) <= 20 and all(number.is_integer() for number in numbers))


def _inputs(frame: Frame, target: str, train: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(rows, features) float32 and the name of each feature."""
    columns: list[np.ndarray] = []
    features: list[str] = []
    for index, name in enumerate(frame.names):
        if name == target:
            continue
        cells = frame.cells[:, index]
        numbers = _numbers(cells)
        if numbers is not None:
            column = np.array(numbers)
            columns.append((column - column[train].mean()) / (column[train].std() or 1.0))
            features.append(name)
            continue
        _check_amid_numbers(frame, name, "if the values are names, let none of them be a number")
        values = np.unique(cells).tolist()
        _check_repeats(frame, name, len(values))
        for value in values:
            columns.append((cells == value).astype(np.float64))
            features.append(f"{name}={value}")
    return np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(frame.cells), 0)), features


def _check_amid_numbers(frame: Frame, name: str, otherwise: str) -> None:
    """Raise ModelError at the first cell that is no finite number, if half of the column or more are numbers."""
    cells = frame.cells[:, frame.names.index(name)].tolist()
    wrong = [row for row, cell in enumerate(cells) if _number(cell) is None]
    rows = f"{len(cells) - len(wrong)} of {len(cells)} rows"
    if wrong and 2 * sum(map(_reads_as_number, cells)) >= len(cells):
        raise ModelError(
            f"{printable(frame.path)}, line {frame.lines[wrong[0]]}: the column {quoted(name)} is "
            f"{quoted(cells[wrong[0]])}, expected a finite number as in {rows}: "
            f"correct it, or leave the row out; {otherwise}"
        )


def _check_repeats(frame: Frame, name: str, different: int) -> None:
    """Raise ModelError for a column of text with too many values, or nearly as many as rows, to learn from."""
    if different > MOST_VALUES or (different > 10 and different > 0.9 * len(frame.cells)):
        raise ModelError(
            f"{printable(frame.path)}: the column {quoted(name)} has {different} different texts in "
            f"{len(frame.cells)} rows, expected names that repeat, at most {MOST_VALUES}: leave the column out, "
            "or join its values into groups"
        )


def _enough(frame: Frame, rows: dict[Split, np.ndarray]) -> None:
    if any(not len(rows[split]) for split in SPLITS):
        raise ModelError(
            f"{printable(frame.path)}: {len(frame.cells)} rows are too few to train, search and prove: "
            "give at least 7 rows (of each class)"
        )


def _examples(problem: Problem, targets: np.ndarray, seed: int, batch_size: int) -> Examples:
    x = {split: torch.from_numpy(problem.inputs[problem.rows[split]]) for split in SPLITS}
    y = {split: torch.from_numpy(targets[problem.rows[split]]) for split in SPLITS}
    return Examples(x, y, batch_size, seed)


def _numbers(cells: np.ndarray) -> list[float] | None:
    """The cells as finite numbers; None if one of them is none."""
    found = [_number(cell) for cell in cells]
    numbers = [number for number in found if number is not None]
    return numbers if len(numbers) == len(found) else None


def _reads_as_number(cell: str) -> bool:
    """Whether it is spelled as a number, nan and infinity included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _natural(value: str) -> tuple[float, str]:
    """Numbers by size before text by spelling."""
    number = _number(value)
    return (math.inf if number is None else number), value

"""Repeated layers in one row, so that a model of 90,000 tensors stays readable: ``layers.{0..31}.mlp.up.weight``.

Decides which tensors are repetitions of each other: those whose names differ in whole numbers only, with one shape,
dtype and way of being held. Reads no value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steelyard.core.spec import Spec
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.errors import UnknownNameError
from steelyard.explain.inventory import COUNTS, SORTS, Sums, held

ROWS = 200  # that a person reads; with more, the smallest are added up
KINDS = 20_000  # of tensors that are told apart: a hostile file has a million
_NUMBER = re.compile(r"(?<![^\W_])(\d+)(?![^\W_])")  # not the 2 of conv2d: a number between dots or underscores


@dataclass
class _Group:
    """Tensors that repeat each other."""

    texts: tuple[str, ...]  # what stands around the numbers of the name
    spec: Spec
    held: str
    numbers: list[dict[str, None]]  # the numbers at each place, in order of appearance
    sums: Sums = field(default_factory=Sums)

    def row(self) -> dict[str, Any]:
        """The row of the table."""
        name = self.texts[0] + "".join(map("".join, zip(map(spans, self.numbers), self.texts[1:], strict=True)))
        row = {"name": name, "tensors": self.sums.tensors, "shape": self.spec.shape, "dtype": self.spec.dtype.name}
        return {**row, **self.sums.sizes(), "held": self.held}


def repeats(weights: Weights, where: Where | None = None, sort: str | None = None, rows: int = ROWS) -> Table:
    """One row for each set of tensors that repeat each other, and no more than `rows` and one for the rest.

    >>> import numpy as np
    >>> w = Weights.of({f"layers.{i}.up.weight": np.zeros((2, 3), np.float32) for i in range(32)})
    >>> row = repeats(w).rows[0]
    >>> row["name"], row["tensors"], row["elements"]
    ('layers.{0..31}.up.weight', 32, 192)

    ``sort`` is a key of SORTS, by the sums of a row; None keeps the order of the file.
    Raises WeightsError if no tensor matches ``where``, UnknownNameError for another ``sort``.
    """
    if sort is not None and sort not in SORTS:
        raise UnknownNameError("order", sort, SORTS)
    groups, others, rest = _groups(weights.choose(where).values())
    shown, smaller = _largest(groups, rows)
    for group in smaller:
        rest.join(group.sums)
    table = [group.row() for group in shown]
    if sort is not None:
        table.sort(key=lambda row: row[sort] if sort in ("name", "dtype") else -(row[sort] or 0))
    if rest.tensors:
        table.append({"name": f"({others + len(smaller)} others)", "tensors": rest.tensors, **rest.sizes()})
    columns = [Column("name", "", "{0..31}: the numbers at this place"), Column("tensors")]
    columns += [Column("shape"), Column("dtype"), *COUNTS, Column("held", "", "how it is encoded")]
    return Table.of("tensors, repeated layers in one row", columns, table)


def _groups(items: Iterable[Weight]) -> tuple[list[_Group], int, Sums]:
    """The groups in order of appearance; of how many kinds the tensors are that have none, and their sums."""
    groups: dict[tuple[tuple[str, ...], Spec, str], _Group] = {}
    others, rest = 0, Sums()
    for item in items:
        pieces = _NUMBER.split(item.name)
        key = (tuple(pieces[::2]), item.spec, "plain" if item.scheme is None else held(item.scheme))
        group = groups.get(key)
        if group is None and len(groups) >= KINDS:
            others += 1
            rest.add(item)
            continue
        if group is None:
            group = groups[key] = _Group(*key, [{} for _ in pieces[1::2]])
        group.sums.add(item)
        for place, number in zip(group.numbers, pieces[1::2], strict=True):
            place[number] = None
    return list(groups.values()), others, rest


def _largest(groups: list[_Group], count: int) -> tuple[list[_Group], list[_Group]]:
    """The `count` groups of the most bytes in the order in which they stand, and the others."""
    if len(groups) <= count:
        return groups, []
    order = sorted(range(len(groups)), key=lambda i: -groups[i].sums.bytes)
    large = set(order[:count])
    return [g for i, g in enumerate(groups) if i in large], [g for i, g in enumerate(groups) if i not in large]


def spans(numbers: Iterable[str]) -> str:
    """Numbers at one place of a name as a person writes them: one as it is, several in braces.

    >>> spans(["7"]), spans(["0", "1", "2", "9"]), spans(map(str, range(0, 90, 9)))
    ('7', '{0..2,9}', '{0..81: 10 numbers}')
    """
    texts = list(dict.fromkeys(numbers))
    if len(texts) == 1:
        return texts[0]
    values = sorted({int(text[:18]) for text in texts})
    runs: list[list[int]] = []
    for n in values:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    if len(runs) > 4:
        return f"{{{values[0]}..{values[-1]}: {len(texts)} numbers}}"
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"

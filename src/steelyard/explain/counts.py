"""How many weights there are, and of which kind: the measure of a model's scale.

Counts tensors as they are, from a module or from the header of a file; reads values only for `active`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from steelyard.core.table import Column, Table


def counts(model: nn.Module) -> Table:
    """One row for each child of a model, and the total: unique, tied, trainable, frozen, buffered, active.

    unique = numbers in parameters, each tensor once; tied = numbers that further names of a tensor would
    add; trainable + frozen = unique; buffered = numbers in buffers (running statistics, positions); active =
    trainable or frozen numbers that are not zero. A tensor that two children share belongs to the first.

    >>> row = counts(nn.Linear(3, 2)).rows[-1]
    >>> row["part"], row["unique"], row["trainable"], row["tied"]
    ('total', 8, 8, 0)
    """
    seen: set[int] = set()
    children = list(model.named_children())
    own = (*model.parameters(recurse=False), *model.buffers(recurse=False))
    rows = [_row("(own)", own, own, seen)] if own else []
    for name, child in children:
        rows.append(_row(name, _tensors(child, unique=True), _tensors(child, unique=False), seen))
    total = {
        key: sum(row[key] for row in rows) for key in ("unique", "tied", "trainable", "frozen", "buffered", "active")
    }
    columns = [
        Column("part"),
        Column("unique", about="numbers in parameters, each tensor once"),
        Column("tied", about="numbers that second names would add"),
        *(Column("trainable"), Column("frozen"), Column("buffered", about="numbers in buffers")),
        Column("active", about="parameters that are not zero"),
    ]
    return Table.of("weights", columns, [*rows, {"part": "total", **total}])


def _tensors(module: nn.Module, unique: bool) -> list[Any]:
    parameters = module.named_parameters(remove_duplicate=unique)
    return [*(p for _, p in parameters), *(b for _, b in module.named_buffers(remove_duplicate=unique))]


def _row(part: str, once: Iterable[Any], every: Iterable[Any], seen: set[int]) -> dict[str, Any]:
    kinds = ("unique", "tied", "trainable", "frozen", "buffered", "active")
    row: dict[str, Any] = {"part": part, **dict.fromkeys(kinds, 0)}
    named = 0
    for tensor in once:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = tensor.numel()
        if not isinstance(tensor, nn.Parameter):
            row["buffered"] += size
            continue
        named += size
        row["unique"] += size
        row["trainable" if tensor.requires_grad else "frozen"] += size
        row["active"] += int(tensor.count_nonzero())
    row["tied"] = sum(t.numel() for t in every if isinstance(t, nn.Parameter)) - named
    return row

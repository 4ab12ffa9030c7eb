"""What there is: tables of names, shapes, types and sizes, from the header alone. No value is read.

Bytes are those of the plain values; stored bytes are those that the file spends on the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from steelyard.core.packed import Codec, Plan, Scheme, Smallest
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights, given
from steelyard.core.where import Where
from steelyard.errors import RecipeError, UnknownNameError

SORTS: dict[str, Callable[[Weight], Any]] = {
    "name": lambda w: w.name,
    "elements": lambda w: -w.spec.size,
    "bytes": lambda w: -w.spec.nbytes,
    "stored": lambda w: -(w.stored or 0),
    "dtype": lambda w: w.spec.dtype.name,
}

COUNTS = (
    Column("elements", "", "numbers in the tensor; a tied tensor counts once"),
    Column("bytes", "B", "of the plain values"),
    Column("stored", "B", "in the file"),
)


@dataclass
class Sums:
    """Sums over tensors, one at a time; the stored bytes are unknown where those of one are."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0
    stored: int | None = 0

    def add(self, item: Weight) -> Sums:
        """Count one more tensor."""
        self.tensors += 1
        self.elements += item.spec.size
        self.bytes += item.spec.nbytes
        self.stored = None if self.stored is None or item.stored is None else self.stored + item.stored
        return self

    def join(self, other: Sums) -> None:
        """Add other sums to these."""
        self.tensors += other.tensors
        self.elements += other.elements
        self.bytes += other.bytes
        self.stored = None if self.stored is None or other.stored is None else self.stored + other.stored

    def sizes(self) -> dict[str, int | None]:
        """The cells of the columns COUNTS."""
        return {"elements": self.elements, "bytes": self.bytes, "stored": self.stored}


def inventory(weights: Weights, where: Where | None = None, depth: int | None = None, sort: str | None = None) -> Table:
    """One row for each tensor, or for each dotted prefix of ``depth`` components.

    >>> import numpy as np
    >>> w = Weights.of({"a.weight": np.zeros((2, 3), np.float32), "a.bias": np.zeros(2, np.float32)})
    >>> inventory(w, sort="elements").column("name")
    ['a.weight', 'a.bias']
    >>> inventory(w, depth=1).rows[0]["elements"]
    8

    ``sort`` is a key of SORTS (sizes: largest first); None keeps the order of the file.
    Raises WeightsError if no tensor matches ``where``, UnknownNameError for another ``sort``.
    """
    chosen = given(weights).choose(where)
    if sort is not None and sort not in SORTS:
        raise UnknownNameError("order", sort, SORTS)
    if depth is not None:
        return _grouped(chosen.values(), depth, sort)
    items = list(chosen.values())
    if sort is not None:
        items.sort(key=SORTS[sort])
    aliases: dict[str, list[str]] = {}
    for alias, name in chosen.ties.items():
        aliases.setdefault(name, []).append(alias)
    columns = [Column("name"), Column("shape"), Column("dtype"), *COUNTS, Column("held", "", "how it is encoded")]
    if aliases:
        columns.append(Column("also", "", "further names of the same tensor"))
    rows = []
    for item in items:
        row = {"name": item.name, "shape": item.spec.shape, "dtype": item.spec.dtype.name, **Sums().add(item).sizes()}
        row["held"] = held(item.scheme)
        rows.append(row | ({"also": ", ".join(aliases.get(item.name, []))} if aliases else {}))
    return Table.of("tensors", columns, rows)


def kinds(weights: Weights, where: Where | None = None) -> Table:
    """One row for each pair of a dtype and an outermost codec, in order of appearance."""
    groups: dict[tuple[str, str], Sums] = {}
    for item in weights.choose(where).values():
        groups.setdefault((item.spec.dtype.name, _outermost(item.scheme)), Sums()).add(item)
    columns = [Column("dtype"), Column("held", "", "the outermost codec"), Column("tensors"), *COUNTS]
    rows = [{"dtype": d, "held": h, "tensors": g.tensors, **g.sizes()} for (d, h), g in groups.items()]
    return Table.of("kinds", columns, rows)


def summary(weights: Weights, where: Where | None = None, file: int | None = None) -> Table:
    """The totals, in one row; `file` is the size of all files in bytes, where there are any.

    >>> import numpy as np
    >>> row = summary(Weights.of({"a": np.zeros((2, 3), np.float16)})).rows[0]
    >>> row["tensors"], row["elements"], row["bytes"], row["stored"]
    (1, 6, 12, None)
    """
    chosen = weights.choose(where)
    sums = Sums()
    for item in chosen.values():
        sums.add(item)
    sizes = sums.sizes()
    stored, known = sizes["stored"], sizes["stored"] is not None
    columns = [
        Column("tensors"),
        Column("ties", "", "further names of a tensor"),
        *COUNTS,
        *([] if file is None else [Column("file", "B", "the whole file, or all of them: headers and everything")]),
        Column("ratio", "x", "bytes of the plain values over stored bytes"),
        Column("bits per element", "", "stored bits over elements"),
    ]
    row = {"tensors": len(chosen), "ties": len(chosen.ties), **sizes}
    row |= {} if file is None else {"file": file}
    row["ratio"] = sizes["bytes"] / stored if known and stored else None
    row["bits per element"] = 8 * stored / sizes["elements"] if known and sizes["elements"] else None
    return Table.of("total", columns, [row])


def _outermost(plan: Plan) -> str:
    if isinstance(plan, Smallest):
        return "smallest"
    codec = plan.codec if isinstance(plan, Scheme) else plan
    return "plain" if codec is None else codec.name


def held(plan: Plan) -> str:
    """How a tensor is held, as the call that ``--codec`` reads; parts that are plain by default are left out.

    >>> held(None)
    'plain'
    """
    from steelyard.core.recipe import to_data

    if not isinstance(plan, (Scheme, Codec)):
        return _call(to_data(plan) or "plain")
    codec, parts = (plan.codec, plan.parts) if isinstance(plan, Scheme) else (plan, {})
    data = to_data(codec)
    name, settings = (data, {}) if isinstance(data, str) else next(iter(data.items()))
    said = {part: held(below) for part, below in parts.items() if below is not None or part in codec.inner}
    words = [f"{key}={_call(value)}" for key, value in settings.items()]
    words += [f"{part}={below}" for part, below in said.items()]
    return f"{name}({', '.join(words)})" if words else str(name)


def _call(data: Any) -> str:
    if isinstance(data, dict):
        ((name, settings),) = data.items()
        if isinstance(settings, list):
            return f"{name}({', '.join(map(_call, settings))})"
        return f"{name}({', '.join(f'{key}={_call(value)}' for key, value in settings.items())})"
    return data if isinstance(data, str) else repr(data)


def _grouped(items: Iterable[Weight], depth: int, sort: str | None) -> Table:
    if depth < 1:
        raise RecipeError(f"a depth is a number of name components, at least 1, not {depth}")
    groups: dict[str, Sums] = {}
    dtypes: dict[str, dict[str, None]] = {}
    for item in items:
        name = ".".join(item.name.split(".")[:depth])
        groups.setdefault(name, Sums()).add(item)
        dtypes.setdefault(name, {})[item.spec.dtype.name] = None
    columns = [Column("name", "", f"the first {depth} components"), Column("tensors"), Column("dtype"), *COUNTS]
    rows = [
        {"name": name, "tensors": group.tensors, "dtype": " ".join(dtypes[name]), **group.sizes()}
        for name, group in groups.items()
    ]
    if sort is not None:
        rows.sort(key=lambda row: row[sort] if sort in ("name", "dtype") else -(row[sort] or 0))
    return Table.of("groups", columns, rows)

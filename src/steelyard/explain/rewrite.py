"""A file through a step into another file, with an account of what it cost: bytes measured on disk, and the error.

Decides what the account compares: the source and the target, both as they are read back. Whichever step it
is, names may change but not the number or the order of the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steelyard import formats
from steelyard.core.table import Column, Table
from steelyard.core.transform import Transform, on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.errors import WeightsError
from steelyard.explain.inventory import choose, held
from steelyard.formats.base import check_target

if TYPE_CHECKING:
    import numpy as np


def rewrite(
    source: str | Path, target: str | Path, step: Transform, where: Where | None = None, force: bool = False
) -> list[Table]:
    """Apply `step` to the tensors of `source` that `where` chooses, write `target`, and return `account`.

    Raises FormatError where `target` is `source`, or exists and `force` is off; whatever goes wrong, no file
    is left half-written and none is lost. Raises WeightsError if no tensor matches.
    """
    source, target = Path(source), Path(target)
    before = formats.open(source)
    check_target(target, source, force=force)
    choose(before, where)
    formats.write((on(where, step) if where else step)(before), target)
    after = formats.open(target)
    return account(before, after, files=(source.stat().st_size, target.stat().st_size))


def account(before: Weights, after: Weights, files: tuple[int, int] | None = None) -> list[Table]:
    """What became of every tensor, and of all of them together; the tensors are paired by position.

    The error is ||after - before|| / ||before|| in the Euclidean norm, 0 where nothing changed; the zeros are
    the fraction of elements of `after` that are 0. ``files`` are the bytes of both files, where there are any.
    One pair of tensors is in memory at a time. Raises WeightsError if the numbers or shapes differ.

    >>> import numpy as np
    >>> a, b = (Weights.of({"w": np.float32([3, x])}) for x in (4, 0))
    >>> tensors, total = account(a, b)
    >>> tensors.rows[0]["error"], tensors.rows[0]["zeros"]
    (0.8, 0.5)
    """
    if len(before) != len(after):
        raise WeightsError(f"there were {len(before)} tensors, and there are {len(after)}: they cannot be compared")
    pairs = [(a, b, _compare(a, b)) for a, b in zip(before.values(), after.values(), strict=True)]
    columns = [
        Column("name"),
        Column("shape"),
        Column("before", "B", "in the source file"),
        Column("after", "B", "in the target file"),
        Column("ratio", "x", "before over after"),
        Column("zeros", "%", "elements that are 0"),
        Column("error", "", "relative Euclidean distance to the source"),
        Column("held", "", "how the tensor is encoded"),
    ]
    rows = [
        {
            "name": b.name,
            "shape": b.spec.shape,
            "before": a.stored,
            "after": b.stored,
            "ratio": _ratio(a.stored, b.stored),
            "zeros": found.zeros / max(b.spec.size, 1),
            "error": found.error,
            "held": held(b.scheme),
        }
        for a, b, found in pairs
    ]
    return [Table.of("tensors", columns, rows), _total([found for _, _, found in pairs], after.size, files)]


@dataclass(frozen=True)
class _Found:
    """Sums over one pair of tensors."""

    zeros: int  # elements of the second that are 0
    distance: float  # sum of |b - a|^2
    norm: float  # sum of |a|^2

    @property
    def error(self) -> float:
        if self.distance == 0:
            return 0.0
        return (self.distance / self.norm) ** 0.5 if self.norm else float("inf")


def _compare(a: Weight, b: Weight) -> _Found:
    import numpy as np

    if a.spec.shape != b.spec.shape:
        raise WeightsError(f"{b.origin}: {b.name!r} is {b.spec}, and was {a.spec}: they cannot be compared")
    x, y = _wide(a), _wide(b)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, y - x)
        finite = np.where(np.isfinite(x), x, 0)
    return _Found(int(np.count_nonzero(y == 0)), _squares(difference), _squares(finite))


def _wide(weight: Weight) -> np.ndarray:
    import numpy as np

    return weight.array().astype(np.complex128 if weight.spec.dtype.kind == "complex" else np.float64)


def _squares(x: np.ndarray) -> float:
    import numpy as np

    return float(np.sum(np.abs(x) ** 2))


def _total(found: list[_Found], size: int, files: tuple[int, int] | None) -> Table:
    columns = [
        Column("tensors"),
        Column("changed", "", "tensors whose values differ from the source"),
        Column("zeros", "%", "elements that are 0"),
        Column("error", "", "relative Euclidean distance over all tensors"),
        Column("file before", "B", "the whole file on disk"),
        Column("file after", "B", "the whole file on disk"),
        Column("ratio", "x", "before over after"),
    ]
    whole = _Found(sum(f.zeros for f in found), sum(f.distance for f in found), sum(f.norm for f in found))
    before, after = files or (None, None)
    row = {
        "tensors": len(found),
        "changed": sum(f.distance != 0 for f in found),
        "zeros": whole.zeros / max(size, 1),
        "error": whole.error,
        "file before": before,
        "file after": after,
        "ratio": _ratio(before, after),
    }
    return Table.of("total", columns, [row])


def _ratio(before: int | None, after: int | None) -> float | None:
    return before / after if before is not None and after else None

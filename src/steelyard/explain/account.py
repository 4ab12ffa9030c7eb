"""What became of tensors on their way from one file into another: bytes, and the error where there can be one.

Decides what the account compares, the source and the target as both are read back, and that nothing is read
where no value can have changed. Knows nothing of how the target was made. Whichever step it was, names may
change; where the number of the tensors changes, none of them can be told by its source.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steelyard.core.packed import Codec, Plan, Scheme, Smallest
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.errors import WeightsError, quoted
from steelyard.explain.inventory import held

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 18  # elements that are compared at a time


def account(
    before: Weights,
    after: Weights,
    files: tuple[int | None, int | None] | None = None,
    *,
    values: bool = True,
    verified: int | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[Table]:
    """What became of every tensor, and of all of them together; the tensors are paired by position.

    The error is ||after - before|| / ||before|| in the Euclidean norm, 0 where nothing changed; the zeros are
    the fraction of elements of `after` that are 0. What is NaN or infinite in `after` is told, and so are the lossy
    codecs: those of tensors that changed, and those of `before`, of which the error is not measured here. Without
    ``values`` none of this is known, nothing is read, and the numbers of tensors may differ. ``files`` are the bytes of
    both files, where there are any; ``verified`` is the number of tensors that were read back and compared with what
    was to be written, where they were; ``tell`` is called with the numbers of bytes that were compared. A block of two
    tensors is in memory at a time, where their files allow it. Raises WeightsError if numbers or shapes differ and so
    cannot be compared.

    >>> import numpy as np
    >>> a, b = (Weights.of({"w": np.float32([3, x])}) for x in (4, 0))
    >>> tensors, total = account(a, b)
    >>> tensors.rows[0]["error"], tensors.rows[0]["zeros"]
    (0.8, 0.5)
    """
    if values and len(before) != len(after):
        raise WeightsError(f"there were {len(before)} tensors, and there are {len(after)}: they cannot be compared")
    sources: list[Weight | None] = list(before.values()) if len(before) == len(after) else [None] * len(after)
    pairs = list(zip(sources, after.values(), strict=True))
    found = [_compare(a, b, tell) if values and a is not None else None for a, b in pairs]
    rows = [_row(a, b, one) for (a, b), one in zip(pairs, found, strict=True)]
    columns = [*_COLUMNS, *([_ODD] if any(one and one.odd for one in found) else [])]
    told = [one for one in found if one]
    total = _total(after, told, files, values, verified, _lossy(pairs, found))
    return [Table.of("tensors", columns, rows), total]


def exact(before: Weights, after: Weights) -> bool:
    """Whether no value can have changed, as far as dtypes and codecs tell; the tensors are paired by position.

    >>> import numpy as np
    >>> a, b = Weights.of({"w": np.float16([1])}), Weights.of({"w": np.float32([1])})
    >>> exact(a, b), exact(b, a)
    (True, False)
    """
    return len(before) == len(after) and all(map(_exact, before.values(), after.values()))


def _exact(a: Weight, b: Weight) -> bool:
    if a.spec.dtype != b.spec.dtype:
        import numpy as np

        if a.spec.dtype.kind != b.spec.dtype.kind or not np.can_cast(a.spec.dtype.numpy, b.spec.dtype.numpy, "safe"):
            return False
    return a.scheme == b.scheme or _lossless(b.scheme)


def _lossless(plan: Plan) -> bool:
    if isinstance(plan, Smallest):
        return all(map(_lossless, plan.options))
    if isinstance(plan, Scheme):
        return plan.codec.lossless and all(map(_lossless, plan.parts.values()))
    return plan is None or (isinstance(plan, Codec) and plan.lossless)


@dataclass(frozen=True)
class _Found:
    """Sums over one pair of tensors."""

    zeros: int  # elements of the second that are 0
    distance: float  # sum of |b - a|^2
    norm: float  # sum of |a|^2
    odd: str | None = None  # the first element of the second that is not finite, and where

    @property
    def error(self) -> float:
        if self.distance == 0:
            return 0.0
        return (self.distance / self.norm) ** 0.5 if self.norm else float("inf")


def _compare(a: Weight, b: Weight, tell: Callable[[int], None] | None) -> _Found:
    import numpy as np

    if a.spec.shape != b.spec.shape:
        raise WeightsError(f"{b.origin}: {quoted(b.name)} is {b.spec}, and was {a.spec}: they cannot be compared")
    parts = 2 if "complex" in (a.spec.dtype.kind, b.spec.dtype.kind) else 1  # real and imaginary ones, side by side
    x, y, room = (np.empty(parts * min(BLOCK, a.spec.size)) for _ in range(3))
    zeros, distances, norms = 0, [], []
    odd, at = None, 0
    with np.errstate(invalid="ignore", over="ignore"):
        for one, other in zip(a.blocks(BLOCK), b.blocks(BLOCK), strict=True):
            p, q, r = (buffer[: parts * one.size] for buffer in (x, y, room))
            _widen(one, p, parts)
            _widen(other, q, parts)
            nonzero = (q != 0).reshape(-1, parts).any(1)
            zeros += one.size - int(np.count_nonzero(nonzero))
            np.subtract(q, p, out=r)
            if not np.isfinite(r).all():
                odd = odd or _first_odd(b, at, other)
                r[(p == q) | (np.isnan(p) & np.isnan(q))] = 0
            distances.append(float(np.dot(r, r)))
            norm = float(np.dot(p, p))
            if not math.isfinite(norm):
                p[~np.isfinite(p)] = 0
                norm = float(np.dot(p, p))
            norms.append(norm)
            at += one.size
            if tell is not None:
                tell(one.nbytes + other.nbytes)
    return _Found(zeros, _sum(distances), _sum(norms), odd)


def _first_odd(weight: Weight, begin: int, block: np.ndarray) -> str | None:
    """The first element that is not finite in a block that begins with an element of a weight, and where it stands."""
    import numpy as np

    sound = np.isfinite(block.astype(np.float32) if block.dtype.itemsize < 4 else block)
    if sound.all():
        return None
    first = int(sound.argmin())
    place = np.unravel_index(begin + first, weight.spec.shape)
    text = "NaN" if np.isnan(block[first]) else str(block[first])
    return f"{text} at {list(map(int, place))}"


def _lossy(pairs: Sequence[tuple[Weight | None, Weight]], found: Sequence[_Found | None]) -> dict[str, str]:
    """What lossy codecs have done: those of tensors that changed, and those that held what was read."""
    new: Counter[str] = Counter()
    old: Counter[str] = Counter()
    for (a, b), one in zip(pairs, found, strict=True):
        old.update({} if a is None else dict.fromkeys(_losing(a.scheme), 1))
        if one is not None and one.distance != 0 and (a is None or a.scheme != b.scheme):
            new.update(dict.fromkeys(_losing(b.scheme), 1))
    texts = (
        ", ".join(f"{name} in {n} tensor{'s' * (n > 1)}" for name, n in counted.most_common()) for counted in (new, old)
    )
    return {column.name: text for column, text in zip(_LOSSY, texts, strict=True) if text}


def _losing(plan: Plan) -> list[str]:
    """The names of the lossy codecs of a plan; which of several options was taken is not known of a plan."""
    if isinstance(plan, Scheme):
        inner = {**plan.codec.inner, **plan.parts}.values()
        return [*([] if plan.codec.lossless else [plan.codec.name]), *(name for p in inner for name in _losing(p))]
    return [plan.name] if isinstance(plan, Codec) and not plan.lossless else []


def _widen(block: np.ndarray, into: np.ndarray, parts: int) -> None:
    """`block` as float64: real numbers, or pairs of a real and an imaginary part."""
    import numpy as np

    if parts == 1:
        np.copyto(into, block, casting="unsafe")
    else:
        np.copyto(into.view(np.complex128), block, casting="unsafe")


def _sum(values: list[float]) -> float:
    """Rounded once; math.fsum refuses infinities of both signs, which squares are not."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


_ODD = Column("not finite", "", "the first element that is NaN or infinite, and its place")
_LOSSY = (
    Column("lossy", "", "codecs of tensors whose values changed that are not exact, and in how many"),
    Column("lossy before", "", "such codecs of the source: what they lost is no part of the error"),
)
_COLUMNS = (
    Column("name"),
    Column("shape"),
    Column("dtype", "", "in the target file"),
    Column("before", "B", "in the source file"),
    Column("after", "B", "in the target file"),
    Column("ratio", "x", "before over after"),
    Column("zeros", "%", "elements that are 0"),
    Column("error", "", "relative Euclidean distance to the source"),
    Column("held", "", "how the tensor is encoded"),
)


def _row(a: Weight | None, b: Weight, found: _Found | None) -> dict[str, Any]:
    before = None if a is None else a.stored
    return {
        "name": b.name,
        "shape": b.spec.shape,
        "dtype": b.spec.dtype.name,
        "before": before,
        "after": b.stored,
        "ratio": _ratio(before, b.stored),
        "zeros": None if found is None else found.zeros / max(b.spec.size, 1),
        "error": None if found is None else found.error,
        "held": held(b.scheme),
        **({} if found is None or found.odd is None else {_ODD.name: found.odd}),
    }


def _total(
    after: Weights,
    found: list[_Found],
    files: tuple[int | None, int | None] | None,
    values: bool,
    verified: int | None,
    lossy: Mapping[str, str],
) -> Table:
    columns = [
        Column("tensors"),
        Column("changed", "", "tensors whose values differ from the source"),
        Column("zeros", "%", "elements that are 0"),
        Column("error", "", "relative Euclidean distance over all tensors"),
        Column("file before", "B", "all files of the source on disk"),
        Column("file after", "B", "all files of the target on disk"),
        Column("ratio", "x", "before over after"),
    ]
    before, size = files or (None, None)
    row: dict[str, Any] = {"tensors": len(after), "file before": before, "file after": size}
    row["ratio"] = _ratio(before, size)
    if values:
        whole = _Found(sum(f.zeros for f in found), sum(f.distance for f in found), sum(f.norm for f in found))
        row["changed"] = sum(f.distance != 0 for f in found)
        row |= {"zeros": whole.zeros / max(after.size, 1), "error": whole.error}
        if odd := sum(f.odd is not None for f in found):
            columns.append(Column("not finite", "", "tensors with NaN or infinite values"))
            row["not finite"] = odd
    columns += [column for column in _LOSSY if column.name in lossy]
    row |= lossy
    if verified is not None:
        columns.append(Column("verified", "", "tensors that were read back and are what was to be written"))
        row["verified"] = verified
    return Table.of("total", columns, [row])


def _ratio(before: int | None, after: int | None) -> float | None:
    return before / after if before is not None and after else None

"""What became of one tensor: a verdict in two words, and the evidence.

Decides which of several true things is said first: that nothing changed, that only the way of holding it did, that it
is no longer finite, that the same values lie elsewhere, that they are a multiple, and last that they are other values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from steelyard.core.weights import Weight
from steelyard.errors import SteelyardError
from steelyard.explain.diff import lowrank
from steelyard.explain.diff.arrangement import grown, may_be_permuted, rearranged
from steelyard.explain.diff.nearly import nearly_permuted
from steelyard.explain.diff.pairing import Pair
from steelyard.explain.diff.tally import Casts, Tally, aligned, casts, epsilon, same_bits, tally, wide
from steelyard.explain.inventory import held

VERDICTS = {  # in the order of a summary; what each says
    "identical": "the same bits",
    "renamed": "the same bits under another name",
    "same values": "the same numbers in another dtype or another way of holding them",
    "rounded": "one is the cast of the other to another dtype, with loss: rounded, or cut towards zero",
    "zero signs": "only 0.0 and -0.0 differ",
    "NaN payload": "only the bits inside NaN differ",
    "tie": "a name became, or ceased to be, a further name of another tensor",
    "moved": "holds what another name held before",
    "joined": "holds several tensors of the first, value for value",
    "split": "a part of a tensor of the first, value for value",
    "reshaped": "the same bits under another shape",
    "transposed": "the transpose",
    "permuted rows": "the same rows in another order",
    "permuted columns": "the same columns in another order",
    "permuted rows and columns": "the same rows and columns, both in another order",
    "permuted elements": "the same elements in another order",
    "permuted and changed": "the rows, or the columns, in another order, and with other values besides",
    "scaled": "a multiple, up to rounding",
    "sign flips": "every change is a change of sign",
    "zeroed": "every change is a change to zero",
    "values": "other values",
    "NaN appeared": "numbers became NaN",
    "NaN vanished": "NaN became numbers",
    "Inf appeared": "finite numbers became infinite",
    "Inf vanished": "infinities became finite",
    "grown": "an axis became longer",
    "cut": "an axis became shorter",
    "shape": "another shape",
    "added": "only in the second",
    "removed": "only in the first",
    "unreadable": "its bytes could not be read",
}
FREE = 1 << 24  # elements of a matrix up to which a low rank is looked for unasked, where a piece of it looks low


@dataclass(frozen=True)
class Finding:
    """What became of one tensor."""

    verdict: str  # a key of VERDICTS
    name: str
    was: str = ""
    a: Weight | None = None
    b: Weight | None = None
    notes: tuple[str, ...] = ()
    tally: Tally | None = None
    casts: Casts | None = None
    rank: int | None = None
    found: str = "name"  # how the two were matched

    @property
    def same(self) -> bool:
        """Whether nothing at all is to be said."""
        return self.verdict == "identical"


@dataclass
class _Case:
    """One pair under examination, and the notes on it so far."""

    pair: Pair
    fast: bool
    rank: bool
    notes: list[str] = field(default_factory=list)

    def verdict(self, what: str, **more: object) -> Finding:
        pair = self.pair
        notes = ([pair.tie] if pair.tie else []) + self.notes
        if what == "identical":
            what = "tie" if pair.tie else "renamed" if pair.was != pair.name else what
        return Finding(what, pair.name, pair.was, pair.a, pair.b, tuple(notes), found=pair.found, **more)  # type: ignore[arg-type]


def judge(pair: Pair, fast: bool = False, rank: bool = False) -> Finding:
    """What became of a pair; a tensor that cannot be read has the verdict 'unreadable' and the reason.

    >>> x = np.float32([[1, 2], [3, 4]])
    >>> judge(Pair("w", "w", Weight.of("w", x), Weight.of("w", x * np.float32([1, -1])))).verdict
    'sign flips'
    """
    case = _Case(pair, fast, rank)
    try:
        return _shapes(case) if pair.a.spec.shape != pair.b.spec.shape else _bits(case)
    except SteelyardError as error:
        case.notes = [str(error)]
        return case.verdict("unreadable")


def _shapes(case: _Case) -> Finding:
    a, b = case.pair.a, case.pair.b
    found = rearranged(a, b) or grown(a, b)
    case.notes.append(found.text)
    return case.verdict(found.verdict)


def _bits(case: _Case) -> Finding:
    a, b = case.pair.a, case.pair.b
    if a.spec.dtype == b.spec.dtype and same_bits(a, b):
        if held(a.scheme) == held(b.scheme):
            return case.verdict("identical")
        case.notes.append(f"held as {held(a.scheme)} and as {held(b.scheme)}, decoded to the same bits")
        return case.verdict("same values")
    counted = tally(a, b, case.fast)
    cast = None
    if a.spec.dtype != b.spec.dtype:
        floats = a.spec.dtype.kind == b.spec.dtype.kind == "float"
        cast = casts(a, b) if floats and counted.differ else None
        case.notes.append(_cast(a, b, counted, cast))
        if not counted.differ or (cast is not None and not min(cast.to_b, cast.to_a, cast.truncated)):
            case.notes += _happened(counted).values()
            return case.verdict("rounded" if counted.changed else "same values", tally=counted, casts=cast)
    elif held(a.scheme) != held(b.scheme):
        case.notes.append(f"held as {held(a.scheme)} and as {held(b.scheme)}")
    return replace(_values(case, counted), casts=cast)


def _cast(a: Weight, b: Weight, counted: Tally, cast: Casts | None) -> str:
    """What a change of dtype did to the values."""
    change = f"{a.spec.dtype} became {b.spec.dtype}"
    if not counted.differ:
        return f"{change}: every value is the same"
    if cast is None:
        return change
    if not cast.to_b:
        return f"{change}: the second is the first, rounded"
    if not cast.truncated:
        return f"{change}: the second is the first, cut towards zero"
    if not cast.to_a:
        return f"{change}: the first is the second, rounded"
    return f"{change}: {_elements(cast.to_b)} of the second are not the first, rounded"


def _values(case: _Case, t: Tally) -> Finding:
    """What became of the values of a pair of one shape that differs somewhere."""
    a, b = case.pair.a, case.pair.b
    if may_be_permuted(t) and t.changed and (found := rearranged(a, b)) is not None:
        case.notes.append(found.text)
        return case.verdict(found.verdict, tally=t)
    happened = _happened(t)
    case.notes += happened.values()
    if t.nan_payload:
        case.notes.append(f"the bits inside NaN differ in {_elements(t.nan_payload)}")
    if t.zero_signs:
        case.notes.append(f"the sign of zero differs in {_elements(t.zero_signs)}")
    if happened:
        return case.verdict(next(iter(happened)), tally=t)
    if not t.changed:
        return case.verdict("NaN payload" if t.nan_payload else "zero signs", tally=t)
    return _numbers(case, t)


def _happened(t: Tally) -> dict[str, str]:
    """What became of numbers that are not finite, as verdicts and notes."""
    events = {
        "NaN appeared": t.nan_appeared,
        "NaN vanished": t.nan_vanished,
        "Inf appeared": t.inf_appeared,
        "Inf vanished": t.inf_vanished,
    }
    return {what: f"{what} in {_elements(count)}" for what, count in events.items() if count}


def _elements(count: int) -> str:
    return f"{count} element{'s' * (count != 1)}"


def _numbers(case: _Case, t: Tally) -> Finding:
    a, b = case.pair.a, case.pair.b
    if t.zeroed == t.changed:
        case.notes.append(f"{_elements(t.zeroed)} became zero")
        return case.verdict("zeroed", tally=t)
    if (factor := scale(a, b, t)) is not None:
        case.notes.append(f"the second is {factor:.6g} times the first")
        return case.verdict("scaled", tally=t)
    if t.negated == t.changed:
        case.notes.append(f"{_elements(t.flips)} changed sign")
        return case.verdict("sign flips", tally=t)
    if (order := nearly_permuted(a, b, t)) is not None:
        case.notes.append(order.text)
        return case.verdict("permuted and changed", tally=t)
    ranked = None
    if lowrank.is_matrix(a, b) and (case.rank or (a.spec.size <= FREE and lowrank.looks_low(a, b, t))):
        ranked = lowrank.rank(a, b, t)
        case.notes += [ranked.text] if ranked is not None and (ranked.rank is not None or case.rank) else []
    return case.verdict("values", tally=t, rank=None if ranked is None else ranked.rank)


def scale(a: Weight, b: Weight, t: Tally) -> float | None:
    """The c of b = c a, where it holds for every element up to rounding, and c is not 1 up to rounding."""
    base, other, product = t.total(2), t.total(3), t.product
    if t.elements < 4 or not (base and other) or not math.isfinite(base + other) or not t.all_finite:
        return None
    factor = product / base
    slack = max(epsilon(a.spec.dtype), epsilon(b.spec.dtype))
    if "bool" in (a.spec.dtype.kind, b.spec.dtype.kind) or abs(factor - 1) <= slack or not factor:
        return None
    if other - product * factor > max(slack**2, 1e-12) * other:
        return None
    smallest = _smallest(b)
    for x, y in aligned(a, b):
        left, right = wide(x).astype(np.float64), wide(y).astype(np.float64)
        if np.any(np.abs(right - factor * left) > max(slack, 1e-12) * np.abs(right) + smallest):
            return None
    return factor


def _smallest(weight: Weight) -> float:
    """The distance between the smallest numbers of a dtype."""
    import ml_dtypes

    if weight.spec.dtype.kind != "float":
        return 0.0
    return float(ml_dtypes.finfo(weight.spec.dtype.numpy).smallest_subnormal)

"""Which of two files descends from the other, and which of several is nearest: what the values themselves show.

Decides by what can only happen in one direction: rounding, cutting to zero, snapping to few values, growing. A change
of all values by training has no direction of its own: then the answer is that the values do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from steelyard.core.packed import Codec, Plan, Scheme
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.errors import RecipeError, SteelyardError
from steelyard.explain.diff import Difference, difference
from steelyard.explain.diff.pairing import sample
from steelyard.explain.diff.verdict import Finding

_PRUNED = 0.01  # fraction of elements that became zero, from which that is no accident
_FEW = 300  # distinct values in a sample of 3072: a codebook of 8 bits and some chance
_NEAR = 0.05  # two distances that differ by less are the same distance
_COVERED = 0.5  # fraction of the elements of a file that a relative of it has


@dataclass(frozen=True)
class Evidence:
    """One thing that happened, which of the two it makes the ancestor ('' = neither), and in how many tensors."""

    what: str
    ancestor: str
    tensors: int


def lineage(found: Difference) -> Table:
    """What speaks for either side as the ancestor of the other, one row each; the meta `verdict` is the conclusion.

    >>> x = np.linspace(-1, 1, 300, dtype=np.float32)
    >>> import ml_dtypes
    >>> rounded = Weights.of({"w": x.astype(ml_dtypes.bfloat16)})
    >>> lineage(difference(Weights.of({"w": x}), rounded)).meta["verdict"]
    'the first is the ancestor'
    """
    listed = evidence(found)
    columns = [Column("evidence"), Column("ancestor", "", "which of the two it speaks for"), Column("tensors")]
    rows = [{"evidence": e.what, "ancestor": e.ancestor or "neither", "tensors": e.tensors} for e in listed]
    side = direction(listed)
    verdict = f"the {side} is the ancestor" if side else "the values do not tell which is the ancestor"
    return Table.of("lineage", columns, rows, {"verdict": verdict})


def direction(listed: list[Evidence]) -> str:
    """'first' or 'second' where all evidence that has a direction agrees, else ''."""
    sides = {e.ancestor for e in listed if e.ancestor}
    return sides.pop() if len(sides) == 1 else ""


def evidence(found: Difference) -> list[Evidence]:
    """Everything that was found in the pairs of `found`, each with the number of its tensors."""
    counts: dict[tuple[str, str], int] = {}
    for f in found.findings:
        for look in _SIGNS:
            if (key := look(f)) is not None:
                counts[key] = counts.get(key, 0) + 1
    listed = [Evidence(what, side, n) for (what, side), n in counts.items()]
    if any("rounded" in e.what for e in listed):  # then equal values are those that rounding left alone
        listed = [e for e in listed if not e.what.startswith("no value needs")]
    return listed


def _rounded(f: Finding) -> tuple[str, str] | None:
    """A cast: the rounded side is the descendant; where nothing had to be rounded, the wider side is."""
    if f.a is None or f.b is None or f.tally is None or f.a.spec.dtype == f.b.spec.dtype or not f.b.spec.size:
        return None
    kinds, bits = (f.a.spec.dtype.kind, f.b.spec.dtype.kind), (f.a.spec.dtype.bits, f.b.spec.dtype.bits)
    if f.casts is not None:
        first, second = min(f.casts.to_b, f.casts.truncated) == 0, f.casts.to_a == 0
        if first != second:
            narrow = f.b if first else f.a
            return f"rounded to {narrow.spec.dtype}", "first" if first else "second"
        return None
    if f.tally.differ or kinds != ("float", "float") or bits[0] == bits[1]:
        return None
    narrow, side = (f.a, "first") if bits[0] < bits[1] else (f.b, "second")
    return f"no value needs more than the bits of {narrow.spec.dtype}", side


def _pruned(f: Finding) -> tuple[str, str] | None:
    t = f.tally
    if t is None or not t.elements:
        return None
    if t.zeroed >= _PRUNED * t.elements and not t.filled:
        return "values were set to zero", "first"
    if t.filled >= _PRUNED * t.elements and not t.zeroed:
        return "values were set to zero", "second"
    return None


def _grown(f: Finding) -> tuple[str, str] | None:
    if f.verdict not in ("grown", "cut") or "are the same bits" not in " ".join(f.notes):
        return None
    return "an axis grew around the same values", "first" if f.verdict == "grown" else "second"


def _packed(f: Finding) -> tuple[str, str] | None:
    if f.a is None or f.b is None or f.verdict == "identical":
        return None
    first, second = _lossy(f.a.scheme), _lossy(f.b.scheme)
    return None if first == second else ("held by a codec that loses values", "second" if first else "first")


def _lossy(plan: Plan) -> bool:
    codec = plan.codec if isinstance(plan, Scheme) else plan
    return isinstance(codec, Codec) and not codec.lossless


def _snapped(f: Finding) -> tuple[str, str] | None:
    """Few distinct values on one side, many on the other; or bits at the end of float32 that one side lacks."""
    if f.a is None or f.b is None or f.verdict not in ("values", "zeroed") or f.b.spec.size < 4 * _FEW:
        return None
    try:
        x, y = sample(f.a), sample(f.b)
    except SteelyardError:
        return None
    few = [np.unique(v.reshape(-1).view(f"u{v.dtype.itemsize}")).size for v in (x, y) if v.dtype.kind != "c"]
    if len(few) == 2 and min(few) <= _FEW and max(few) > 3 * min(few):
        return "values were snapped to a few", "first" if few[1] < few[0] else "second"
    if x.dtype == y.dtype == np.float32:
        short = [not np.any(v.view(np.uint32) & np.uint32(0xFFFF)) for v in (x, y)]
        if short[0] != short[1]:
            return "float32 values were rounded to those of bfloat16", "first" if short[1] else "second"
    return None


def _adapted(f: Finding) -> tuple[str, str] | None:
    if f.verdict in ("added", "removed") and any(part in f.name.lower() for part in ("lora_", "adapter", "ia3_")):
        return "an adapter stands beside the weights", "first" if f.verdict == "added" else "second"
    return ("a change of low rank: an adapter was merged, into either", "") if f.rank is not None else None


def _trained(f: Finding) -> tuple[str, str] | None:
    t = f.tally
    dense = f.verdict == "values" and f.rank is None and t is not None and t.changed > t.elements // 2
    return ("most values changed, as training does in either direction", "") if dense else None


_SIGNS: tuple[Callable[[Finding], tuple[str, str] | None], ...] = (
    _rounded, _pruned, _grown, _packed, _snapped, _adapted, _trained,
)  # fmt: skip


def ranking(base: Weights, others: Mapping[str, Weights], where: Where | None = None) -> Table:
    """How near each of `others` is to `base`, the nearest first.

    `distance` is the root mean square of b - a over the elements that both have; `unchanged` and `covered` are
    fractions of the elements of `base`; `ancestor` says which of the two the values make the ancestor.

    >>> x = np.linspace(-1, 1, 8, dtype=np.float32)
    >>> near = {"far": Weights.of({"w": x + 1}), "near": Weights.of({"w": x + 0.1})}
    >>> ranking(Weights.of({"w": x}), near).column("source")
    ['near', 'far']

    Raises RecipeError where there is nothing to rank.
    """
    if not others:
        raise RecipeError("there is nothing to compare with; give at least one more file")
    rows = [{"source": name, **_measures(difference(base, other, where))} for name, other in others.items()]
    rows.sort(key=lambda row: (-round(row["covered"], 2), row["distance"]))
    columns = [
        Column("source"),
        Column("covered", "%", "elements of the base that it has in the same shape"),
        Column("unchanged", "%", "elements of the base that it has unchanged"),
        Column("distance", "", "root mean square of the difference over the elements that both have"),
        Column("relative", "", "||b - a|| / ||a|| over the tensors that changed"),
        Column("cosine", "", "over the tensors that changed"),
        Column("ancestor", "", "base or other, as far as the values tell"),
        Column("evidence"),
    ]
    return Table.of("ranking", columns, rows)


def _measures(found: Difference) -> dict[str, Any]:
    total = sum(item.spec.size for item in found.a.values())
    pairs = [f for f in found.findings if f.a is not None and f.b is not None and f.a.spec.shape == f.b.spec.shape]
    covered = sum(f.a.spec.size for f in pairs if f.a is not None)
    tallies = [f.tally for f in pairs if f.tally is not None]
    changed = sum(t.changed for t in tallies)
    change, base, other = (math.fsum(t.total(row) for t in tallies) for row in (1, 2, 3))
    listed = evidence(found)
    length = math.sqrt(base) * math.sqrt(other)
    side = {"first": "base", "second": "other", "": "not told"}[direction(listed)]
    return {
        "covered": min(covered / total, 1.0) if total else 1.0,
        "unchanged": min(max(covered - changed, 0) / total, 1.0) if total else 1.0,
        "distance": math.sqrt(change / covered) if covered else math.inf,
        "relative": math.sqrt(change / base) if base else 0.0 if not change else math.inf,
        "cosine": (base + other - change) / 2 / length if length and math.isfinite(length) else None,
        "ancestor": "the same" if found.same else side,
        "evidence": "; ".join(e.what for e in listed),
    }


def ancestor(candidates: Mapping[str, Weights], of: Weights, where: Where | None = None) -> Table:
    """Which of `candidates` the weights `of` most likely descend from: a `ranking`, its meta `verdict` the conclusion.

    It is the nearest one that has most of the elements, unless the values show that it is itself a descendant, or
    another one is as near. A distance has no direction: where nothing else tells, the verdict says so.

    >>> x = np.linspace(-1, 1, 3000, dtype=np.float32)
    >>> candidates = {"base": Weights.of({"w": x}), "other": Weights.of({"w": x[::-1].copy()})}
    >>> ancestor(candidates, Weights.of({"w": np.where(abs(x) < 0.5, np.float32(0), x)})).meta["verdict"]
    'base'
    """
    table = ranking(of, candidates, where)
    able = [r for r in table.rows if r["covered"] >= _COVERED and r["ancestor"] != "base"]  # type: ignore[operator]
    verdict = _conclusion(able)
    return Table(table.title, table.columns, table.rows, {**table.meta, "verdict": verdict})


def _conclusion(able: list[Mapping[str, Any]]) -> str:
    if not able:
        return "none of them: each lacks most of the elements, or descends from it"
    first = able[0]
    rivals = [r for r in able[1:] if r["distance"] <= first["distance"] * (1 + _NEAR)]
    told = [r for r in (first, *rivals) if r["ancestor"] == "other"]
    if len(told) == 1:
        return str(told[0]["source"])
    if rivals:
        return f"not told: {', '.join(str(r['source']) for r in (first, *rivals))} are equally near"
    if first["ancestor"] == "the same":
        return f"{first['source']}, which is the same"
    if first["cosine"] is not None and first["cosine"] < 0.5:
        return "none of them: the nearest is not alike"
    return f"{first['source']}, by distance; it may as well descend from it"

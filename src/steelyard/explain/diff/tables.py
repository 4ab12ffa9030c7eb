"""What a comparison of two files says, as tables: tensors, layers, kinds, renamings, metadata, and the summary.

Decides columns and groups. Computes nothing but sums over what was counted for each tensor.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.explain.diff.pairing import substitution
from steelyard.explain.diff.verdict import VERDICTS, Finding

_TEXT = 200  # characters of a piece of metadata that are shown

_NUMBERS = (
    Column("changed", "%", "elements of another value, of all"),
    Column("signs", "", "elements whose sign changed; neither side is zero"),
    Column("largest", "", "max |b - a|, over pairs of finite numbers"),
    Column("mean", "", "mean |b - a|"),
    Column("relative", "", "||b - a|| / ||a||"),
    Column("cosine", "", "of the angle between a and b"),
    Column("rank", "", "numerical rank of b - a, where it is low and the verdict is 'values'"),
)


def tensors(findings: Iterable[Finding], everything: bool = False) -> Table:
    """One row for each tensor that differs, or for each tensor."""
    columns = [
        Column("name"),
        Column("verdict", "", "; ".join(f"{k}: {v}" for k, v in VERDICTS.items())),
        Column("was", "", "its name in the first, where that is another"),
        Column("shape"),
        Column("dtype"),
        *_NUMBERS,
        Column("notes"),
    ]
    rows = [_row(f) for f in findings if everything or not f.same]
    return Table.of("tensors", columns, rows)


def _row(f: Finding) -> dict[str, Any]:
    item = f.b or f.a
    row: dict[str, Any] = {"name": f.name, "verdict": f.verdict, "notes": "; ".join(f.notes)}
    row["was"] = f.was if f.was and f.was != f.name else None
    if item is not None:
        row |= {"shape": item.spec.shape, "dtype": item.spec.dtype.name}
    if f.a is not None and f.b is not None and f.a.spec.dtype != f.b.spec.dtype:
        row["dtype"] = f"{f.a.spec.dtype} → {f.b.spec.dtype}"
    t = f.tally
    if t is not None:
        row |= {"changed": t.changed / t.elements if t.elements else 0.0, "signs": t.flips, "largest": t.largest}
        row |= {"mean": t.mean, "relative": t.relative, "cosine": t.cosine, "rank": f.rank}
    elif f.verdict in ("identical", "renamed"):
        row |= {"changed": 0.0, "signs": 0, "largest": 0.0, "mean": 0.0, "relative": 0.0}
    return row


def layer(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number, else without its last part.

    >>> layer("model.layers.3.mlp.up.weight"), layer("lm_head.weight"), layer("w")
    ('model.layers.3', 'lm_head', 'w')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def kind(name: str) -> str:
    """What a tensor is, whatever its layer: its name with '*' for numbers.

    >>> kind("model.layers.3.mlp.up.weight")
    'model.layers.*.mlp.up.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def groups(findings: Sequence[Finding], title: str, key: Callable[[str], str]) -> Table:
    """One row for each group of tensors of which one differs; magnitudes are over the tensors that differ."""
    members: dict[str, list[Finding]] = {}
    for f in findings:
        members.setdefault(key(f.name), []).append(f)
    columns = [
        Column(title.removesuffix("s")),
        Column("tensors"),
        Column("differ", "", "tensors that are not identical"),
        Column("changed", "%", "elements of another value, of those in tensors that were compared"),
        Column("largest", "", "max |b - a|"),
        Column("relative", "", "||b - a|| / ||a||, over the tensors whose values changed"),
        Column("verdicts", "", "how often each"),
    ]
    rows = []
    for name, group in members.items():
        if all(f.same for f in group):
            continue
        tallies = [f.tally for f in group if f.tally is not None]
        change, base = (math.fsum(t.total(row) for t in tallies) for row in (1, 2))
        elements = sum(f.b.spec.size for f in group if f.b is not None)
        rows.append(
            {
                title.removesuffix("s"): name,
                "tensors": len(group),
                "differ": sum(not f.same for f in group),
                "changed": sum(t.changed for t in tallies) / elements if elements else 0.0,
                "largest": max((t.largest for t in tallies), default=0.0),
                "relative": math.sqrt(change / base) if base else math.inf if change else 0.0,
                "verdicts": ", ".join(f"{n} {v}" for v, n in Counter(f.verdict for f in group).most_common()),
            }
        )
    return Table.of(title, columns, rows)


def renamings(findings: Iterable[Finding]) -> Table:
    """One row for each way in which names changed, with '*' for numbers."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for f in findings:
        if f.was and f.was != f.name:
            counts[(*substitution(f.was, f.name), f.found)] += 1
    columns = [
        Column("first", "", "the part of the name that changed"),
        Column("second"),
        Column("tensors"),
        Column("found by", "", "how the tensors were matched"),
    ]
    rows = [
        {"first": old or "(nothing)", "second": new or "(nothing)", "tensors": n, "found by": found}
        for (old, new, found), n in counts.most_common()
    ]
    return Table.of("renamings", columns, rows)


def metadata(a: Weights, b: Weights) -> Table:
    """One row for each piece of metadata that differs."""
    rows = []
    for key in dict.fromkeys((*a.meta, *b.meta)):
        if a.meta.get(key) != b.meta.get(key):
            rows.append({"key": key, "first": _cut(a.meta, key), "second": _cut(b.meta, key)})
    return Table.of("metadata", {"key": "", "first": "", "second": ""}, rows)


def _cut(meta: Mapping[str, str], key: str) -> str | None:
    text = meta.get(key)
    return text if text is None or len(text) <= _TEXT else text[:_TEXT] + "..."


def summary(findings: Sequence[Finding], a: Weights, b: Weights) -> Table:
    """The counts of all verdicts in one row, and how the files lie."""
    counts = Counter(f.verdict for f in findings)
    columns = [Column("verdict", "", "of the whole"), Column("first", "", "tensors"), Column("second", "", "tensors")]
    columns += [Column(v, "", about) for v, about in VERDICTS.items() if counts[v]]
    columns += [Column("metadata", "", "keys that differ"), Column("files", "", "that hold the tensors, on each side")]
    columns.append(Column("order", "", "of the tensors that both have"))
    changed = sum(a.meta.get(key) != b.meta.get(key) for key in {*a.meta, *b.meta})
    row: dict[str, Any] = {"first": len(a), "second": len(b), "metadata": changed, **counts}
    files = [_files(x.values()) for x in (a, b)]
    row["files"] = f"{files[0]} and {files[1]}"
    shared = set(a) & set(b)
    both = [[name for name in x if name in shared] for x in (a, b)]
    row["order"] = "the same" if both[0] == both[1] else "another"
    row["verdict"] = verdict(findings, changed, files[0] != files[1] or row["order"] == "another")
    return Table.of("summary", columns, [row])


def _files(items: Iterable[Weight]) -> int:
    return len({item.origin.rpartition(" @")[0] for item in items})


def verdict(findings: Sequence[Finding], metadata: int, layout: bool) -> str:
    """The whole in a few words: the strongest thing that can be said of all tensors."""
    found = {f.verdict for f in findings}
    end = (", other metadata" if metadata else "") + (", laid out otherwise" if layout else "")
    if "unreadable" in found:
        return "not known: a tensor could not be read"
    if found <= {"identical"}:
        return "identical" + end
    if found <= {"identical", "renamed"}:
        return "identical under other names" + end
    otherwise = {"identical", "renamed", "same values", "tie", "joined", "split"}
    if found <= otherwise:
        return "the same values, held otherwise" + end
    if found <= otherwise | {"rounded"}:
        return "the same but for rounding" + end
    return "different"

"""What changed between two files of weights: value for value, whatever the names, dtypes, order or files.

Decides how much is read: tensors that are the same are read once and compared by their bits; of the others, a few
megabytes at a time are in memory. Large comparisons are counted by compiled kernels, small ones in numpy, with the
same numbers to the last bit. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steelyard.core.table import Table
from steelyard.core.weights import Weight, Weights, given
from steelyard.core.where import Where
from steelyard.errors import WeightsError, quoted

if TYPE_CHECKING:
    from steelyard.explain.diff.verdict import Finding

FAST = 1 << 24  # elements to compare from which loading the compiled kernels pays


@dataclass(frozen=True)
class Difference:
    """All findings about two collections of weights."""

    a: Weights
    b: Weights
    findings: tuple[Finding, ...]

    @property
    def same(self) -> bool:
        """Whether every tensor, tie and piece of metadata is the same; files and order are no difference."""
        return all(f.same for f in self.findings) and dict(self.a.meta) == dict(self.b.meta)

    @property
    def unreadable(self) -> list[Finding]:
        """The tensors that could not be read."""
        return [f for f in self.findings if f.verdict == "unreadable"]

    def tables(self, everything: bool = False) -> list[Table]:
        """Tensors, layers, kinds, renamings, metadata, lineage (those that have rows) and the summary."""
        from steelyard.explain.diff import tables
        from steelyard.explain.diff.lineage import lineage

        listed = tables.tensors(self.findings, everything)
        more = [
            tables.groups(self.findings, "layers", tables.layer),
            tables.groups(self.findings, "kinds", tables.kind),
        ]
        more += [tables.renamings(self.findings), tables.metadata(self.a, self.b), lineage(self)]
        return [listed, *(t for t in more if t.rows), tables.summary(self.findings, self.a, self.b)]


def diff(a: Weights, b: Weights, where: Where | None = None, rank: bool = False, everything: bool = False) -> Table:
    """One row for each tensor that differs between `a` and `b`: what became of it, and by how much.

    A tensor is the same only if its bits are: NaN equals NaN where the bits do, and 0.0 is not -0.0, but such
    differences have verdicts of their own. Names may differ: tensors are matched by name, by name behind a prefix, by
    content, by the renaming that these show, and by alike values. `relative` is ||b - a|| / ||a||.

    Args: `where` chooses tensors by name, a tied one by any of its names, on both sides; `rank` looks for the numerical
    rank of b - a of every pair of finite floating-point matrices with the verdict 'values' (without it, only where a
    small piece looks low), and no other verdict has one; `everything` lists identical tensors, too.

    Raises WeightsError if no tensor matches `where`; a tensor that cannot be read is a row, not an error.

    >>> import numpy as np
    >>> x = np.float32([[1, 2], [3, 4]])
    >>> table = diff(Weights.of({"u": x, "v": x}), Weights.of({"u": x, "v": x[::-1].copy()}))
    >>> [(row["name"], row["verdict"]) for row in table.rows]
    [('v', 'permuted rows')]
    """
    from steelyard.explain.diff.tables import tensors

    found = difference(a, b, where, rank)
    table = tensors(found.findings, everything)
    return replace(table, meta={**table.meta, "verdict": found.tables()[-1].rows[0]["verdict"]})


def difference(
    a: Weights,
    b: Weights,
    where: Where | None = None,
    rank: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Difference:
    """All that `diff` finds, for more tables than one; `progress` is told the bytes of each tensor that is done."""
    from steelyard.explain.diff.pairing import pair
    from steelyard.explain.diff.verdict import Finding, judge

    a, b = _chosen(given(a), given(b), where)
    paired = pair(a, b)
    fast = sum(p.b.spec.size for p in paired.pairs) >= FAST
    findings = []
    for p in paired.pairs:
        findings.append(judge(p, fast, rank))
        if progress is not None:
            progress(p.b.spec.nbytes)
    findings = _moved(findings)
    findings += [Finding("tie", name, notes=(text,)) for name, text in paired.ties.items()]
    findings += _unpaired(paired.removed, paired.added)
    return Difference(a, b, tuple(findings))


def _chosen(a: Weights, b: Weights, where: Where | None) -> tuple[Weights, Weights]:
    if where is None:
        return a, b
    left, right = a.select(where), b.select(where)
    if (a or b) and not (left or right):
        first = ", ".join(repr(name) for name in list(a or b)[:3])
        raise WeightsError(f"none of the {len(a)} and {len(b)} tensors matches; the names begin with {first}")
    return left, right


def _unpaired(removed: list[Weight], added: list[Weight]) -> list[Finding]:
    """Tensors without a partner: several that became one, one that became several, and what is on one side only."""
    from steelyard.explain.diff.joining import joined
    from steelyard.explain.diff.verdict import Finding

    findings, done = [], set[str]()
    for made in joined(added, removed):
        findings.append(Finding("joined", made.whole.name, b=made.whole, notes=(made.told,)))
        done |= {made.whole.name, *(part.name for part in made.parts)}
    removed, added = ([item for item in side if item.name not in done] for side in (removed, added))
    for made in joined(removed, added):
        of = quoted(made.whole.name)
        findings += [Finding("split", part.name, b=part, notes=(f"{made.place(part)} of {of}",)) for part in made.parts]
        done |= {made.whole.name, *(part.name for part in made.parts)}
    findings += [Finding("removed", item.name, a=item) for item in removed if item.name not in done]
    return findings + [Finding("added", item.name, b=item) for item in added if item.name not in done]


def _moved(findings: list[Finding]) -> list[Finding]:
    """Tensors that hold what another name held before: sums of squares agree to the last bit, then all bits."""
    from steelyard.explain.diff.tally import surely_same

    held: dict[tuple[object, ...], list[Finding]] = {}
    for f in findings:
        if f.tally is not None and f.a is not None and f.tally.total(2) > 0:
            held.setdefault((f.a.spec, f.tally.total(2)), []).append(f)
    result = []
    for f in findings:
        source = None
        if f.tally is not None and f.b is not None and f.verdict in ("values", "NaN appeared", "NaN vanished"):
            candidates = held.get((f.b.spec, f.tally.total(3)), [])
            source = next((c for c in candidates if c is not f and c.a and surely_same(c.a, f.b)), None)
        if source is None:
            result.append(f)
        else:
            result.append(replace(f, verdict="moved", notes=(*f.notes, f"holds what {source.was} held"), rank=None))
    return result

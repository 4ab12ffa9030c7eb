"""What is wrong with weights, seen from their values alone: findings with severity, evidence and remedy.

An *error* makes a model useless, a *warning* is seldom meant, a *note* is worth knowing. Between tensors: duplicates,
ties, and layers that differ from their siblings. What shows in one tensor alone is in ``faults``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from math import log, sqrt

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights, given
from steelyard.core.where import Where
from steelyard.explain.faults import Finding, Looked, faults, look
from steelyard.explain.reading import BLOCK, Progress, Workspace
from steelyard.explain.statistics import SMALL
from steelyard.explain.tally import tally

SIBLINGS = 5  # layers from which on a median says what is usual
# A layer's scale is seldom more than three times that of its siblings: eight times, and six robust deviations, is none
# of the gradual growth with depth that trained models show.
DRIFT, DEVIATIONS = 8.0, 6.0
SIGNS = 0.25  # a share of positive values, of those that are not zero, this far from that of its siblings
SHIFT = 1.0  # a mean this many of its siblings' standard deviations away from theirs
_NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")
_RANKS = ("error", "warning", "note")


def health(weights: Weights, where: Where | None = None, progress: Progress | None = None) -> Table:
    """A row for each finding, the worst first; none for healthy weights.

    Args:
        weights: read in blocks, two or three times each.
        where: which tensors; None = all.
        progress: is told of bytes that have been looked at.

    Looked for are NaN and infinities; dead, constant and outlying rows and columns; layers of zeros; saturated and
    subnormal values; float32 that was bfloat16 or float16; few distinct values; a scale that does not fit the fan-in;
    duplicates and ties; layers whose scale, mean or share of positive values is far from that of their
    siblings. Raises WeightsError if no tensor matches.

    >>> x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32) / 8
    >>> health(Weights.of({"a": x})).rows
    ()
    >>> x[3, 5] = np.nan
    >>> row = health(Weights.of({"a": x})).rows[0]
    >>> row["name"], row["finding"], row["severity"], row["evidence"]
    ('a', 'NaN', 'error', '1 of 4,096 values, first at [3, 5]; in 1 rows: 3')
    """
    chosen = given(weights).choose(where)
    space = Workspace(compiled=chosen.nbytes > SMALL)
    findings: list[Finding] = []
    kept: list[_Trace] = []
    for item in chosen.values():
        looked = look(item, tally(item, space, True, progress))
        findings += faults(looked)
        kept.append(_Trace.of(looked))
    findings += _duplicates(kept)
    findings += _drift(kept)
    findings += [
        Finding(alias, "tied", "note", f"one tensor with {name}", "nothing to do: it is stored once")
        for alias, name in chosen.ties.items()
    ]
    findings.sort(key=lambda f: _RANKS.index(f.severity))
    columns = [
        Column("name"),
        Column("finding"),
        Column("severity", "", "error: useless; warning: seldom meant; note: worth knowing"),
        Column("evidence"),
        Column("remedy"),
    ]
    counts = {f"{rank}s": sum(f.severity == rank for f in findings) for rank in _RANKS}
    return Table.of("health", columns, [vars(f) for f in findings], {"tensors": len(chosen), **counts})


class _Trace:
    """What is remembered of a tensor while the others are looked at."""

    def __init__(self, looked: Looked, signature: tuple[object, ...] | None):
        self.weight, self.signature, self.mean, self.std = looked.weight, signature, looked.mean, looked.std
        self.nonzero = looked.tally.finite - looked.tally.zeros
        self.positive = looked.tally.positive / max(self.nonzero, 1)

    @staticmethod
    def of(looked: Looked) -> _Trace:
        found, spec = looked.tally, looked.weight.spec
        signature = None
        if found.size > 1 and looked.std > 0:  # constant tensors are alike without being copies
            sums = found.sums
            counts = hashlib.blake2b(found.counts.tobytes(), digest_size=16).digest()
            signature = (spec, sums.total, sums.absolute, counts)
        return _Trace(looked, signature)


def _duplicates(traces: Sequence[_Trace]) -> Iterator[Finding]:
    """Tensors of the same bytes; only those whose counts and sums agree are read again."""
    groups: dict[object, list[Weight]] = {}
    for trace in traces:
        if trace.signature is not None:
            groups.setdefault(trace.signature, []).append(trace.weight)
    for group in groups.values():
        if len(group) < 2:
            continue
        first: dict[bytes, Weight] = {}
        for item in group:
            same = first.setdefault(_digest(item), item)
            if same is not item:
                evidence = f"{item.spec.nbytes:,} bytes equal those of {same.name}"
                yield Finding(item.name, "duplicate", "note", evidence, "tie the two names: the bytes are stored twice")


def _digest(weight: Weight) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    for block in weight.blocks(BLOCK):
        state.update(np.ascontiguousarray(block).view(np.uint8).data)
    return state.digest()


def _drift(traces: Sequence[_Trace]) -> Iterator[Finding]:
    """Layers of one name but for their number, of one shape, whose scale, mean or signs are far from the others'."""
    groups: dict[object, list[_Trace]] = {}
    for trace in traces:
        name, spec = trace.weight.name, trace.weight.spec
        if len(spec.shape) >= 2 and spec.dtype.kind == "float" and trace.std > 0 and _NUMBER.search(name):
            groups.setdefault((_NUMBER.sub("*", name), spec), []).append(trace)
    for group in groups.values():
        if len(group) < SIBLINGS:
            continue
        scales = np.array([log(t.std) for t in group])
        means = np.array([t.mean for t in group])
        middle, usual = float(np.median(scales)), float(np.median(means))
        spread, shift = _deviation(scales), _deviation(means)
        for trace, scale, mean in zip(group, scales.tolist(), means.tolist(), strict=True):
            if abs(scale - middle) > max(DEVIATIONS * spread, log(DRIFT)):
                evidence = f"std {trace.std:.3g}, the median of {len(group)} siblings is {np.exp(middle):.3g}"
                yield Finding(trace.weight.name, "scale drift", "warning", evidence, "compare it with its source")
            if abs(mean - usual) > max(DEVIATIONS * shift, SHIFT * float(np.exp(middle))):
                evidence = f"mean {mean:.3g}, the median of {len(group)} siblings is {usual:.3g}"
                yield Finding(trace.weight.name, "mean drift", "warning", evidence, "compare it with its source")
        yield from _sign_drift(group)


def _sign_drift(group: Sequence[_Trace]) -> Iterator[Finding]:
    """Siblings whose share of positive values is far from the median one."""
    shares = np.array([t.positive for t in group])
    usual, spread = float(np.median(shares)), _deviation(shares)
    for trace, share in zip(group, shares.tolist(), strict=True):
        chance = 0.5 / sqrt(max(trace.nonzero, 1))
        if abs(share - usual) > max(DEVIATIONS * max(spread, chance), SIGNS):
            evidence = f"{share:.1%} positive, the median of {len(group)} siblings is {usual:.1%}"
            yield Finding(trace.weight.name, "sign drift", "warning", evidence, "compare it with its source")


def _deviation(values: np.ndarray) -> float:
    """The standard deviation that a normal distribution of this median absolute deviation has."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))

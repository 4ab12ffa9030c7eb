"""What a search has to say: the promise, where the bytes went and why, and the sizes to choose from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight
from steelyard.edit.kronecker import Kronecker
from steelyard.shrinking.deep import MATRICES
from steelyard.shrinking.search import Candidate, Search, held_bytes


def proof(search: Search, found: Candidate, sizes: tuple[int, int], seconds: float) -> Table:
    """One row: the metric before and after on the proof examples, its bound, and the bytes of both files."""
    before, promise, headline = search.before["test"], search.promise, search.task.headline
    sign = -1 if headline in search.task.lower_is_better else 1
    assert found.test is not None
    unit = "%" if headline == "accuracy" else ""
    columns = [
        Column("bytes before", "B", "of the file with the weights as they are"),
        Column("bytes", "B", "of the finished file"),
        Column("smaller", "x"),
        Column(f"{headline} before", unit, "mean over the proof examples"),
        Column(headline, unit, "of the file as another process read it"),
        Column("loss", "pp" if unit else "", "how much worse: before - after, where more is better"),
        Column("loss at most", "pp" if unit else "", f"in truth, at {promise.confidence:.0%} confidence"),
        Column("tolerance", "pp" if unit else ""),
        Column("examples", "", "of the proof"),
        Column("examples changed", "", "that came out better or worse"),
        Column("seconds", "s"),
    ]
    row = {
        "bytes before": sizes[0],
        "bytes": sizes[1],
        "smaller": sizes[0] / sizes[1],
        f"{headline} before": before.mean(),
        headline: (before - sign * found.test).mean(),
        "loss": found.test.mean(),
        "loss at most": promise.bound(found.test),
        "tolerance": promise.tolerance,
        "examples": len(found.test),
        "examples changed": int(np.count_nonzero(found.test)),
        "seconds": seconds,
    }
    meta = {
        "task": search.task.name,
        "splits": "train: sensitivities; valid: chooses what the proof is asked; test: proves, and nothing else",
        "evaluations": search.evaluations,
        "confidence": promise.confidence,
    }
    return Table.of(f"{search.task.name}: the promise", columns, [row], meta)


def why(search: Search, found: Candidate) -> Table:
    """A row for each tensor: what it took, what it takes, how roughly it is held, and what made it so."""
    columns = [
        Column("tensor"),
        Column("shape"),
        Column("bytes before", "B"),
        Column("bytes", "B"),
        Column("bits", "bits", "for each element"),
        Column("zeros", "%"),
        Column("error", "%", "root mean square, relative to that of the tensor"),
        Column("sensitivity", "", "of the outputs: what an error as large as the tensor would do"),
        Column("damage", "%", "its share of the whole: sensitivity times squared error"),
        Column("note"),
    ]
    packed = {weight.name: weight for weight in found.weights.values()}
    rows = [_row(search, weight, packed[weight.name]) for weight in search.original.values()]
    whole = sum(row.get("damage", 0.0) for row in rows) or 1.0
    rows = [row | {"damage": row["damage"] / whole} if "damage" in row else row for row in rows]
    return Table.of("where the bytes went, and why", columns, rows, {"candidate": found.name})


def _row(search: Search, weight: Weight, held: Weight) -> dict[str, Any]:
    size, spec = held_bytes(held), weight.spec
    row = {"tensor": weight.name, "shape": str(list(spec.shape)), "bytes before": spec.nbytes, "bytes": size}
    row |= {"bits": 8 * size / spec.size if spec.size else None, "note": _note(weight, held)}
    if not MATRICES(weight) or not spec.size:
        return row
    before, after = (w.array().astype(np.float64) for w in (weight, held))
    minds, wrong = Kronecker.of(search.minds, weight), after - before
    square, mean = float(np.square(before).mean()), float(np.square(wrong).mean())
    row |= {"zeros": float(np.mean(after == 0)), "error": math.sqrt(mean / square) if square else 0.0}
    return row | {"sensitivity": float(minds.single.sum()) * square / 2, "damage": minds.cost(wrong) / 2}


def _note(weight: Weight, held: Weight) -> str:
    if held.scheme is not None:
        return ""
    return "plain" if held.spec.dtype == weight.spec.dtype else f"plain, {held.spec.dtype.name}"


def curve(search: Search) -> Table:
    """A row for each candidate that was measured, the largest first: bytes against what it loses."""
    headline = search.task.headline
    unit = "pp" if headline == "accuracy" else ""
    columns = [
        Column("candidate"),
        Column("bytes", "B", "of its tensors"),
        Column("valid loss", unit, f"how much worse {headline} is on validation data; none where it was not asked"),
        Column("loss", unit, "the same on the proof examples; none where it was not tried"),
        Column("loss at most", unit, "in truth, at the confidence of the promise"),
    ]
    tried = {candidate.name: candidate for candidate in search.tried}
    rows = []
    found = {candidate.name: candidate for candidate in [*search.measured.values(), *search.others]} | tried
    for candidate in sorted(found.values(), key=lambda c: -c.bytes):
        row: dict[str, Any] = {"candidate": candidate.name, "bytes": candidate.bytes}
        row |= {} if candidate.valid is None else {"valid loss": candidate.valid.mean()}
        test = candidate.test
        row |= {} if test is None else {"loss": test.mean(), "loss at most": search.promise.bound(test)}
        rows.append(row)
    return Table.of(f"{search.task.name}: sizes to choose from", columns, rows)

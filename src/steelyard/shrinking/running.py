"""What a contest has to say: how fast the file runs and in what memory, what went from each tensor, what was tried."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.core.table import Column, Table
from steelyard.deploy import apart
from steelyard.formats.module import from_module
from steelyard.shrinking.contest import Contender, Contest, lower_median


def measured(original: Path, found: Path, batch: list[np.ndarray]) -> Table:
    """Time and memory of both files for one example and for a batch, in processes that do nothing else."""
    columns = [
        Column("examples", "", "at once"),
        Column("seconds before", "s", "of the processor, for one call: median"),
        Column("seconds", "s"),
        Column("faster", "x", "median over pairs"),
        Column("faster at least", "x", "at 95 % confidence"),
        Column("memory before", "B", "at most, above that of the process before it loads the file"),
        Column("memory", "B"),
    ]
    rows: list[dict[str, Any]] = []
    for examples in sorted({1, len(batch[0])}):
        part = [x[:examples] for x in batch]
        before, after = apart.race([original, found], part)
        row = {"examples": examples, "seconds before": np.median(before), "seconds": np.median(after)}
        row |= {"faster": np.median(before / after), "faster at least": lower_median(before / after)}
        row |= {"memory before": apart.peak(original, part), "memory": apart.peak(found, part)}
        rows.append(row)
    meta = {"rounds": apart.ROUNDS, "threads": 1, "processor": apart.processor(), "onnxruntime": version("onnxruntime")}
    return Table.of("ONNX Runtime, before (float32) and after", columns, rows, meta)


def left(contest: Contest, found: Contender) -> Table:
    """A row for each tensor of the model: its shape before and in the file, where that still has it."""
    columns = [
        Column("tensor"),
        Column("shape before"),
        Column("shape"),
        Column("weights before"),
        Column("weights"),
        Column("left", "%"),
    ]
    now, rows = from_module(found.module), []
    for weight in contest.search.original.values():
        held = now.get(weight.name)
        row: dict[str, Any] = {"tensor": weight.name, "shape before": str(list(weight.spec.shape))}
        row |= {"shape": "gone" if held is None else str(list(held.spec.shape)), "weights before": weight.spec.size}
        size = 0 if held is None else held.spec.size
        rows.append(row | {"weights": size, "left": size / weight.spec.size if weight.spec.size else None})
    return Table.of("what is left of each tensor", columns, rows, {"candidate": found.name})


def entries(contest: Contest, found: Contender) -> Table:
    """A row for each file that was made, in the order in which they were, and for each that could not be."""
    headline, tried = contest.task.headline, {c.name: c.test for c in contest.tried if c.test is not None}
    unit = "pp" if headline == "accuracy" else ""
    gain = "faster when chosen" if contest.aim == "latency" else "less memory when chosen"
    columns = [
        Column("candidate"),
        Column("bytes", "B"),
        Column(gain, "x", "than the original in float32; none where the tolerance is out of reach"),
        Column("valid loss", unit, f"how much worse {headline} is on validation data"),
        Column("loss", unit, "the same on the proof examples; none where it was not tried"),
        Column("loss at most", unit, "in truth, at the confidence of the promise"),
        Column("note", "", "what came of it, and why it was not asked about on the proof examples"),
    ]
    rows: list[dict[str, Any]] = []
    for made in contest.made:
        row = {"candidate": made.name, "bytes": made.bytes, "valid loss": made.valid.mean()}
        row |= {} if made.costs is None else {gain: made.gain}
        if (test := tried.get(made.name)) is None:
            row["note"] = _why_not(contest, made)
        else:
            row |= {"loss": test.mean(), "loss at most": contest.promise.bound(test)}
            row["note"] = "holds" if contest.promise.kept(test) else "fails"
        rows.append(row | {"note": "chosen"} if made.name == found.name else row)
    rows += [{"candidate": name, "note": why} for name, why in contest.failed.items()]
    return Table.of(f"{contest.task.name}: files that run", columns, rows)


def _why_not(contest: Contest, made: Contender) -> str:
    """Why the proof was not asked about it."""
    if made.costs is None:
        return "likelier to fail, by validation data"
    if made.gain_at_least <= 1:
        return "gains nothing" if made.gain <= 1 else "gains so little that it may be chance"
    if made.name not in (c.name for c in contest.front):
        return "another one gains more, or nearly as much, and is as likely to hold"
    return "another one failed before its turn"

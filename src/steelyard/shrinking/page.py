"""What `shrink` found as one page to hand on: the promise first, then where the bytes went. Computes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steelyard.core.table import Table
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Bars, Line
from steelyard.report.units import written
from steelyard.shrinking.within import Shrunk


def page(found: Shrunk, file: str) -> Page:
    """The report of a finished file."""
    row, columns = found.proof.rows[0], {c.name: c.unit for c in found.proof.columns}
    before = next(name for name in columns if name.endswith(" before") and name != "bytes before")
    metric = before.removesuffix(" before")
    confidence = f"{found.proof.meta['confidence']:.0%}"
    most, tolerance = (written(row[name], columns["loss"]).lstrip("+") for name in ("loss at most", "tolerance"))
    figures = [
        KeyFigure("smaller", row["smaller"], "x", f"{row['bytes before']:,} to {row['bytes']:,} bytes"),
        KeyFigure(metric, row[metric], columns[metric], f"{written(row[before], columns[metric])} before"),
        KeyFigure(
            "loss at most",
            row["loss at most"],
            columns["loss"],
            f"at {confidence} confidence; tolerance {tolerance}",
        ),
    ]
    promise = (
        f"On {row['examples']:,} examples that nothing but this proof has looked at, {metric} is "
        f"{written(row[metric], columns[metric])}; before it was {written(row[before], columns[metric])}. In truth it "
        f"has fallen by no more than {most}, at {confidence} confidence. "
        f"These are the figures of the finished file as another process read it, bit for bit what was measured."
    )
    load = (
        f"In Python, `steelyard.into_module(steelyard.open('{file}'), model)`; the tensors are ordinary parts of a "
        f"safetensors file. `steelyard convert {file} plain.safetensors` writes them plain. The file is smaller; it is "
        "not faster: a model computes with the same plain weights as before."
    )
    sizes = Bars(_largest(found.why), "tensor", ("bytes before", "bytes"), title="bytes by tensor", log=True)
    alt = "what each candidate loses on validation and proof examples against its bytes"
    losses = ("valid loss", "loss", "loss at most")
    against = Line(found.curve, "bytes", losses, title="loss against size", log_x=True, marks=True, alt=alt)
    sections = [
        Section("The promise", promise, [found.proof]),
        Section("Where the bytes went", "", [found.why], [sizes]),
        Section("What was tried", "The proof goes from the largest candidate to the smallest, and ends at the first "
                "that fails.", [found.curve], [against]),
        Section("How to load it", load),
    ]  # fmt: skip
    meta = {key: str(value) for key, value in found.proof.meta.items() if key in ("task", "steelyard", "python")}
    return Page(f"Smaller within {tolerance}: {Path(file).name}", sections, meta, figures)


def _largest(why: Table, count: int = 30) -> Table:
    """The rows of the largest tensors, for a picture that stays readable."""
    rows = sorted(why.rows, key=lambda row: -int(row["bytes before"]))  # type: ignore[call-overload]
    return replace(why, rows=tuple(rows[:count]))

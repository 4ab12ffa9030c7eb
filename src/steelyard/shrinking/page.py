"""What `shrink` found as one page to hand on: the promise first, then where the bytes went. Computes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steelyard.core.table import Table
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Bars, Line
from steelyard.report.units import written
from steelyard.shrinking.within import Shrunk

LOSSES = ("valid loss", "loss", "loss at most")
GAINED = {"latency": "Faster", "memory": "In less memory"}


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
    if found.running is None:
        sections, kind = _of_weights(found, file), "Smaller"
    else:
        figures, kind = [*_gains(found.running), *figures], GAINED[found.proof.meta["aim"]]
        sections = _that_runs(found, found.running, file)
    sections = [Section("The promise", promise, [found.proof]), *sections]
    meta = {key: str(value) for key, value in found.proof.meta.items() if key in ("task", "steelyard", "python")}
    return Page(f"{kind} within {tolerance}: {Path(file).name}", sections, meta, figures)


def _of_weights(found: Shrunk, file: str) -> list[Section]:
    """The sections of a file of weights."""
    load = (
        f"In Python, `steelyard.into_module(steelyard.open('{file}'), model)`; the tensors are ordinary parts of a "
        f"safetensors file. `steelyard convert {file} plain.safetensors` writes them plain. The file is smaller; it is "
        "not faster: a model computes with the same plain weights as before."
    )
    sizes = Bars(_largest(found.why), "tensor", ("bytes before", "bytes"), title="bytes by tensor", log=True)
    alt = "what each candidate loses on validation and proof examples against its bytes"
    against = Line(found.curve, "bytes", LOSSES, title="loss against size", log_x=True, marks=True, alt=alt)
    return [
        Section("Where the bytes went", "", [found.why], [sizes]),
        Section("What was tried", "The proof goes from the largest candidate to the smallest, and ends at the first "
                "that fails.", [found.curve], [against]),
        Section("How to load it", load),
    ]  # fmt: skip


def _that_runs(found: Shrunk, running: Table, file: str) -> list[Section]:
    """The sections of an ONNX file."""
    speed = (
        f"Measured in ONNX Runtime {running.meta['onnxruntime']}, on one thread of this processor "
        f"({running.meta['processor']}), against the model in float32 there, in {running.meta['rounds']} rounds in "
        "which both took turns. On another processor it has to be measured again."
    )
    load = (
        f"Any program that runs ONNX: `onnxruntime.InferenceSession('{file}')`. In Python with PyTorch, "
        f"`steelyard.OnnxModule('{file}')(inputs)` gives its outputs as the model gave them."
    )
    gain = next(c.name for c in found.curve.columns if c.unit == "x")
    tried = replace(found.curve, rows=tuple(row for row in found.curve.rows if row[gain] is not None))
    alt = "what each file loses on validation and proof examples against what it gains"
    against = Line(tried, gain, LOSSES, title="loss against what is gained", marks=True, alt=alt)
    return [
        Section("How fast it is", speed, [running]),
        Section("What is left of each tensor", "", [found.why]),
        Section("What was tried", "The proof goes from the safest of the files that gain to the one that gains most, "
                "and ends at the first that fails.", [found.curve], [against]),
        Section("How to load it", load),
    ]  # fmt: skip


def _gains(running: Table) -> list[KeyFigure]:
    figures = []
    for row in running.rows[:1]:
        least = written(row["faster at least"], "x")
        figures.append(KeyFigure("faster", row["faster"], "x", f"at least {least} at 95 % confidence"))
    last = running.rows[-1]
    if last["memory"] is not None:
        note = f"{written(last['memory before'], 'B')} before, {last['examples']} examples at once"
        figures.append(KeyFigure("memory", last["memory"], "B", note))
    return figures


def _largest(why: Table, count: int = 30) -> Table:
    """The rows of the largest tensors, for a picture that stays readable."""
    rows = sorted(why.rows, key=lambda row: -int(row["bytes before"]))  # type: ignore[call-overload]
    return replace(why, rows=tuple(rows[:count]))

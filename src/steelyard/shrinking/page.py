"""What `shrink` found as one page to hand on: the promise first, then where the bytes went.

Decides what is shown, in what order and words; what it shows was computed before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steelyard.core.table import Column, Table
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Line
from steelyard.report.units import written
from steelyard.shrinking.choosing import Shrunk
from steelyard.shrinking.places import REST, area, before_and_after, known_by

LOSSES = ("loss at most", "loss", "tolerance")  # of what the proof was asked about
TRIED = (
    "The proof goes from {first}, and ends at the first whose loss, at most, is above the tolerance.{again} What came "
    "of each candidate, and why the proof was not asked about it, is in its last column."
)
AGAIN = (
    " If already that of the first is, it goes from the largest of all once more, with the part of the error that was "
    "kept for that."
)
WHY = (
    "Tensors are given bits so that one more of them would help the outputs as much in each. What the outputs mind is "
    "the sensitivity: what an error as large as the tensor itself would do. "
)
ERROR = (
    "The error is what rounding changed, as the outputs mind it: 100 % is what leaving the tensor out would do. "
    "Weights that are left make up for those that went, so that single ones may change by much more. The damage is the "
    "tensor's share of all that is foretold from sensitivities and squared errors."
)
MOVED = (
    "The weights were trained to be small: the change is what training and rounding did together, as the outputs of "
    "the original mind it: 100 % is what leaving the tensor out would do. Training may move a tensor further than "
    "that, and it is no error: what it does to the outputs is what the promise says."
)
WORTH = "larger to smaller candidates, those that are worth asking"
GAINING = "what gains least to what gains most, of the files that are worth asking"
GAINED = {"latency": "Faster", "memory": "In less memory"}


def page(found: Shrunk, file: str, source: str | None = None, model: str | None = None) -> Page:
    """The report of a finished file. source: what the weights came from; model: what builds it; None: is not said."""
    row, columns = found.proof.rows[0], {c.name: c.unit for c in found.proof.columns}
    before = next(name for name in columns if name.endswith(" before") and name != "bytes before")
    metric = before.removesuffix(" before")
    confidence = f"{found.proof.meta['confidence']:.0%}"
    most, tolerance = (written(row[name], columns["loss"]).lstrip("+") for name in ("loss at most", "tolerance"))
    figures = [
        KeyFigure(
            "smaller",
            row["smaller"],
            "x",
            f"{row['bytes before']:,} bytes as {found.proof.meta['before']} to {row['bytes']:,}",
        ),
        KeyFigure(metric, row[metric], columns[metric], f"{written(row[before], columns[metric])} before"),
        KeyFigure(
            "loss at most",
            row["loss at most"],
            columns["loss"],
            f"at {confidence} confidence; tolerance {tolerance}",
        ),
    ]
    looked = "this proof" if "look" not in found.proof.meta else "proofs of this search"
    promise = (
        f"On {row['examples']:,} examples that nothing but {looked} has looked at, {metric} is "
        f"{written(row[metric], columns[metric])}; before it was {written(row[before], columns[metric])}. In truth it "
        f"has fallen by no more than {most}, at {confidence} confidence. "
        f"These are the figures of the finished file as another process read it, bit for bit what was measured."
    )
    if found.running is None:
        sections, kind = _of_weights(found, file, model), "Smaller"
    else:
        figures, kind = [*_gains(found.running), *figures], GAINED[found.proof.meta["aim"]]
        sections = _that_runs(found, found.running, file)
    if "look" in found.proof.meta:
        promise += f" It is look {found.proof.meta['look']}."
    if "but" in found.proof.meta:
        promise += f" But {found.proof.meta['but']}: it may be too good."
    sections = [Section("The promise", promise, [found.proof]), *sections]
    meta = known_by(file, source)
    meta |= {key: str(value) for key, value in found.proof.meta.items() if key in ("task", "steelyard", "python")}
    title = f"{kind} within {tolerance}: {Path(file).name}"
    return Page(title, sections, meta, figures, light=True)


def _of_weights(found: Shrunk, file: str, model: str | None) -> list[Section]:
    """The sections of a file of weights."""
    built = "built as the original was" if model is None else f"the one of `--model {model}`"
    load = (
        f"In Python, `steelyard.into_module(steelyard.open('{file}'), model)`, where `model` is {built}. Other readers "
        f"see what the tensors are packed in; for them `steelyard convert {file} plain.safetensors --codec plain` "
        "writes them plain. The file is smaller; it is not faster: a model computes with the same plain weights as "
        "before. What runs faster or in less memory is made by `steelyard shrink ... --aim latency` or `--aim memory`."
    )
    pictures = [
        area(found.why, "tensor", "bytes", found.proof.rows[0]["bytes"]),
        before_and_after(found.why, "tensor", ("bytes before", "bytes")),
    ]
    again = AGAIN if found.search is not None and found.search.reserved else ""
    moved = MOVED if "change" in (column.name for column in found.why.columns) else ERROR
    alt = "what each candidate of the proof loses against its bytes, and the tolerance"
    against = Line(
        _known(found, "loss", "bytes"), "bytes", LOSSES, title="loss against size", log_x=True, marks=True, alt=alt
    )
    return [
        Section("Where the bytes went", f"{REST}\n\n{WHY}{moved}", [found.why], pictures),
        Section("What was tried", TRIED.format(first=WORTH, again=again), [found.curve], [against]),
        Section("How to load it", load),
    ]  # fmt: skip


def _that_runs(found: Shrunk, running: Table, file: str) -> list[Section]:
    """The sections of an ONNX file."""
    speed = (
        f"Measured in ONNX Runtime {running.meta['onnxruntime']}, on one thread of this processor "
        f"({running.meta['processor']}), against the model in float32 there, in {running.meta['rounds']} rounds in "
        "which both took turns. On another processor it has to be measured again. The file was chosen by an earlier "
        "race, of all candidates, whose figures are in the table of what was tried: that it won there is partly luck, "
        "and so these here, measured afterwards, are the ones to go by."
    )
    load = (
        f"Any program that runs ONNX: `onnxruntime.InferenceSession('{file}')`. In Python with PyTorch, "
        f"`steelyard.OnnxModule('{file}')(inputs)` gives its outputs as the model gave them."
    )
    gain = next(c.name for c in found.curve.columns if c.unit == "x")
    alt = "what each file loses on validation and proof examples against what it gains, and the tolerance"
    against = Line(_known(found, gain, gain), gain, ("loss at most", "valid loss", "tolerance"),
                   title="loss against what is gained", marks=True, alt=alt)  # fmt: skip
    left = before_and_after(found.why, "tensor", ("weights before", "weights"))
    return [
        Section("How fast it is", speed, [running]),
        Section("What is left of each tensor", "", [found.why], [left]),
        Section("What was tried",
                TRIED.format(first=GAINING, again=""),
                [found.curve], [against]),
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


def _known(found: Shrunk, column: str, order: str) -> Table:
    """The candidates of which a column is known, in the order of another, each with the tolerance."""
    tolerance, unit = found.proof.rows[0]["tolerance"], next(c.unit for c in found.curve.columns if c.name == "loss")
    known = [{**row, "tolerance": tolerance} for row in found.curve.rows if row[column] is not None]
    known.sort(key=lambda row: row[order])  # type: ignore[arg-type,return-value]
    return replace(found.curve, columns=(*found.curve.columns, Column("tolerance", unit)), rows=tuple(known))

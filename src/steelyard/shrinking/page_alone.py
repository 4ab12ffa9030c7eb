"""What `shrink` made of weights alone as one page to hand on: what is promised, and where the bytes went.

Decides what is shown, in what order and words; what it shows was computed before. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Picture
from steelyard.report.units import written
from steelyard.shrinking.alone import PACKED, Alone
from steelyard.shrinking.places import REST, area, before_and_after, known_by


def page_alone(found: Alone, file: str, source: str | None = None) -> Page:
    """The report of a finished file or folder. source: what the weights came from; None: is not said."""
    row = found.summary.rows[0]
    most = written(row["error at most"], "%")
    before = "bytes in other places" if row["bytes before"] is None else f"{row['bytes before']:,}"
    figures = [
        KeyFigure("smaller", row["smaller"], "x", f"{before} to {row['bytes']:,} bytes"),
        KeyFigure("error", row["error"], "%", f"of all weights together; {most} was asked for"),
        KeyFigure("largest error", row["largest error"], "%", f"of {row['tensor']}"),
    ]
    promise = (
        "The root of the mean over all weights of their tensor's relative squared error is "
        f"{written(row['error'], '%')}, as another process read the finished file; no more than {most} was asked for. "
        f"This is said {found.summary.meta['promise']}: measure what matters to you."
    )
    sections = [Section("What is promised", promise, [found.summary])]
    if Path(file).suffix == ".onnx":  # where weights are plain floats again
        sections.append(Section("What each tensor lost", "", [found.why]))
    else:
        pictures: list[Picture] = [area(found.why, "name", "after", row["bytes"])]
        pictures.append(before_and_after(found.why, "name", ("before", "after")))
        sections.append(Section("Where the bytes went", REST, [found.why], pictures))
    sections.append(Section("How to load it", _loading(file)))
    return Page(f"Smaller by weights alone: {Path(file).name}", sections, known_by(file, source), figures, light=True)


def _loading(file: str) -> str:
    if Path(file).suffix == ".onnx":
        return f"Any program that runs ONNX: `onnxruntime.InferenceSession('{file}')`. The weights are plain floats."
    read = f"In Python, `steelyard.open('{file}')` has the weights, decoded one at a time when they are read. "
    if Path(file).suffix:
        return read + f"`steelyard convert {file} plain.safetensors --codec plain` writes them plain, for others."
    plain = f"`steelyard convert {file} {Path(file) / 'model.safetensors'} --codec plain`"
    return f"{read}{plain} makes it a folder for every reader; `{PACKED}` stays beside them, and may go then."

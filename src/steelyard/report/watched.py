"""The page of a watched training: which figures lead, which tables are drawn. Computes nothing.

The same sections stand in a report that is written once and in a live page, and are there before there is anything to
show in them.
"""

from __future__ import annotations

from steelyard.core.table import Table
from steelyard.learn.watch.course import SHARES, Course
from steelyard.report.courses import Bands, Field
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Line, Picture

ORDINARY = 1e-3  # the update ratio at which many trainings go well
BAND = (("lowest", "highest"),)
SPREAD = (*BAND, ("25 %", "75 %"))
_MEANT = {
    "rms": "the scale of the activations",
    "gradient": "the scale of the gradient at them",
    "dead": "units that are zero for the whole batch",
    "saturated": "activations at their limits",
    "peaked": "queries of attention that are bound to a single key",
    "drift": "batch normalisations: from the running statistics to the batch, in nats",
}


def page(course: Course) -> Page:
    """The course of a training, as far as it was read."""
    faults = course.faults()
    sections = [
        Section("Faults", faults_text(faults), [faults] if faults.rows else []),
        Section("Loss", "", pictures=_noted(course, faults)),
        Section(
            "Updates",
            "How far a step moves each matrix, relative to its size: about a thousandth in many good trainings.",
            pictures=_updates(course, faults),
        ),
        Section("Gradient and rate", "", pictures=_counts(course, faults)),
        Section("Layers", "As they were at the looks, over one batch each.", pictures=_layers(course, faults)),
        Section("Tensors", "", [course.tensors(), course.looked()]),
    ]
    return Page(title(course), [s for s in sections if s.text or s.tables or s.pictures], meta(course), figures(course))


def title(course: Course) -> str:
    """What was trained."""
    return f"Training of {course.meta.get('model', 'a model')}"


def meta(course: Course) -> dict[str, str]:
    """Where the numbers come from."""
    return {"log": course.log.where, **{k: v for k, v in course.meta.items() if k in ("optimizer", "torch")}}


def faults_text(faults: Table) -> str:
    """What stands above the table of faults."""
    return "" if faults.rows else "None was named so far."


def figures(course: Course) -> list[KeyFigure]:
    """The strip at the top: what there is of steps, loss, rate, update ratio and faults."""
    row = course.summary().rows[0]
    units = {c.name: c.unit for c in course.summary().columns}
    found = [KeyFigure("steps", row["steps"], note=f"{row['tensors']} tensors")]
    found.append(KeyFigure("time", row["time"], "s"))
    noted = [name.removesuffix(", last") for name in row if name.endswith(", last")]
    found += [KeyFigure(what, row[f"{what}, last"], note=f"from {row[f'{what}, first']:.4g}") for what in noted[:2]]
    found += [KeyFigure(name, row[name], units[name]) for name in ("rate", "update ratio")]
    return [*found, KeyFigure("faults", row["faults"])]


def _noted(course: Course, faults: Table) -> list[Picture]:
    tables = [course.over_time(binned, what) for what, binned in course.notes.items()]
    return [Bands(t, "step", BAND, t.title, events=faults, log_y=_wide(t, t.title)) for t in tables if t.rows]


def _wide(table: Table, name: str) -> bool:
    """Whether all values are positive and span more than two decades."""
    found = table.column(name)
    return bool(min(found) > 0 and max(found) > 100 * min(found))


def _updates(course: Course, faults: Table) -> list[Picture]:
    spread, by_layer = course.spread(), course.by_layer(course.ratios, "update ratio", "x")
    if not spread.rows:
        return []
    bands = Bands(spread, "step", SPREAD, "median", log_y=True, events=faults,
                  title="update / weight: median, quartiles and extremes of the matrices")  # fmt: skip
    field = Field(by_layer, "step", "layer", "update ratio", log=True, middle=ORDINARY, events=faults,
                  title="update / weight, by matrix")  # fmt: skip
    return [bands, field]


def _counts(course: Course, faults: Table) -> list[Picture]:
    gradient = course.over_time(course.counts["gradient norm"], "gradient norm")
    rate = course.over_time(course.counts["rate"], "rate")
    noise = course.over_time(course.noise, "noise scale") if course.noise.names else None
    found: list[Picture] = []
    if gradient.rows:
        found.append(Bands(gradient, "step", BAND, "gradient norm", log_y=True, events=faults))
    if rate.rows:
        found.append(Line(rate, "step", ("rate",), title="learning rate"))
    if noise is not None and len(noise.rows) > 3:
        found.append(Line(noise, "step", ("noise scale",), title="gradient noise scale, in examples", log_y=True))
    return found


def _layers(course: Course, faults: Table) -> list[Picture]:
    found: list[Picture] = []
    for name, binned in course.layers.items():
        table = course.shares(name) if name in SHARES else course.by_layer(binned, name)
        if table.rows:
            found.append(Field(table, "step", "layer", name, log=name not in SHARES, events=faults, title=_MEANT[name]))
    return found

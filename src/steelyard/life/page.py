"""The record of a run as a page: which figures lead, which tables are drawn. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from steelyard.core.table import Cell, Table
from steelyard.explain.bars import ranked_by
from steelyard.life.record import Chapter, Life
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Bars, Histogram, Images, Line, Picture, Scatter
from steelyard.report.units import written


def page(life: Life) -> Page:
    """The whole run on one page: the figures that matter first, then a section for each stage."""
    stages = life.stages
    sections = [Section("Stages", _lead(life), [stages], _overview(stages, life.task.headline))]
    sections += [Section(c.name, c.text, list(c.tables), _pictures(c, life)) for c in life.chapters]
    title = f"The life of a network's weights: {life.task.name}"
    meta = {"seed": life.recipe.seed, "recipe": "recipe.yaml beside this file", **_provenance(stages)}
    return Page(title, sections, meta=meta, figures=_figures(life))


def tables(life: Life) -> list[Table]:
    """Every table of the run, those that are drawn included."""
    found = [life.stages]
    for chapter in life.chapters:
        found += [*chapter.tables, *chapter.drawn.values()]
    return found


def _provenance(table: Table) -> Mapping[str, str]:
    return {key: str(value) for key, value in table.meta.items() if key in ("steelyard", "python")}


def _lead(life: Life) -> str:
    said = (
        "Every size is the length of a file that was written; every score was measured on held-out examples, the last "
        "one by a process that had only the file and the recipe."
    )
    return said + "".join(f"\n\nNot reached: {failure}." for failure in life.failures)


def _figures(life: Life) -> list[KeyFigure]:
    rows, metric = life.stages.rows, life.task.headline
    unit = {c.name: c.unit for c in life.stages.columns}[metric]
    first, last = next(row for row in rows if row["stage"] == "trained"), rows[-1]
    figures = [KeyFigure(f"{metric}, trained", first[metric], unit, _interval(first, unit))]
    if last["stage"] == "re-read":
        sizes = f"{first['bytes']:,} to {last['bytes']:,} bytes on disk"
        figures.append(KeyFigure("smaller", last["ratio"], "x", sizes))
        figures.append(KeyFigure(f"{metric}, re-read", last[metric], unit, _interval(last, unit)))
    return figures


def _interval(row: Mapping[str, Cell], unit: str) -> str:
    return f"95 % interval {written(row['low'], unit)} to {written(row['high'], unit)}"


def _overview(stages: Table, metric: str) -> list[Picture]:
    """The started net is off the scale, and 'coded' is the file that 're-read' measures."""
    drawn = replace(stages, rows=tuple(row for row in stages.rows if row["stage"] not in ("started", "coded")))
    alt = f"{metric} on held-out data against the bytes of the file, a point for each stage"
    return [
        Scatter(drawn, "bytes", metric, "low", "high", by="stage", title=f"{metric} against size", log_x=True, alt=alt)
    ]


def _pictures(chapter: Chapter, life: Life) -> list[Picture]:
    drawn, metric = chapter.drawn, life.task.headline
    pictures: list[Picture] = []
    if "depth" in drawn:
        pictures.append(signal_picture(drawn["depth"]))
    if "history" in drawn:
        pictures += [
            Line(drawn["history"], "epoch", ("train loss", "valid loss"), title="loss over time"),
            Line(drawn["history"], "epoch", (metric,), title=f"{metric} over time, validation data"),
        ]
    if "steps" in drawn:
        ratios = tuple(c.name for c in drawn["steps"].columns if c.name.startswith("update ratio"))
        matrices = tuple(name for name in ratios if not name.endswith("bias"))
        pictures.append(Line(drawn["steps"], "step", matrices or ratios, title="update / weight, per step", log_y=True))
    if "filters" in drawn:
        pictures.append(
            Images(_tiles(drawn["filters"]), "taps", "filter", title="first-layer filters, most important first")
        )
    if "bytes" in drawn:
        moments = tuple(c.name for c in drawn["bytes"].columns if c.unit == "B")
        pictures.append(Bars(drawn["bytes"], "tensor", moments, title="bytes in the file, by tensor", log=True))
    if "histograms" in drawn:
        pictures.append(Histogram(drawn["histograms"], "left", "right", "count", by="moment", facet="tensor",
                                  title="values of the weights, exact zeros left out", log=True))  # fmt: skip
    return pictures


def signal_picture(depth: Table) -> Line:
    """The table of ``against_depth`` as two lines over the layers."""
    alt = "the spread of the activations and the scale of their gradients, by layer, on a logarithmic axis"
    return Line(depth, "layer", ("forwards", "backwards"), title="scale against depth", alt=alt, log_y=True, marks=True)


def starts_picture(compared: Table) -> Picture:
    """The table of ``compare_starts`` as a bar for each start, or with depths as a line for each start."""
    by = ranked_by(compared)
    alt = f"the {by} of each start, the best first"
    if any(column.name == "depth" for column in compared.columns):
        return Line(compared, "depth", (by,), by="start", title=f"{by} by depth", alt=alt, marks=True)
    return Bars(compared, "start", (by,), title=by, alt=alt)


def _tiles(filters: Table) -> Table:
    """The filters with their channels laid below each other: an image is rows of values."""
    rows = tuple({**row, "taps": [line for channel in row["taps"] for line in channel]} for row in filters.rows)  # type: ignore[union-attr]
    return replace(filters, rows=rows)

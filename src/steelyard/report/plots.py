"""Pictures as data: what to draw of a Table, and the plotly figure of it as plain dicts. Computes nothing.

Decides axes, marks and order. Colours and fonts belong to the page, which knows light from dark; plotly
itself is a script in that page and is never imported here. Every number comes from a Table, so a picture
can always be checked against the table that it was made of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steelyard.core.table import Cell, Table
from steelyard.errors import RecipeError, UnknownNameError, printable
from steelyard.report.units import in_points

Figure = dict[str, Any]
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # a second sign beside the colour
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_FORMATS: Mapping[str, dict[str, Any]] = {
    "B": {"tickformat": "~s", "ticksuffix": "B"},
    "%": {"tickformat": "~%"},
    "pp": {"tickformat": "+~g", "ticksuffix": " pp"},
    "x": {"ticksuffix": "×"},
    "s": {"ticksuffix": " s"},
}


class Picture(ABC):
    """A picture of one table. Final subclasses are frozen dataclasses whose fields name its columns."""

    table: Table
    title: str
    alt: str  # what a reader who cannot see it should know; '' = a description of what is drawn

    @abstractmethod
    def figure(self) -> Figure:
        """``{"data": [...], "layout": {...}}``; raises UnknownNameError for a column that is not there."""

    @property
    def described(self) -> str:
        """The text in place of the picture."""
        kind = {"Images": "Grid of images", "Bars": "Bar chart", "Line": "Line chart"}.get(type(self).__name__)
        return self.alt or f"{kind or type(self).__name__}: {self.title or self.table.title}"


@dataclass(frozen=True)
class Line(Picture):
    """One line for each column of ``y``, or for each value of the column ``by``.

    >>> loss = Table.of("loss", {"step": "", "train": ""}, [{"step": 0, "train": 2.3}, {"step": 1, "train": 1.9}])
    >>> Line(loss, "step", ("train",)).figure()["data"][0]["y"]
    [2.3, 1.9]
    """

    table: Table
    x: str
    y: tuple[str, ...]
    by: str | None = None
    title: str = ""
    alt: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: bool = False

    def figure(self) -> Figure:
        table = in_points(self.table)
        series = [(name, rows, y) for y in self.y for name, rows in _groups(table, self.by, y)]
        data = []
        for i, (name, rows, y) in enumerate(series):
            line = {"width": 2, "dash": _DASHES[i % len(_DASHES)]}
            trace = {"type": "scatter", "mode": "lines+markers" if self.marks else "lines", "line": line, "name": name}
            data.append({**trace, "x": cells_of(rows, self.x), "y": cells_of(rows, y)})
        x_axis = axis_of(self.table, self.x, self.log_x)
        layout = {"xaxis": x_axis, "yaxis": axis_of(self.table, self.y[0], self.log_y, titled=len(self.y) == 1)}
        return done(data, layout, height=340, hovermode="x unified")


@dataclass(frozen=True)
class Bars(Picture):
    """A bar for each row and each column of ``y``; ``stacked`` puts the columns of a row end to end."""

    table: Table
    x: str
    y: tuple[str, ...]
    title: str = ""
    alt: str = ""
    stacked: bool = False
    horizontal: bool = True
    log: bool = False

    def figure(self) -> Figure:
        table = in_points(self.table)
        names, values = [label_of(c) for c in table.column(self.x)], [table.column(y) for y in self.y]
        across, along = ("y", "x") if self.horizontal else ("x", "y")
        data = [
            {"type": "bar", "name": label_of(y), across: names, along: list(map(_number, column))}
            | {"orientation": "h" if self.horizontal else "v"}
            for y, column in zip(self.y, values, strict=True)
        ]
        category = {"type": "category", **({"autorange": "reversed"} if self.horizontal else {}), "showgrid": False}
        value = axis_of(self.table, self.y[0], self.log, titled=len(self.y) == 1)
        layout = {f"{across}axis": category, f"{along}axis": value, "barmode": "stack" if self.stacked else "group"}
        marks = len(names) * (1 if self.stacked else len(self.y))
        return done(data, {**layout, "bargap": 0.25}, height=90 + 24 * max(marks, 4) if self.horizontal else 340)


@dataclass(frozen=True)
class Histogram(Picture):
    """Counts between given edges; ``by`` lays several over each other, ``facet`` puts each in its own frame."""

    table: Table
    left: str
    right: str
    count: str
    by: str | None = None
    facet: str | None = None
    title: str = ""
    alt: str = ""
    log: bool = False
    across: int = 3

    def figure(self) -> Figure:
        frames = _groups(self.table, self.facet, self.count)
        names = list(dict.fromkeys(name for _, rows in frames for name, _ in _groups_of(rows, self.by, self.count)))
        data: list[dict[str, Any]] = []
        seen: set[str] = set()
        layout: Figure = {"barmode": "overlay", "bargap": 0}
        for i, (frame, rows) in enumerate(frames):
            end = "" if i == 0 else str(i + 1)
            for name, bins in _groups_of(rows, self.by, self.count):
                data.append(self._bars(name, bins, names.index(name), first=name not in seen) | _on(end))
                seen.add(name)
            layout[f"xaxis{end}"] = axis_of(self.table, self.left, titled=False) | {"title": {"text": frame}}
            layout[f"yaxis{end}"] = axis_of(self.table, self.count, self.log, titled=i % self.across == 0)
        if self.facet is None:
            layout["xaxis"]["title"] = {"text": label_of(self.left)}
            return done(data, layout, height=320, legend=len(names) > 1)
        lines = math.ceil(len(frames) / self.across)
        layout["grid"] = {"rows": lines, "columns": self.across, "pattern": "independent", "ygap": 0.45, "xgap": 0.18}
        return done(data, layout, height=90 + 190 * lines, legend=len(names) > 1)

    def _bars(self, name: str, bins: Sequence[Mapping[str, Cell]], index: int, first: bool) -> dict[str, Any]:
        """Bars for the first, and outlines for those that lie over it: two filled ones would mix their colours."""
        left, right, counts = cells_of(bins, self.left), cells_of(bins, self.right), cells_of(bins, self.count)
        common = {"name": name, "legendgroup": str(index), "showlegend": first, "meta": {"hue": index}}
        if index > 0:
            steps = {"x": [*left, *right[-1:]], "y": [*counts, *counts[-1:]], "line": {"shape": "hv", "width": 2}}
            return {**common, **steps, "type": "scatter", "mode": "lines"}
        widths = [b - a for a, b in zip(left, right, strict=True)]
        bars = {"type": "bar", "x": left, "width": widths, "offset": 0, "y": counts, "opacity": 0.45}
        return {**common, **bars, "marker": {"line": {"width": 0}}}


@dataclass(frozen=True)
class Scatter(Picture):
    """A point for each row, with error bars from ``low`` to ``high``, and a word beside it from ``label``."""

    table: Table
    x: str
    y: str
    low: str | None = None
    high: str | None = None
    label: str | None = None
    by: str | None = None
    title: str = ""
    alt: str = ""
    log_x: bool = False
    log_y: bool = False
    joined: bool = False

    def figure(self) -> Figure:
        mode = "markers" + ("+lines" if self.joined else "") + ("+text" if self.label else "")
        data = []
        for i, (name, rows) in enumerate(_groups(in_points(self.table), self.by, self.y)):
            mark = {"size": 9, "symbol": _SYMBOLS[i % len(_SYMBOLS)], "line": {"width": 0}}
            trace: dict[str, Any] = {"type": "scatter", "mode": mode, "name": name, "marker": mark}
            trace |= {"x": cells_of(rows, self.x), "y": cells_of(rows, self.y), "line": {"width": 1.5, "dash": "dot"}}
            if self.label:
                furthest = max((x for x in trace["x"] if isinstance(x, (int, float))), default=None)
                sides = ["left" if x == furthest else "right" for x in trace["x"]]
                places = [f"{('top', 'bottom')[n % 2]} {side}" for n, side in enumerate(sides)]  # neighbours keep apart
                trace |= {"text": [label_of(_cell(row, self.label)) for row in rows], "textposition": places}
            if self.low and self.high:
                trace["error_y"] = self._errors(rows)
            data.append(trace | {"cliponaxis": False})
        layout = {"xaxis": axis_of(self.table, self.x, self.log_x), "yaxis": axis_of(self.table, self.y, self.log_y)}
        return done(data, layout, height=380, legend=self.by is not None)

    def _errors(self, rows: Sequence[Mapping[str, Cell]]) -> dict[str, Any]:
        """Plotly wants distances from the point."""
        middle, low, high = (cells_of(rows, str(name)) for name in (self.y, self.low, self.high))
        up = [h - m for h, m in zip(high, middle, strict=True)]
        down = [m - lo for m, lo in zip(middle, low, strict=True)]
        return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5, "width": 4}


@dataclass(frozen=True)
class Images(Picture):
    """A grid of small images, one for each row of the table: the column ``image`` holds lists of lines of values.

    All share one colour scale around zero, so that they can be compared.
    """

    table: Table
    image: str
    label: str | None = None
    title: str = ""
    alt: str = ""
    across: int = 8

    def figure(self) -> Figure:
        tiles = self.table.column(self.image)
        height, width = self._size(tiles)
        lines = math.ceil(len(tiles) / self.across)
        wide = min(self.across, len(tiles)) * (width + 1) - 1
        sheet: list[list[Any]] = [[None] * wide for _ in range(max(lines * (height + 1) - 1, 0))]
        notes = []
        for i, tile in enumerate(tiles):
            top, left = (i // self.across) * (height + 1), (i % self.across) * (width + 1)
            for y, line in enumerate(tile):
                sheet[top + y][left : left + width] = map(_number, line)
            if self.label:
                words = {
                    "text": label_of(_cell(self.table.rows[i], self.label)),
                    "showarrow": False,
                    "font": {"size": 10},
                }
                notes.append({**words, "x": left + (width - 1) / 2, "y": top - 0.5, "yanchor": "bottom"})
        scale = {"coloraxis": "coloraxis", "hoverongaps": False, "hovertemplate": "%{z:.4g}<extra></extra>"}
        hidden = {"visible": False, "constrain": "domain"}
        layout = {
            "xaxis": hidden,
            "yaxis": {**hidden, "autorange": "reversed", "scaleanchor": "x"},
            "coloraxis": {"cmid": 0, "colorbar": {"thickness": 12, "outlinewidth": 0}, "autocolorscale": True},
            "annotations": notes,
        }
        layout["margin"] = {"l": 0, "r": 0, "t": 28, "b": 8}
        data = [{"type": "heatmap", "z": sheet, **scale}]
        return done(data, layout, height=min(80 + max(round(640 * len(sheet) / max(wide, 1)), 120), 900))

    def _size(self, tiles: Sequence[Any]) -> tuple[int, int]:
        sizes = {(len(tile), len(line)) for tile in tiles for line in tile}
        if len(sizes) != 1:
            raise RecipeError(f"a grid of images needs images of one size, got {sorted(sizes)} (height, width)")
        return sizes.pop()


@dataclass(frozen=True)
class Treemap(Picture):
    """Areas in proportion to ``value``, nested by the dots in the names of the column ``path``."""

    table: Table
    path: str
    value: str
    title: str = ""
    alt: str = ""

    def figure(self) -> Figure:
        sizes = {str(_cell(row, self.path)): _number(_cell(row, self.value)) for row in self.table.rows}
        nodes = tree(list(sizes))
        unit = unit_of(self.table, self.value)
        value = "%{value:.3s}B" if unit == "B" else "%{value}"
        trace = {
            "type": "treemap",
            "ids": [label_of(n) for n in nodes],
            "parents": [label_of(p) for p in nodes.values()],
            "labels": [label_of(n.removeprefix(f"{p}.")) for n, p in nodes.items()],
            "values": [sizes.get(n, 0) for n in nodes],
            "branchvalues": "remainder",
            "texttemplate": f"%{{label}}<br>{value}",
            "hovertemplate": f"%{{id}}<br>{value}<br>%{{percentRoot:.1%}}<extra></extra>",
            "tiling": {"pad": 2},
            "pathbar": {"visible": False},
            "marker": {"line": {"width": 0}, "cornerradius": 2},
            "meta": {"depths": [_depth(n, nodes) for n in nodes]},
            "textfont": {"size": 12},
            "root": {"color": "rgba(0,0,0,0)"},
        }
        readable = {"uniformtext": {"minsize": 10, "mode": "hide"}}
        return done([trace], {"margin": {"l": 0, "r": 0, "t": 8, "b": 8}, **readable}, height=420)


def tree(names: Sequence[str]) -> dict[str, str]:
    """Each dotted prefix and its parent ('' at the top), without those that hold one thing only."""
    parents: dict[str, str] = {}
    for name in names:
        cuts = [i for i, c in enumerate(name) if c == "."]
        prefixes = [*(name[:i] for i in cuts), name]
        for above, below in zip(["", *prefixes], prefixes, strict=False):
            parents.setdefault(below, above)
    children: dict[str, int] = {}
    for above in parents.values():
        children[above] = children.get(above, 0) + 1
    alone = {n for n in parents if children.get(n, 0) == 1 and n not in names}
    kept = {}
    for name, above in parents.items():
        while above in alone:
            above = parents[above]
        if name not in alone:
            kept[name] = above
    return kept


def _depth(name: str, parents: Mapping[str, str]) -> int:
    return 1 + _depth(parents[name], parents) if parents[name] else 0


def _groups(table: Table, by: str | None, name: str) -> list[tuple[str, list[Mapping[str, Cell]]]]:
    return _groups_of(table.rows, by, name)


def _groups_of(
    rows: Sequence[Mapping[str, Cell]], by: str | None, name: str
) -> list[tuple[str, list[Mapping[str, Cell]]]]:
    """The rows apart by the value of a column, in order of appearance; one group called `name` without one."""
    if by is None:
        return [(label_of(name), list(rows))]
    groups: dict[str, list[Mapping[str, Cell]]] = {}
    for row in rows:
        groups.setdefault(label_of(_cell(row, by)), []).append(row)
    return list(groups.items())


def cells_of(rows: Sequence[Mapping[str, Cell]], name: str) -> list[Any]:
    return [_number(_cell(row, name)) for row in rows]


def _cell(row: Mapping[str, Cell], name: str) -> Cell:
    if name not in row:
        raise UnknownNameError("column", name, row)
    return row[name]


def _number(value: Any) -> Any:
    """A value that plotly can place; what is not finite becomes a gap."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return label_of(value) if isinstance(value, str) else value


def label_of(value: Any) -> str:
    """Text that plotly shows as it is, with none of its own mark-up."""
    text = printable(str(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def unit_of(table: Table, name: str) -> str:
    return next((c.unit for c in table.columns if c.name == name), "")


def axis_of(table: Table, name: str, log: bool = False, titled: bool = True) -> dict[str, Any]:
    words = any(isinstance(v, str) for v in table.column(name))
    axis: dict[str, Any] = {"type": "category" if words else "log" if log else "linear"}
    if titled:
        axis["title"] = {"text": label_of(name)}
    unit = unit_of(table, name)
    if log and not words:
        axis |= {"dtick": 1 if _decades(table.column(name)) >= 2 else "D2"}
        axis |= {"exponentformat": "power"} if unit in ("", "x") else {}
    return axis | _FORMATS.get(unit, {})


def _decades(values: Sequence[Any]) -> float:
    """How many powers of ten the positive values span: a short axis needs marks between them."""
    found = [v for v in values if isinstance(v, (int, float)) and 0 < v < math.inf]
    return math.log10(max(found) / min(found)) if found else 0.0


def _on(end: str) -> dict[str, str]:
    return {"xaxis": f"x{end}", "yaxis": f"y{end}"}


def done(
    data: list[dict[str, Any]], layout: Figure, height: int, legend: bool | None = None, hovermode: str = "closest"
) -> Figure:
    shown = len(data) > 1 if legend is None else legend
    below = {"orientation": "h", "traceorder": "normal", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 56, "r": 16, "t": 34 if shown else 16, "b": 48}
    common = {"height": height, "margin": margin, "showlegend": shown, "legend": below, "hovermode": hovermode}
    return {"data": data, "layout": {**common, **layout}}

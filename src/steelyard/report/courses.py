"""Pictures of what goes on over time: a band around a line, a field of layers against time, both with faults marked.

Decides marks and axes, as ``plots`` does. Computes nothing but where a value stands on a scale of decades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steelyard.core.table import Cell, Table
from steelyard.report.plots import Figure, Picture, axis_of, cells_of, done, label_of, unit_of

EVENTS = 12  # that are marked, the first ones
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Bands(Picture):
    """A line within bands: ``y`` names pairs of columns, (low, high), from the outermost inwards, ``middle`` the line.

    events: rows with the columns "step" and "fault", of which each is a mark on the axis of steps.

    >>> row = {"step": 0, "low": 1.0, "mean": 2.0, "high": 3.0}
    >>> loss = Table.of("loss", dict.fromkeys(row, ""), [row])
    >>> [trace["y"] for trace in Bands(loss, "step", (("low", "high"),), "mean").figure()["data"]]
    [[1.0], [3.0], [2.0]]
    """

    table: Table
    x: str
    y: tuple[tuple[str, str], ...]
    middle: str
    title: str = ""
    alt: str = ""
    log_y: bool = False
    events: Table | None = None

    def figure(self) -> Figure:
        x, data = cells_of(self.table.rows, self.x), []
        for i, (low, high) in enumerate(self.y):
            edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "meta": {"hue": 0, "band": i}}
            for name, fill in ((low, "none"), (high, "tonexty")):
                y = cells_of(self.table.rows, name)
                data.append({**edge, "y": y, "name": label_of(name), "fill": fill})
        line = {"type": "scatter", "mode": "lines", "name": label_of(self.middle), "line": {"width": 2}}
        data.append({**line, "x": x, "y": cells_of(self.table.rows, self.middle), "meta": {"hue": 0}})
        layout = {
            "xaxis": axis_of(self.table, self.x),
            "yaxis": axis_of(self.table, self.middle, self.log_y) | {"title": {"text": label_of(self.middle)}},
        }
        return done(data, layout | _marks(self.events), height=280, legend=False, hovermode="x unified")


@dataclass(frozen=True)
class Field(Picture):
    """A colour for each value of the column ``y`` at each ``x``, on a scale of decades if ``log``.

    middle: the value at which one colour turns into the other; None: one colour, from the smallest value on.
    """

    table: Table
    x: str
    y: str
    value: str
    title: str = ""
    alt: str = ""
    log: bool = False
    middle: float | None = None
    events: Table | None = None

    def figure(self) -> Figure:
        across = list(dict.fromkeys(self.table.column(self.x)))
        down = list(dict.fromkeys(map(str, self.table.column(self.y))))
        cells: dict[tuple[str, Cell], Any] = {
            (str(row[self.y]), row[self.x]): row[self.value] for row in self.table.rows
        }
        rows = [[self._place(cells.get((name, x))) for x in across] for name in down]
        raw = [[_number(cells.get((name, x))) for x in across] for name in down]
        zero, bar = self._scale([v for row in rows for v in row if v is not None])
        shown = [[None if v is None else round(v - zero, 4) for v in row] for row in rows]
        shape = "%{customdata:.2~%}" if unit_of(self.table, self.value) == "%" else "%{customdata:.3~g}"
        hover = f"step %{{x}}<br>%{{y}}<br>{label_of(self.value)} {shape}<extra></extra>"
        field: dict[str, Any] = {
            "type": "heatmap",
            "x": across,
            "y": list(map(label_of, down)),
            "z": shown,
            "customdata": raw,
        }
        field |= {"coloraxis": "coloraxis", "hovertemplate": hover, "hoverongaps": False}
        layout = {
            "xaxis": axis_of(self.table, self.x) | {"showgrid": False},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "dtick": 1, "automargin": True},
            "coloraxis": {"autocolorscale": True, **({} if self.middle is None else {"cmid": 0}), "colorbar": bar},
        }
        height = 110 + 16 * max(len(down), 6)
        layout["yaxis"]["tickfont"] = {"size": 11}
        return done([field], layout | _marks(self.events), height=height, legend=False)

    def _place(self, value: Any) -> float | None:
        """Where it stands on the scale."""
        if value is None or not math.isfinite(value) or (self.log and value <= 0):
            return None
        return round(math.log10(value), 3) if self.log else float(value)

    def _scale(self, places: Sequence[float]) -> tuple[float, dict[str, Any]]:
        """What counts as zero for the colours, and the bar that explains them."""
        low, high = min(places, default=0.0), max(places, default=0.0)
        zero = low if self.middle is None else float(self._place(self.middle) or 0.0)
        bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0}
        if not self.log:
            return (zero if self.middle is not None else 0.0), bar
        every = max(1, math.ceil((high - low) / 8))
        decades = [d for d in range(math.floor(low), math.ceil(high) + 1) if d % every == 0]
        bar |= {
            "tickvals": [d - zero for d in decades],
            "ticktext": [f"10{str(d).translate(_POWERS)}" for d in decades],
        }
        return zero, bar


def _number(value: Any) -> float | None:
    """Four digits, which are enough to be read off; what is not finite becomes a gap."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _marks(events: Table | None) -> Figure:
    """A line at the step of each fault, and a sign above it that says which."""
    by_step: dict[Any, list[Mapping[str, Cell]]] = {}
    for row in events.rows if events is not None else ():
        by_step.setdefault(row["step"], []).append(row)
    lines, signs = [], []
    for step, rows in list(by_step.items())[:EVENTS]:
        said = "<br>".join(label_of(f"step {step}: {row['fault']} in {row['where']}") for row in rows)
        lines.append({"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper",
                      "line": {"width": 1, "dash": "dot"}, "name": "fault"})  # fmt: skip
        signs.append({"x": step, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "text": "▼",
                      "hovertext": said, "name": "fault"})  # fmt: skip
    return {"shapes": lines, "annotations": signs} if lines else {}

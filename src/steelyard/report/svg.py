"""Pictures as SVG within the page: no script, a few kilobytes, and what is shown can be printed and mailed.

Decides where lines, bars and areas lie and what stands beside them; colours are classes of ``svg.css``. What a picture
shows is in ``plots``; those that it draws as lines, bars and areas are drawn here, others need the script of plotly.

Source: M. Bruls, K. Huizing, J. van Wijk, Squarified treemaps, 2000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from steelyard.core.table import Cell
from steelyard.errors import RecipeError, printable
from steelyard.report.plots import Bars, Line, Picture, Treemap, tree, unit_of
from steelyard.report.units import written

WIDTH = 760  # of all pictures, in units of which the page makes what its width allows
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 30, 44
_LETTER, _WIDE = 6.6, 7.0  # the width of one at 12 units of height, about; where none may be cut
_BAR, _NAMES = 11, (120.0, 320.0)  # the height of a bar; the room for names beside bars: least, most
_HUES, _SHADES = 7, 5  # that svg.css has


def drawn(picture: Picture) -> str:
    """The picture as an ``svg`` element. Raises RecipeError for a kind that is not drawn here.

    >>> from steelyard.core.table import Table
    >>> loss = Table.of("loss", {"step": "", "train": ""}, [{"step": 0, "train": 2.3}, {"step": 1, "train": 1.9}])
    >>> drawn(Line(loss, "step", ("train",))).startswith("<svg")
    True
    """
    if isinstance(picture, Line):
        height, parts = 320, _lines(picture, 320)
    elif isinstance(picture, Bars) and picture.horizontal and not picture.stacked:
        height = _TOP + _BOTTOM + len(picture.table.rows) * _group(picture)
        parts = _bars(picture, height)
    elif isinstance(picture, Treemap):
        height, parts = 420, _areas(picture, 420)
    else:
        raise RecipeError(f"{type(picture).__name__} is not drawn without a script: leave the page its script")
    described = escape(picture.described)
    return f'<svg class="drawing" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{described}">\n{parts}\n</svg>'


@dataclass(frozen=True)
class Scale:
    """Numbers along an axis as places on the page, and where its marks are."""

    low: float
    high: float
    start: float  # the place of the lowest
    end: float
    log: bool = False

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Scale:
        """A scale that holds all values with a little room; ``zero``: and the number 0."""
        values = [v for v in values if v > 0] if log else [*values, *([0.0] if zero else [])]
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if log:
            return Scale(low / 1.2, high * 1.2, start, end, log)
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        return Scale(low if zero and low == 0 else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def marks(self, most: int = 6) -> list[float]:
        """Round numbers within, about so many.

        >>> Scale(0, 2.2, 0, 100).marks(), Scale(90, 1200, 0, 1, log=True).marks()
        ([0.0, 0.5, 1.0, 1.5, 2.0], [100.0, 200.0, 500.0, 1000.0])
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                found = [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]
                if len(found) <= most + 2:
                    return found
            return found[:: math.ceil(len(found) / most)]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _lines(picture: Line, height: float) -> str:
    rows = picture.table.rows
    known = {y: [(_number(row[picture.x]), _number(row[y]), row) for row in rows] for y in picture.y}
    points = {y: [(a, b, row) for a, b, row in found if a is not None and b is not None] for y, found in known.items()}
    every = [point for found in points.values() for point in found]
    x = Scale.over([a for a, _, _ in every], _LEFT, WIDTH - _RIGHT, log=picture.log_x)
    y = Scale.over([b for _, b, _ in every], height - _BOTTOM, _TOP, log=picture.log_y, zero=True)
    units = unit_of(picture.table, picture.x), unit_of(picture.table, picture.y[0])
    parts = [_legend(picture.y), *_upright(y, units[1]), *_across(x, units[0], picture.x, height)]
    for hue, (name, found) in enumerate(points.items()):
        kind, unit = f"h{hue % _HUES}", unit_of(picture.table, name)
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b, _ in found)
        parts.append(f'<polyline class="{kind} d{hue % _HUES}" points="{path}"/>')
        for a, b, row in found if picture.marks else ():
            said = f"{_first(row)}: {written(a, units[0])}, {name} {written(b, unit)}"
            parts.append(f'<circle class="{kind}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="4">{_title(said)}</circle>')
    return "\n".join(parts)


def _bars(picture: Bars, height: float) -> str:
    table = picture.table
    values = [v for y in picture.y for v in map(_number, table.column(y)) if v is not None]
    longest = max((len(printable(str(row[picture.x]))) for row in table.rows), default=0)
    names = min(max(12 + _WIDE * longest, _NAMES[0]), _NAMES[1])
    x = Scale.over(values, names, WIDTH - _RIGHT, log=picture.log, zero=not picture.log)
    unit = unit_of(table, picture.y[0])
    parts = [_legend(picture.y), *_across(x, unit, "", height)]
    for i, row in enumerate(table.rows):
        top, name = _TOP + i * _group(picture), printable(str(row[picture.x]))
        middle = top + _BAR * len(picture.y) / 2 + 4
        parts.append(f'<text class="soft" x="{names - 8:.1f}" y="{middle:.1f}" text-anchor="end">'
                     f"{_fitting(name, (names - 12) * _LETTER / _WIDE)}{_title(name)}</text>")  # fmt: skip
        for hue, column in enumerate(picture.y):
            value = _number(row[column])
            if value is None or (picture.log and value <= 0):
                continue
            start, end = sorted((x.start if picture.log else x.at(0), x.at(value)))
            said = _title(f"{name}: {column} {written(row[column], unit)}")
            parts.append(f'<rect class="f{hue % _HUES}" x="{start:.1f}" y="{top + hue * _BAR}" '
                         f'width="{max(end - start, 0.5):.1f}" height="{_BAR - 1}">{said}</rect>')  # fmt: skip
    return "\n".join(parts)


def _group(picture: Bars) -> int:
    """The height of the bars of a row, with what parts them from the next."""
    return _BAR * len(picture.y) + 6


def _areas(picture: Treemap, height: float) -> str:
    sizes = {str(row[picture.path]): _number(row[picture.value]) or 0.0 for row in picture.table.rows}
    unit, parents = unit_of(picture.table, picture.value), tree(list(sizes))
    children: dict[str, list[str]] = {}
    for name, above in parents.items():
        children.setdefault(above, []).append(name)

    def whole(name: str) -> float:
        return sizes.get(name, 0.0) + sum(map(whole, children.get(name, ())))

    every = sum(map(whole, children.get("", ()))) or 1.0

    def parts(above: str, box: Box, depth: int) -> Iterator[str]:
        inside = sorted(((whole(n), n) for n in children.get(above, ())), reverse=True)
        own = [(sizes[above], above)] if above in sizes and inside else []
        found = [(size, name) for size, name in [*inside, *own] if size > 0]
        for (size, name), place in zip(found, squarified([size for size, _ in found], box), strict=True):
            said = f"{name}: {written(round(size), unit)}, {size / every:.1%}"
            yield _area(place, name.removeprefix(f"{above}."), written(round(size), unit), said, depth)
            if name in children and name != above and place.high > 40 and place.wide > 40:
                yield from parts(name, Box(place.x + 3, place.y + 18, place.wide - 6, place.high - 21), depth + 1)

    return "\n".join(parts("", Box(0, 4, WIDTH, height - 8), 0))


@dataclass(frozen=True)
class Box:
    """A rectangle of the page."""

    x: float
    y: float
    wide: float
    high: float


def squarified(sizes: Sequence[float], box: Box) -> list[Box]:
    """Rectangles that fill the box, with areas in proportion to sizes that fall, and as near to squares as rows allow.

    >>> [round(b.wide * b.high) for b in squarified([6, 3, 1], Box(0, 0, 10, 10))]
    [60, 30, 10]
    """
    left, scale = list(sizes), box.wide * box.high / (sum(sizes) or 1.0)
    found: list[Box] = []
    while left:
        short = min(box.wide, box.high)
        count = 1
        while count < len(left) and _worst(left[: count + 1], scale, short) <= _worst(left[:count], scale, short):
            count += 1
        row, left = left[:count], left[count:]
        deep = sum(row) * scale / short if short > 0 else 0.0
        at = 0.0
        for size in row:
            long = size * scale / deep if deep > 0 else 0.0
            upright = box.wide >= box.high
            found.append(Box(box.x, box.y + at, deep, long) if upright else Box(box.x + at, box.y, long, deep))
            at += long
        if box.wide >= box.high:
            box = Box(box.x + deep, box.y, max(box.wide - deep, 0.0), box.high)
        else:
            box = Box(box.x, box.y + deep, box.wide, max(box.high - deep, 0.0))
    return found


def _worst(row: Sequence[float], scale: float, short: float) -> float:
    """The longer side over the shorter one of the worst rectangle of a row along a side."""
    whole = sum(row) * scale
    if not whole or not short or not min(row):
        return math.inf
    return max(short**2 * max(row) * scale / whole**2, whole**2 / (short**2 * min(row) * scale))


def _area(box: Box, name: str, size: str, said: str, depth: int) -> str:
    place = f'x="{box.x + 1:.1f}" y="{box.y + 1:.1f}"'
    size_of = f'width="{max(box.wide - 2, 0.2):.1f}" height="{max(box.high - 2, 0.2):.1f}"'
    lines = []
    for i, line in enumerate((printable(name), size)):
        room = _LETTER * (4 if i == 0 else len(size)) + 10 * i  # the middle of a number is never left out
        if box.high > 18 + 15 * i and box.wide > room:
            text = _fitting(line, box.wide - 10)
            lines.append(f'<text x="{box.x + 6:.1f}" y="{box.y + 15 + 15 * i:.1f}">{text}</text>')
    return f'<g>{_title(said)}<rect class="s{min(depth, _SHADES - 1)}" rx="2" {place} {size_of}/>{"".join(lines)}</g>'


def _across(x: Scale, unit: str, name: str, height: float) -> Iterator[str]:
    """The marks of the horizontal axis, and its name."""
    for value in x.marks():
        at = x.at(value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        label = escape(_mark(value, unit))
        yield f'<text class="soft" x="{at:.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">{label}</text>'
    if name:
        middle = (x.start + x.end) / 2
        yield f'<text class="soft" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(printable(name))}</text>'


def _upright(y: Scale, unit: str) -> Iterator[str]:
    """The marks of the vertical axis."""
    for value in y.marks():
        at = y.at(value)
        yield f'<line class="{"zero" if value == 0 else "grid"}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'  # noqa: E501
        label = escape(_mark(value, unit))
        yield f'<text class="soft" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'


def _mark(value: float, unit: str) -> str:
    """A round number beside an axis, without the zeros at its end.

    >>> _mark(0.02, "pp"), _mark(2000.0, "B"), _mark(0.5, "%")
    ('+2 pp', '2 kB', '50 %')
    """
    text = written(round(value) if unit == "B" else value, unit)
    number, space, end = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{space}{end}"


def _legend(names: Sequence[str]) -> str:
    at, parts = float(_LEFT), []
    for hue, name in enumerate(names):
        parts.append(f'<rect class="f{hue % _HUES}" x="{at:.0f}" y="9" width="12" height="8"/>')
        parts.append(f'<text x="{at + 17:.0f}" y="17">{escape(printable(name))}</text>')
        at += 17 + _LETTER * len(name) + 22
    return "".join(parts) if len(names) > 1 else ""


def _first(row: Mapping[str, Cell]) -> str:
    """What a row is called: its first cell."""
    return str(next(iter(row.values())))


def _fitting(text: str, width: float) -> str:
    """The text, or its ends where it is too wide."""
    most = max(int(width / _LETTER), 1)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :] if most > 2 else ''}"
    return escape(text)


def _title(text: str) -> str:
    """What is shown when a pointer rests on it."""
    return f"<title>{escape(printable(text))}</title>"


def _number(value: Cell) -> float | None:
    """A value that has a place on an axis."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]

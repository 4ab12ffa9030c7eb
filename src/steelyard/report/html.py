"""Tables and pictures as one self-contained HTML file that opens without any network.

Decides the page: a strip of key figures, a table of contents, sections of prose, pictures and tables. Every
word from outside is escaped, and a content security policy forbids whatever would slip through: only the
scripts of this page run, by their hash, and nothing is ever fetched. A page without pictures has no script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steelyard.core.table import Cell, Column, Table
from steelyard.errors import MissingExtraError, printable
from steelyard.report.plots import Picture
from steelyard.report.svg import drawn
from steelyard.report.units import is_number, written

_LONG = 24  # rows; a longer table begins closed
_WORD = 18  # characters of a cell that is not broken into lines
_WIDE = 8  # columns; a table of more is set closer
_DATA = 400  # rows; the numbers behind a larger picture are left to JSON


@dataclass(frozen=True)
class KeyFigure:
    """One number of the strip at the top: what it is, its value in a unit of Column, and a word of context."""

    label: str
    value: Cell
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, prose, and what it speaks of.

    In ``text``, an empty line parts paragraphs, lines that begin with ``- `` are a list, and `` `words` `` between
    backquotes are code; everything else is shown as it is.
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Page:
    """A report. ``meta`` stands below the title: where the numbers come from."""

    title: str
    sections: Sequence[Section]
    meta: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[KeyFigure] = ()
    lead: str = ""
    light: bool = False  # lines, bars and areas are drawn beforehand: some kilobytes, and no script, for all to look at

    @staticmethod
    def of(tables: Sequence[Table], title: str = "") -> Page:
        """The page of some tables, each in a section of its own."""
        headings = [table.title[:1].upper() + table.title[1:] for table in tables]
        sections = [Section(heading, tables=[table]) for heading, table in zip(headings, tables, strict=True)]
        return Page(title or (headings or ["Report"])[0], sections)


def write_html(page: Page, path: str | Path) -> int:
    """Write `page` to `path`, whole or not at all, and return its size in bytes.

    Raises FormatError where the file cannot be written, and MissingExtraError where plotly is not installed.
    """
    from steelyard.formats.base import replacing

    content = render(page).encode()
    with replacing(Path(path)) as file:
        file.write(content)
    return len(content)


def render(page: Page) -> str:
    """The page as the text of one HTML file.

    >>> "<script" in render(Page("A <b>", [Section("One", "Text.")]))
    False
    """
    pictures = any(section.pictures for section in page.sections)
    style = asset("svg.css") if pictures and page.light else ""
    body = f"{head(page)}\n{content(page)}\n{_footer()}"
    return document(page.title, body, scripts(pictures and not page.light), style=style)


def scripts(pictures: bool) -> list[str]:
    """What a page with pictures runs: plotly, and what draws them in the colours of the page."""
    return [_plotly(), asset("page.js")] if pictures else []


def document(title: str, body: str, scripts: Sequence[str], more: str = "", style: str = "") -> str:
    """A whole file of HTML. ``more``: what the content security policy allows besides; ``style``: besides page.css."""
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}{more}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="steelyard">\n<title>{escape(title)}</title>',
            f'<style>\n{asset("page.css")}{style}</style>\n</head>\n<body>\n<div class="page">\n{body}\n</div>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        )
    )


def content(page: Page, numbers: bool = True) -> str:
    """The sections beside their table of contents. ``numbers``: with those behind each picture."""
    names = _anchors(page.sections)
    counter = iter(range(sum(len(section.pictures) for section in page.sections)))
    parts = [_section(s, name, counter, numbers, page.light) for s, name in zip(page.sections, names, strict=True)]
    contents = _contents(page.sections, names) if len(page.sections) > 2 else ""
    body = "\n".join(parts)
    return f'<div class="columns{"" if contents else " single"}">{contents}\n<main>\n{body}\n</main>\n</div>'


def _policy(scripts: Sequence[str]) -> str:
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    allowed = " ".join(hashes) or "'none'"
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The script of the installed plotly package, which is found but not imported."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise MissingExtraError("a page with pictures", "plotly", "web")
    source = (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def head(page: Page) -> str:
    """The title, what stands below it, and the strip of key figures."""
    pairs = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v if isinstance(v, str) else written(v))}</dd></div>"
        for k, v in page.meta.items()
    )
    meta = f'\n<dl class="meta">{pairs}</dl>' if pairs else ""
    cards = "".join(
        f'<div><dt>{escape(f.label)}</dt><dd class="value">{escape(written(f.value, f.unit))}</dd>'
        f'<dd class="note">{escape(f.note)}</dd></div>'
        for f in page.figures
    )
    strip = f'\n<dl class="figures">{cards}</dl>' if cards else ""
    lead = f'\n<div class="lead">{_prose(page.lead)}</div>' if page.lead else ""
    return f"<header>\n<h1>{escape(page.title)}</h1>{meta}{lead}{strip}\n</header>"


def _footer() -> str:
    from steelyard import __version__

    return (
        f"<footer><p>Written by Steelyard {__version__}. The file holds everything it shows and fetches nothing. "
        "1 kB is 1000 bytes.</p></footer>"
    )


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Readable, unique and harmless fragment names."""
    names: list[str] = []
    for section in sections:
        base = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-") or "section"
        name, n = base, 2
        while name in names:
            name, n = f"{base}-{n}", n + 1
        names.append(name)
    return names


def _contents(sections: Sequence[Section], names: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{n}">{escape(s.heading)}</a></li>' for s, n in zip(sections, names, strict=True))
    return f'\n<nav aria-label="Contents"><h2>Contents</h2><ol>{items}</ol></nav>'


def _section(section: Section, name: str, counter: Iterator[int], numbers: bool, light: bool) -> str:
    parts = [f'<section id="{name}">', f"<h2>{escape(section.heading)}</h2>", _prose(section.text)]
    parts += [_drawn(p, numbers) if light else _picture(p, next(counter), numbers) for p in section.pictures]
    parts.append(tables(section) and f'<div class="tables">\n{tables(section)}\n</div>')
    return "\n".join([*filter(None, parts), "</section>"])


def tables(section: Section) -> str:
    """The tables of a section, below each other."""
    return "\n".join(_titled(table, section.heading) for table in section.tables)


def _prose(text: str) -> str:
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines and all(line.startswith("- ") for line in lines):
            blocks.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif lines:
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _picture(picture: Picture, number: int, numbers: bool) -> str:
    figure = picture.figure()
    title = picture.title or picture.table.title
    height = figure["layout"]["height"]
    return (
        f'<figure>\n<figcaption id="c{number}">{escape(title)}</figcaption>\n'
        f'<div class="plot waiting" role="img" aria-label="{escape(picture.described)}" '
        f'data-figure="f{number}" style="min-height:{height}px"></div>\n'
        f'<script type="application/json" id="f{number}">{data(figure)}</script>\n'
        f"<noscript><p>This picture is drawn by a script; its numbers are below.</p></noscript>\n"
        f"{_behind(picture.table) if numbers else ''}</figure>"
    )


def _drawn(picture: Picture, numbers: bool) -> str:
    behind = _behind(picture.table) if numbers else ""
    title = escape(picture.title or picture.table.title)
    return f"<figure>\n<figcaption>{title}</figcaption>\n{drawn(picture)}\n{behind}</figure>"


def _behind(table: Table) -> str:
    """The numbers that a picture shows, for who cannot see it or wants to check it."""
    nested = any(isinstance(v, Sequence) and not isinstance(v, str) for row in table.rows for v in row.values())
    if nested or not table.rows or len(table.rows) > _DATA:
        return ""
    return f'<details class="data"><summary>The numbers ({len(table.rows)} rows)</summary>{_table(table)}</details>\n'


def _titled(table: Table, heading: str) -> str:
    title = escape(table.title)
    if len(table.rows) > _LONG:
        summary = f"<summary><b>{title}</b> <span>{len(table.rows):,} rows</span></summary>"
        return f'<details class="table long">{summary}{_table(table)}{_notes(table)}</details>'
    head = "" if table.title.lower() == heading.lower() else f'<div class="title">{title}</div>'
    return f'<div class="table">{head}{_table(table)}{_notes(table)}</div>'


def _table(table: Table) -> str:
    label = f'role="region" aria-label="{escape(table.title)}" tabindex="0"'
    if not table.rows:
        return "<p>No rows.</p>"
    if len(table.rows) == 1:
        rows = "".join(_record_row(c, table.rows[0][c.name]) for c in table.columns)
        return f'<div class="scroll" {label}><table class="record"><tbody>{rows}</tbody></table></div>'
    numeric = {c.name for c in table.columns if _is_numeric(table.rows, c.name)}
    heads = "".join(_th(c, c.name in numeric) for c in table.columns)
    rows = "".join(f"<tr>{_cells(table.columns, row, numeric)}</tr>\n" for row in table.rows)
    wide = " class=wide" if len(table.columns) > _WIDE else ""
    return (
        f'<div class="scroll" {label}><table{wide}><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    )


def _is_numeric(rows: Sequence[Mapping[str, Cell]], name: str) -> bool:
    values = [row[name] for row in rows if row[name] is not None]
    return bool(values) and all(map(is_number, values))


def _th(column: Column, right: bool) -> str:
    about = f' title="{escape(column.about)}"' if column.about else ""
    return f'<th scope="col"{about}{" class=n" if right else ""}>{escape(column.name)}</th>'


def _cells(columns: Sequence[Column], row: Mapping[str, Cell], numeric: set[str]) -> str:
    cells = []
    for i, column in enumerate(columns):
        value, text = row[column.name], escape(written(row[column.name], column.unit))
        exact = f' title="{value:,} bytes"' if column.unit == "B" and isinstance(value, int) else ""
        if i == 0 and column.name not in numeric:
            cells.append(f'<th scope="row">{text}</th>')
        else:
            kind = "n" if column.name in numeric else "w" if len(text) <= _WORD else ""
            cells.append(f"<td{f' class={kind}' if kind else ''}{exact}>{text}</td>")
    return "".join(cells)


def _record_row(column: Column, value: Cell) -> str:
    about = f' title="{escape(column.about)}"' if column.about else ""
    text = escape(written(value, column.unit, exact=True))
    return f'<tr><th scope="row"{about}>{escape(column.name)}</th><td>{text}</td></tr>'


def _notes(table: Table) -> str:
    known = {k: v for k, v in table.meta.items() if k not in ("steelyard", "python")}
    plain = [f"{escape(k)}: {escape(written(v))}" for k, v in known.items() if isinstance(v, (str, int, float))]
    return f'<p class="notes">{" · ".join(plain)}</p>' if plain else ""


def data(values: Any) -> str:
    """JSON that may stand inside a script element: no '<' in it can end the element or begin a comment."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def escape(text: object) -> str:
    """Text for HTML, quotes included; control characters become visible."""
    return html.escape("".join(c if c == "\n" else printable(c) for c in str(text)))

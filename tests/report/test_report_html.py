"""Pictures and the page: what is drawn is what the tables say, and nothing hostile gets through."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from steelyard.core.table import Table
from steelyard.errors import FormatError, RecipeError, UnknownNameError
from steelyard.report.html import KeyFigure, Page, Section, render, write_html
from steelyard.report.plots import Bars, Histogram, Images, Line, Picture, Scatter, Treemap

import demo

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\u2028{{}}`x`"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """The elements of a page, their attributes, and the text of each script."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def run(self):
        return [text for attributes, text in self.scripts if attributes.get("type") != "application/json"]

    @property
    def figures(self):
        return [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]


def hostile_page():
    rows = [{"name": HOSTILE, "group": HOSTILE, "n": 1.0}, {"name": "b", "group": "x", "n": 2.0}]
    table = Table.of(HOSTILE, {"name": "", "group": "", "n": ""}, rows, {HOSTILE: HOSTILE})
    pictures = [
        Line(table, "n", ("n",), by="group", title=HOSTILE, alt=HOSTILE),
        Bars(table, "name", ("n",)),
        Treemap(table, "name", "n"),
        Scatter(table, "n", "n", label="name"),
    ]
    figure = KeyFigure(HOSTILE, HOSTILE, note=HOSTILE)
    section = Section(HOSTILE, HOSTILE + "\n\n- " + HOSTILE, [table], pictures)
    return Page(HOSTILE, [section] * 3, {HOSTILE: HOSTILE}, [figure], HOSTILE)


def test_a_hostile_name_stays_text():
    page = Outline(render(hostile_page()))
    assert len(page.run) == 2  # plotly and ours
    assert not page.open
    assert "img" not in [tag for tag, _ in page.tags]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert page.figures[0]["data"][0]["name"].startswith("&lt;/script&gt;")
    assert page.figures == json.loads(json.dumps([p.figure() for p in hostile_page().sections[0].pictures] * 3))


@dataclass(frozen=True)
class Raw(Picture):
    """A picture that takes no care of its words."""

    table: Table
    title: str = ""
    alt: str = ""

    def figure(self):
        return {"data": [{"name": HOSTILE}], "layout": {"height": 100}}


def test_a_figure_cannot_leave_its_script():
    content = render(Page("x", [Section("x", pictures=[Raw(demo.stages_table())])]))
    page = Outline(content)
    assert not page.open
    assert len(page.run) == 2
    assert page.figures[0]["data"][0]["name"] == HOSTILE


@pytest.mark.parametrize("make", [demo.page, hostile_page])
def test_only_our_scripts_may_run_and_nothing_is_fetched(make):
    content = render(make())
    page = Outline(content)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"'(sha256-[^']+)'", policy))
    digests = {f"sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}" for s in page.run}
    assert digests == allowed
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert tag not in {"link", "iframe", "object"}
        assert attributes.get("href", "#").startswith("#")
    assert "showSendToCloud: false" in page.run[1]


def test_no_script_without_a_picture():
    page = Outline(render(Page.of([demo.stages_table(), demo.tensor_table()])))
    assert page.scripts == []
    assert not page.open
    assert "97.57 %" in page.text


def test_a_heading_keeps_its_capitals_and_is_not_said_twice():
    content = render(Page.of([Table.of("agreement of ONNX", {"x": ""}, [{"x": 1}])]))
    assert "<h2>Agreement of ONNX</h2>" in content
    assert 'class="title"' not in content
    assert 'class="title"' in render(Page("x", [Section("Other", tables=[demo.stages_table()])]))


def test_every_number_of_a_picture_is_beside_it():
    page = Outline(render(demo.page()))
    assert "The numbers (4 rows)" in page.text
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "img")
    headings = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert links == headings
    assert len(set(headings)) == len(headings)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "page.html"
    size = write_html(Page.of([demo.stages_table()]), path)
    assert path.stat().st_size == size
    before = path.read_bytes()
    table = demo.stages_table()
    with pytest.raises(UnknownNameError):
        write_html(Page("x", [Section("x", pictures=[Line(table, "step", ("x",))])]), path)
    assert path.read_bytes() == before
    with pytest.raises(FormatError):
        write_html(Page.of([table]), tmp_path / "missing" / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_line_takes_a_trace_for_each_column_and_each_group():
    table = demo.loss_table()
    figure = Line(table, "step", ("training loss", "held-out loss"), log_y=True).figure()
    assert [trace["name"] for trace in figure["data"]] == ["training loss", "held-out loss"]
    assert figure["data"][1]["y"] == table.column("held-out loss")
    assert figure["layout"]["yaxis"]["type"] == "log"
    runs = Table.of("r", {"x": "", "y": "", "run": ""}, [{"x": i, "y": i, "run": i % 2} for i in range(4)])
    assert [trace["x"] for trace in Line(runs, "x", ("y",), by="run").figure()["data"]] == [[0, 2], [1, 3]]


def test_bars_keep_the_order_of_the_rows():
    table = demo.bytes_table()
    figure = Bars(table, "tensor", ("mask", "codes"), stacked=True).figure()
    assert figure["layout"]["barmode"] == "stack"
    assert figure["data"][0]["y"] == table.column("tensor")
    assert figure["data"][1]["x"] == table.column("codes")
    upright = Bars(table, "tensor", ("mask",), horizontal=False).figure()
    assert upright["data"][0]["x"] == table.column("tensor")


def test_histogram_draws_between_the_edges():
    table = demo.histogram_table()
    figure = Histogram(table, "from", "to", "count", by="when", facet="tensor").figure()
    assert len(figure["data"]) == 8
    first = figure["data"][0]
    assert first["x"][0] + first["width"][0] == pytest.approx(table.rows[0]["to"])
    assert sum(first["y"]) == sum(r["count"] for r in table.rows[:40])
    assert [trace["showlegend"] for trace in figure["data"]] == [True, True] + [False] * 6
    alone = Histogram(Table.of("h", {"a": "", "b": "", "n": ""}, [{"a": 0, "b": 1, "n": 5}]), "a", "b", "n").figure()
    assert alone["data"][0]["y"] == [5]


def test_scatter_draws_the_interval_it_was_given():
    table = demo.stages_table()
    trace = Scatter(table, "file", "accuracy", "low", "high", "stage").figure()["data"][0]
    for i, row in enumerate(table.rows):
        assert trace["y"][i] + trace["error_y"]["array"][i] == pytest.approx(row["high"])
        assert trace["y"][i] - trace["error_y"]["arrayminus"][i] == pytest.approx(row["low"])
    assert trace["textposition"] == ["top left", "bottom right", "top right", "bottom right"]


def test_images_lie_side_by_side_with_gaps():
    tiles = [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, float("nan")]]]
    table = Table.of("tiles", {"image": ""}, [{"image": tile} for tile in tiles])
    sheet = Images(table, "image", across=2).figure()["data"][0]["z"]
    assert sheet == [[1.0, 2.0, None, 3.0, 4.0], [None] * 5, [5.0, None, None, None, None]]
    with pytest.raises(RecipeError, match="one size"):
        Images(Table.of("t", {"i": ""}, [{"i": [[1]]}, {"i": [[1, 2]]}]), "i").figure()


def test_treemap_leaves_hold_all_bytes_and_lonely_branches_vanish():
    table = demo.tensor_table()
    trace = Treemap(table, "name", "bytes").figure()["data"][0]
    assert sum(trace["values"]) == sum(table.column("bytes"))
    assert set(trace["parents"]) <= {*trace["ids"], ""}
    assert trace["parents"].count("") == 1
    assert "transformer" not in trace["ids"]  # it holds nothing but transformer.h


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium in the path")
def test_a_browser_draws_every_picture(tmp_path):
    page = tmp_path / "page.html"
    write_html(demo.page(), page)
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --window-size=1200,6000 --virtual-time-budget=20000"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    drawn = re.findall(r'class="plot[^"]*js-plotly-plot"', found)
    assert len(drawn) == sum(len(section.pictures) for section in demo.page().sections)

"""Pictures that need no script: every number has its mark, areas are in proportion, and nothing from outside acts."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from steelyard.core.table import Column, Table
from steelyard.errors import RecipeError
from steelyard.report.html import Page, Section, render
from steelyard.report.plots import Bars, Images, Line, Picture, Treemap
from steelyard.report.svg import Box, Scale, drawn, squarified

SIZES = Table.of("sizes", [Column("candidate"), Column("bytes", "B"), Column("loss", "pp"), Column("tolerance", "pp")], [
    {"candidate": "8 bits", "bytes": 151_000, "loss": 0.0, "tolerance": 0.02},
    {"candidate": "<b>3 & 4</b>", "bytes": 24_000, "loss": 0.005, "tolerance": 0.02},
    {"candidate": "1 bit", "bytes": 8_000, "loss": None, "tolerance": 0.02}])  # fmt: skip
TENSORS = Table.of("tensors", [Column("tensor"), Column("before", "B"), Column("bytes", "B")], [
    {"tensor": "a.weight", "before": 4000, "bytes": 600}, {"tensor": "a.bias", "before": 100, "bytes": 0},
    {"tensor": "b.weight", "before": 900, "bytes": 300}, {"tensor": "the header", "before": 0, "bytes": 100}])  # fmt: skip


def parsed(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(drawn(picture))


def test_each_known_number_of_a_line_has_a_mark_that_says_it() -> None:
    svg = parsed(Line(SIZES, "bytes", ("loss", "tolerance"), log_x=True, marks=True))
    said = [circle.findtext("title") for circle in svg.iter("circle")]
    assert len(said) == 2 + 3
    assert "<b>3 & 4</b>: 24.0 kB, loss +0.50 pp" in said
    assert len(list(svg.iter("polyline"))) == 2
    labels = [text.text for text in svg.iter("text")]
    assert {"loss", "tolerance", "bytes"} <= set(labels)
    assert "+1 pp" in labels
    assert "%" not in "".join(map(str, labels)), "points are called what tables call them"
    assert {"10 kB", "100 kB"} <= set(labels)


def test_larger_is_further_right_and_worse_is_higher() -> None:
    circles = list(parsed(Line(SIZES, "bytes", ("loss",), marks=True)).iter("circle"))
    first, second = ((float(c.get("cx", "")), float(c.get("cy", ""))) for c in circles)
    assert first[0] > second[0]
    assert first[1] > second[1]


def test_bars_are_as_long_as_the_decades_they_span() -> None:
    table = Table.of("t", [Column("name"), Column("bytes", "B")], [{"name": n, "bytes": v} for n, v in
                     (("a", 10), ("b", 1000), ("c", 100_000), ("none", 0))])  # fmt: skip
    svg = parsed(Bars(table, "name", ("bytes",), log=True))
    lengths = [float(rect.get("width", "")) for rect in svg.iter("rect")]
    assert len(lengths) == 3, "nothing has no place on a logarithmic axis"
    assert lengths[2] - lengths[1] == pytest.approx(lengths[1] - lengths[0], abs=0.2)


def test_areas_are_in_proportion_and_within() -> None:
    svg = parsed(Treemap(TENSORS, "tensor", "bytes"))
    areas = {group.findtext("title", "").split(":")[0]: group.find("rect") for group in svg.iter("g")}
    assert set(areas) == {"a", "a.weight", "b.weight", "the header"}, "what takes nothing has no area"
    size = {name: (float(r.get("width", "")) + 2) * (float(r.get("height", "")) + 2) for name, r in areas.items()}
    assert size["a"] / size["b.weight"] == pytest.approx(2, rel=0.01)
    assert size["b.weight"] / size["the header"] == pytest.approx(3, rel=0.01)
    assert "600 B, 60.0%" in "".join(group.findtext("title", "") for group in svg.iter("g"))


@pytest.mark.parametrize("sizes", [[6.0, 3, 1], [1.0] * 17, [1000.0, 1, 1, 1e-9], [5.0]])
def test_rectangles_fill_the_box_and_do_not_overlap(sizes: list[float]) -> None:
    found = squarified(sizes, Box(10, 20, 300, 200))
    assert sum(b.wide * b.high for b in found) == pytest.approx(300 * 200)
    for size, box in zip(sizes, found, strict=True):
        assert box.wide * box.high == pytest.approx(size / sum(sizes) * 300 * 200)
        assert box.x >= 10 - 1e-6
        assert box.x + box.wide <= 310 + 1e-6
        assert box.y + box.high <= 220 + 1e-6
    for i, a in enumerate(found):
        for b in found[:i]:
            wide = min(a.x + a.wide, b.x + b.wide) - max(a.x, b.x)
            high = min(a.y + a.high, b.y + b.high) - max(a.y, b.y)
            assert min(wide, high) <= 1e-6


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1e-9, False), (5, 5, False), (1, 1, True), (1e-3, 1e9, True), (-3, 4, False)]
)
def test_an_axis_has_a_few_marks_whatever_it_spans(low: float, high: float, log: bool) -> None:
    scale = Scale.over([low, high], 0, 100, log=log)
    assert all(0 <= scale.at(value) <= 100 for value in (low, high))
    assert len(scale.marks()) <= 9
    assert all(-1e-6 <= scale.at(mark) <= 100 + 1e-6 for mark in scale.marks())


def test_pictures_of_nothing_are_drawn() -> None:
    empty = Table.of("none", [Column("a"), Column("b", "B")], [])
    for picture in (Line(empty, "a", ("b",)), Bars(empty, "a", ("b",), log=True), Treemap(empty, "a", "b")):
        parsed(picture)


def test_a_light_page_has_its_pictures_without_a_script() -> None:
    pictures = [Line(SIZES, "bytes", ("loss",)), Bars(TENSORS, "tensor", ("before", "bytes"), log=True),
                Treemap(TENSORS, "tensor", "bytes")]  # fmt: skip
    text = render(Page("Small", [Section("One", "", [SIZES], pictures)], light=True))
    assert text.count('<svg class="drawing"') == 3
    assert "<script" not in text
    assert "script-src 'none'" in text
    assert len(text) < 60_000
    used = set(re.findall(r'class="([hfs]\d)', text))
    assert used
    assert all(f".drawing .{name}" in text for name in used), "each colour is one of the page"
    assert "<b>3" not in text


def test_what_is_not_drawn_says_so() -> None:
    images = Table.of("images", {"image": ""}, [{"image": [[0.0, 1.0], [1.0, 0.0]]}])
    with pytest.raises(RecipeError, match="Images is not drawn without a script"):
        drawn(Images(images, "image"))

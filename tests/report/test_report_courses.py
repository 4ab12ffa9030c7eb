"""Pictures over time: bands, fields of layers, marks of faults; and the page of a watched training."""

from __future__ import annotations

import json
import math
import re

import pytest

from steelyard.core.table import Table
from steelyard.learn.watch.course import Course
from steelyard.learn.watch.log import Log
from steelyard.learn.watch.reading import read_log
from steelyard.report.courses import EVENTS, Bands, Field
from steelyard.report.html import render
from steelyard.report.watched import page

FAULTS = Table.of("faults", {"step": "", "fault": "", "where": ""}, [
    {"step": 4, "fault": "dead ReLU", "where": "a"}, {"step": 4, "fault": "NaN", "where": "<b>"}])  # fmt: skip


def test_a_band_lies_between_its_edges():
    row = {"step": 3, "low": 1.0, "mean": 2.0, "high": math.nan}
    table = Table.of("loss", dict.fromkeys(row, ""), [row])
    low, high, line = Bands(table, "step", (("low", "high"),), "mean").figure()["data"]
    assert (low["y"], low["fill"]) == ([1.0], "none")
    assert (high["y"], high["fill"]) == ([None], "tonexty")
    assert line["y"] == [2.0]


def test_a_field_is_placed_on_decades_around_its_middle():
    rows = [{"step": s, "layer": layer, "ratio": r} for s, layer, r in
            ((0, "a", 1e-5), (0, "b", 1e-3), (10, "a", 1e-2), (10, "b", 0.0), (20, "a", None))]  # fmt: skip
    table = Table.of("t", {"step": "", "layer": "", "ratio": "x"}, rows)
    figure = Field(table, "step", "layer", "ratio", log=True, middle=1e-3).figure()
    field, axis = figure["data"][0], figure["layout"]["coloraxis"]
    assert field["x"] == [0, 10, 20]
    assert field["y"] == ["a", "b"]
    assert field["z"] == [[pytest.approx(-2), pytest.approx(1), None], [pytest.approx(0), None, None]]
    assert axis["cmid"] == 0
    ticks = dict(zip(axis["colorbar"]["ticktext"], axis["colorbar"]["tickvals"], strict=True))
    assert ticks["10⁻⁵"] == pytest.approx(-2)
    assert field["customdata"] == [[1e-5, 1e-2, None], [1e-3, 0.0, None]]


def test_a_field_of_shares_keeps_its_values():
    table = Table.of("t", {"step": "", "layer": "", "dead": "%"}, [{"step": 0, "layer": "a", "dead": 0.25}])
    figure = Field(table, "step", "layer", "dead").figure()
    assert figure["data"][0]["z"] == [[0.25]]
    assert "%{customdata:.2~%}" in figure["data"][0]["hovertemplate"]


def test_faults_are_marked_once_for_each_step():
    table = Table.of("t", {"step": "", "y": ""}, [{"step": 0, "y": 1.0}])
    layout = Bands(table, "step", (), "y", events=FAULTS).figure()["layout"]
    assert [line["x0"] for line in layout["shapes"]] == [4]
    assert layout["annotations"][0]["hovertext"] == "step 4: dead ReLU in a<br>step 4: NaN in &lt;b&gt;"
    many = Table.of("faults", {"step": "", "fault": "", "where": ""},
                    [{"step": s, "fault": "NaN", "where": "a"} for s in range(30)])  # fmt: skip
    assert len(Bands(table, "step", (), "y", events=many).figure()["layout"]["shapes"]) == EVENTS


def watched(path, steps=20):
    log = Log(path, {"model": "<Net>"})
    log.add("tensors", [("a.weight", "2x3", "float32", 1)])
    for step in range(steps):
        log.add("steps", [(step, 0.5 * step, 0.1, 1.0, 1e-3)])
        log.add("norms", [(step, "a.weight", 1.0, 2.0, 0.5, 1e-3)])
        log.add("layers", [(step, "a", "Linear", "healthy", 1.0, 1.0, 0.1, 0.25, None, None, None)])
        log.add("notes", [(step, "loss", 2.0)])
    log.add("faults", [(3, "NaN", "a", "error", "<i>seen</i>", "mend")])
    log.close()
    course = Course(read_log(path))
    course.update()
    return course


def test_the_page_shows_every_part(tmp_path):
    text = render(page(watched(tmp_path / "log")))
    for heading in ("Faults", "Loss", "Updates", "Gradient and rate", "Layers", "Tensors"):
        assert f"<h2>{heading}</h2>" in text
    assert "<i>seen" not in text
    assert "Training of &lt;Net&gt;" in text
    figures = [
        json.loads(found) for found in re.findall(r'<script type="application/json" id="f\d+">(.*?)</script>', text)
    ]
    assert [f["data"][0]["type"] for f in figures].count("heatmap") == 4  # ratios, activations, gradients, dead units


def test_the_page_of_a_training_that_has_not_begun(tmp_path):
    Log(tmp_path / "log").close()
    course = Course(read_log(tmp_path / "log"))
    course.update()
    assert "None was named so far" in render(page(course))

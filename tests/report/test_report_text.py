"""Tables as text and as data."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.core.table import Column, Table
from steelyard.report.data import csv_text, json_lines
from steelyard.report.text import cells, text
from steelyard.report.units import written

from demo import stages_table, tensor_table


def test_text_of_stages(golden):
    golden(text(stages_table()))


def test_text_of_one_row(golden):
    golden(text(Table.of("total", {"tensors": "", "bytes": "B", "held": ""}, [{"tensors": 3, "bytes": 1234567}])))


def test_text_on_a_terminal(golden):
    golden(text(tensor_table(), width=60, colour=True))


def test_text_on_a_narrow_terminal(golden):
    golden(text(stages_table(), width=30))


def test_names_are_never_cut_to_look_alike():
    narrow = text(tensor_table(), width=76)
    assert "…" in narrow
    lines = narrow.splitlines()[3:]
    assert len(set(lines)) == len(tensor_table().rows)


def test_text_of_awkward_cells(golden):
    rows = [
        {"word": "a\x1b[31mred\nnext", "number": math.nan, "list": [], "flag": True},
        {"word": "漢字", "number": -math.inf, "list": [1, 2], "flag": False},
        {"word": None, "number": 1e-9, "list": ["a", 0.5], "flag": None},
    ]
    golden(text(Table.of("awkward\r", {"word": "", "number": "", "list": "", "flag": ""}, rows)))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.00 kB"),
        (9994, "B", "9.99 kB"),
        (9996, "B", "10.0 kB"),
        (999_499, "B", "999 kB"),
        (999_500, "B", "1.00 MB"),
        (5 * 10**12, "B", "5.00 TB"),
        (-2500, "B", "-2.50 kB"),
        (0.12345, "%", "12.35 %"),
        (0.005, "pp", "+0.50 pp"),
        (30, "x", "30×"),
        (1234.5, "x", "1,234×"),
        (0, "s", "0 s"),
        (2.5e-6, "s", "2.50 µs"),
        (0.9996, "s", "1.00 s"),
        (61, "s", "61.0 s"),
        (125, "s", "2 min 05 s"),
        (7325, "s", "2 h 02 min"),
        (4.129, "bits", "4.13 bits"),
        (12345, "", "12,345"),
        (1234, "", "1234"),
        (0.000123456, "", "0.0001235"),
    ],
)
def test_units(value, unit, expected):
    assert written(value, unit) == expected


names = st.text(min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, st.integers(0, 10**12)), min_size=2, max_size=6), st.integers(20, 100))
def test_a_terminal_is_never_overrun_and_a_pipe_never_cut(pairs, width):
    table = Table("t", (Column("name"), Column("bytes", "B")), tuple({"name": n, "bytes": b} for n, b in pairs))
    narrow = text(table, width)
    if "─" in narrow:
        assert all(cells(line) <= width for line in narrow.splitlines())
    whole = text(table)
    assert all(written(n) in whole for n, _ in pairs)
    assert all(c.isprintable() or c == "\n" for c in whole)
    assert len(whole.splitlines()) == len(pairs) + 3


def test_notes_are_broken_between_words_on_a_terminal_alone():
    table = Table("t", (Column("n"),), ({"n": 1},), {"method": "compared bit by bit-wise means, " * 5, "sha": "f" * 70})
    whole = text(table).splitlines()
    narrow = text(table, width=60, colour=True).replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    assert len(whole) == 3
    assert " ".join(narrow[2:]) == whole[2]
    assert narrow[-1] == "f" * 70  # what is one word stays one
    assert all(cells(line) <= 60 for line in narrow[:-1])


def test_no_escapes_without_colour():
    assert "\x1b" not in text(stages_table(), width=80)
    assert "\x1b[1m" in text(stages_table(), width=80, colour=True)


def test_json_is_one_object_for_each_table_and_complete():
    tables = [stages_table(), tensor_table()]
    found = [json.loads(line) for line in json_lines(tables).splitlines()]
    for data, table in zip(found, tables, strict=True):
        assert set(data) == {"title", "columns", "rows", "meta"}
        assert [(c["name"], c["unit"]) for c in data["columns"]] == [(c.name, c.unit) for c in table.columns]
        assert data["rows"] == [dict(row) for row in table.rows]


def test_json_has_no_number_that_json_lacks():
    line = json_lines([Table.of("t", {"x": ""}, [{"x": math.nan}, {"x": math.inf}])])
    assert [row["x"] for row in json.loads(line, parse_constant=pytest.fail)["rows"]] == ["NaN", "Infinity"]


def test_csv_reads_back():
    table = Table.of(
        "t", {"a": "", "b": "B", "c": ""}, [{"a": 'x,"', "b": 12345678, "c": [3, 4]}, {"b": 0.1, "c": True}]
    )
    assert list(csv.reader(io.StringIO(csv_text(table), newline=""))) == [
        ["a", "b", "c"],
        ['x,"', "12345678", "3x4"],
        ["", "0.1", "true"],
    ]


def test_csv_escapes_what_steers_a_terminal():
    table = Table.of("t", {"a\r": "", "b": ""}, [{"a\r": "\x1b[31mred\n", "b": ["\x9b1m", "ü"]}])
    assert csv_text(table) == "a\\r,b\n\\x1b[31mred\\n,\\x9b1m;ü\n"

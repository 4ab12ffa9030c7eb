from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.table import Column, Table
from steelyard.errors import UnknownNameError


def test_rows_are_complete_and_numbers_are_numbers():
    t = Table.of("t", {"a": "B", "b": ""}, [{"a": np.int64(3)}, {"b": np.float32(0.5), "a": np.array(4)}])
    assert t.rows == ({"a": 3, "b": None}, {"a": 4, "b": 0.5})
    assert type(t.rows[0]["a"]) is int
    assert type(t.rows[1]["b"]) is float
    assert t.column("a") == [3, 4]


def test_columns_given_as_objects_keep_what_they_mean():
    t = Table.of("t", [Column("a", "s", "how long")], [])
    assert t.to_data()["columns"] == [{"name": "a", "unit": "s", "about": "how long"}]


def test_json_is_valid_whatever_the_numbers():
    rows = [{"a": float("nan"), "b": [np.float64("inf"), -np.inf, 1, "x", None, True]}]
    data = json.loads(Table.of("t", {"a": "", "b": ""}, rows, {"seed": 3, "when": {"x": float("nan")}}).to_json())
    assert data["rows"] == [{"a": "NaN", "b": ["Infinity", "-Infinity", 1, "x", None, True]}]
    assert data["meta"]["seed"] == 3
    assert data["meta"]["when"] == {"x": "NaN"}
    assert set(data["meta"]) == {"seed", "when", "steelyard", "python"}


def test_wrong_names():
    with pytest.raises(UnknownNameError, match="no unit 'MB'"):
        Column("a", "MB")
    with pytest.raises(UnknownNameError, match="no column 'bytse'; did you mean 'bytes'"):
        Table.of("t", {"bytes": "B"}, [{"bytse": 1}])
    with pytest.raises(UnknownNameError, match="no column 'x'"):
        Table.of("t", {"bytes": "B"}, []).column("x")

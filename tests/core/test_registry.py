from __future__ import annotations

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest

from steelyard.core.registry import Registry, Row
from steelyard.errors import MissingExtraError, UnknownNameError

ROWS = {
    "json": Row("json:JSONEncoder", "an example"),
    "extra": Row("no_such_package.module:Thing", "needs something", "learn"),
    "broken": Row("no_such_package:Thing", "needs something, and nobody knows what"),
    "ours": Row("steelyard.no_such_module:Thing", "a mistake of ours", "learn"),
}


def table():
    return Registry("gadget", "gadgets", ROWS)


def entry(name, value, dist="plug"):
    return SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name=dist) if dist else None)


@pytest.fixture
def plugged(monkeypatch):
    found = [entry("theirs", "json:JSONDecoder"), entry("json", "json:JSONDecoder"), entry("loose", "json:loads", None)]
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: asked.append(group) or found)
    return asked


def test_a_row_is_imported_when_it_is_asked_for_and_not_before():
    sys.modules.pop("this_is_lazy", None)
    t = Registry("gadget", "gadgets", {"a": Row("this_is_lazy:x"), **ROWS})
    assert "a" in t
    assert list(t)[:2] == ["a", "json"]
    assert len(t) == 5
    assert t["json"] is json.JSONEncoder


def test_what_is_missing_is_said_with_its_remedy():
    with pytest.raises(UnknownNameError, match="there is no gadget 'jsn'; did you mean 'json'"):
        table()["jsn"]
    with pytest.raises(
        MissingExtraError, match=r"'extra' needs the package 'no_such_package': pip install 'steelyard\[learn\]'"
    ):
        table()["extra"]
    for name in ("broken", "ours"):  # not something that an extra would mend
        with pytest.raises(ModuleNotFoundError):
            table()[name]


def test_other_packages_add_rows_and_replace_none(plugged):
    t = table()
    assert t["json"] is json.JSONEncoder
    assert plugged == []  # a row of ours needs no search of what is installed
    assert t["theirs"] is json.JSONDecoder
    assert t["loose"] is json.loads
    assert "theirs" in t
    assert set(t) == {*ROWS, "theirs", "loose"}
    assert t.rows["theirs"].about == "from plug"
    assert t.rows["json"].about == "an example"
    assert plugged == ["steelyard.gadgets"]
    with pytest.raises(UnknownNameError, match="did you mean 'theirs'"):
        t["their"]

"""`diff` says of each planted difference what it is, of nothing else that it differs, in numpy and compiled alike."""

from __future__ import annotations

import pytest

import steelyard as sy
from explain.truth import Case, cases
from steelyard.explain import diff as package
from steelyard.explain.diff import Difference, difference

CASES = {case.name: case for case in cases()}


def check(case: Case, found: Difference) -> None:
    said = {f.name: (f.verdict, "; ".join(f.notes)) for f in found.findings if not f.same}
    assert said.keys() == case.truth.keys()
    for name, (verdict, note) in case.truth.items():
        assert said[name][0] == verdict, said[name]
        assert note in said[name][1]
    renamed = {f.name: f.was for f in found.findings if f.was and f.was != f.name}
    assert renamed == (case.was or {})
    assert found.tables()[-1].rows[0]["verdict"] == case.verdict


def test_there_are_thirty_cases():
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_in_memory(name):
    check(CASES[name], difference(CASES[name].a, CASES[name].b))


@pytest.mark.parametrize("name", CASES)
def test_from_files_and_compiled(name, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "FAST", 0)
    case = CASES[name]
    for side, weights in (("a", case.a), ("b", case.b)):
        sy.write(weights, tmp_path / f"{side}.safetensors")
    check(case, difference(sy.open(tmp_path / "a.safetensors"), sy.open(tmp_path / "b.safetensors")))


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_same_as_itself(name):
    for side in (CASES[name].a, CASES[name].b):
        assert difference(side, side).same

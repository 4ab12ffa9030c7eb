from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.edit.rename import Rename
from steelyard.errors import RecipeError, WeightsError


def names(rename, given, ties=None):
    return list(rename(Weights.of({name: np.zeros(1) for name in given.split()}, ties)))


@pytest.mark.parametrize(("rename", "before", "after"), [
    (Rename("module.*", "*"), "module.a.b other", "a.b other"),
    (Rename("*.gamma", "*.weight"), "bn.gamma gamma", "bn.weight gamma"),
    (Rename("*.?.*", "*/*/*"), "a.1.w a.12.w", "a/1/w a.12.w"),
    (Rename("a.*.*", "b.*"), "a.x.y", "b.x"),
    (Rename("a", "b"), "a aa", "b aa"),
    (Rename("a.c", "b"), "abc a.c", "abc b"),
    (Rename("*", r"x\1.*"), "a", r"x\1.a"),
    (Rename(r"layers\.(\d+)", r"h.\1", regex=True), "layers.0.w layers.11.w", "h.0.w h.11.w"),
    (Rename("a|b", "c", regex=True), "ab", "cc"),
    (Rename("^", "base.", regex=True), "a b", "base.a base.b"),
])  # fmt: skip
def test_names(rename, before, after):
    assert names(rename, before) == after.split()


def test_ties_follow_on_both_ends_and_values_are_untouched():
    w = Weights.of({"m.embed": np.arange(3)}, ties={"m.head": "m.embed"}, meta={"k": "v"})
    r = Rename("m.*", "n.*")(w)
    assert dict(r.ties) == {"n.head": "n.embed"}
    assert dict(r.meta) == {"k": "v"}
    assert r["n.head"].read is w["m.embed"].read


@pytest.mark.parametrize(("rename", "given", "ties"), [
    (Rename("*.?", "*"), "a.1 a.2", None),
    (Rename("a", "b"), "a b", None),
    (Rename("h", "e"), "e", {"h": "e"}),
])  # fmt: skip
def test_two_names_that_would_become_one(rename, given, ties):
    first, second = given.split() if ties is None else ("e", "h")
    with pytest.raises(WeightsError, match=f"'{first}' and '{second}' the same name"):
        names(rename, given, ties)


def test_a_name_that_would_vanish():
    with pytest.raises(WeightsError, match="leaves 'ab' without a name"):
        names(Rename("ab", ""), "ab c")


@pytest.mark.parametrize(("pattern", "to", "regex"), [
    ("(", "x", True), ("a", r"\1", True), ("(a)", r"\g<b>", True), ("a.*", "*.*", False), ("a", "*", False),
])  # fmt: skip
def test_a_pattern_and_a_replacement_that_do_not_fit(pattern, to, regex):
    with pytest.raises(RecipeError, match="cannot rename"):
        Rename(pattern, to, regex)


@pytest.mark.parametrize(("rename", "said"), [
    (Rename("zz*", "y*"), "glob is for the whole name"), (Rename("a", "b"), "names begin with 'ab', 'c', 'd'$"),
    (Rename("z+", "y", regex=True), "regular expression is sought inside"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing(rename, said):
    with pytest.raises(WeightsError, match=f"no name matches; .*{said}"):
        names(rename, "ab c d e")
    assert names(rename, "") == []


def test_a_pattern_that_only_a_tie_matches():
    assert Rename("h", "k")(Weights.of({"e": np.zeros(1)}, {"h": "e"})).ties == {"k": "e"}

from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.transform import chain, each, on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import where


def some():
    arrays = {name: np.float32([i]) for i, name in enumerate("abcd", 1)}
    return Weights.of(arrays, ties={"a2": "a", "c2": "c"}, meta={"k": "v"})


def values(weights):
    return {name: float(x[0]) for name, x in weights.arrays().items()}


double = each(lambda item: item.then(lambda x: 2 * x))
plus_one = each(lambda item: item.then(lambda x: x + 1))
drop = each(lambda item: None)


def test_a_chain_goes_from_left_to_right_and_an_empty_one_does_nothing():
    assert values(chain(double, plus_one)(some()))["d"] == 9
    assert values(chain(plus_one, double)(some()))["d"] == 10
    assert values(chain()(some())) == values(some())


def test_on_changes_what_is_chosen_in_its_place():
    changed = on(where("b, c"), double, plus_one)(some())
    assert values(changed) == {"a": 1, "b": 5, "c": 7, "d": 4}
    assert list(changed) == list("abcd")
    assert (dict(changed.ties), dict(changed.meta)) == ({"a2": "a", "c2": "c"}, {"k": "v"})


def test_on_leaves_the_others_unread():
    def fail():
        raise AssertionError("read")

    w = some()
    w = w.with_items([Weight("a", w["a"].spec, fail), *list(w.values())[1:]])
    assert on(where("b"), double)(w)["b"].array().tolist() == [4]
    assert on(where("b"), double)(w)["a"] is w["a"]


def test_on_may_drop_and_rename_and_split():
    dropped = on(where("c"), drop)(some())
    assert (list(dropped), dict(dropped.ties)) == (["a", "b", "d"], {"a2": "a"})

    renamed = on(where("b"), lambda w: Weights([Weight.of("B", np.ones(1))], {"B2": "B"}, {"new": "1"}))(some())
    assert list(renamed) == ["a", "B", "c", "d"]
    assert dict(renamed.ties) == {"a2": "a", "c2": "c", "B2": "B"}
    assert dict(renamed.meta) == {"k": "v", "new": "1"}

    split = on(where("b"), lambda w: Weights.of({"b.0": np.ones(1), "b.1": np.ones(1)}))(some())
    assert list(split) == ["a", "b.0", "b.1", "c", "d"]


def test_on_a_name_that_becomes_the_alias_of_another_takes_it_over():
    taken = on(where("b"), lambda w: Weights.of({"a2": np.zeros(1)}))(some())
    assert taken["a2"].name == "a2"


def test_on_nothing_is_nothing():
    assert values(on(where("zzz"), double)(some())) == values(some())


def test_each_drops_what_is_none():
    assert list(each(lambda item: item if item.name > "b" else None)(some())) == ["c", "d"]


def test_a_transform_that_fails_does_so_when_it_is_read():
    broken = each(lambda item: item.then(lambda x: 1 // 0))(some())
    with pytest.raises(ZeroDivisionError):
        broken["a"].array()

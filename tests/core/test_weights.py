from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from steelyard.core.packed import Packed
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import where
from steelyard.errors import UnknownNameError, WeightsError


def some(**changes):
    arrays = {"embed": np.ones((4, 2), np.float32), "b": np.arange(3), "a": np.zeros(2, np.float16)}
    return Weights.of({**arrays, **changes}, ties={"head": "embed"}, meta={"license": "mit"})


def test_a_mapping_in_order_that_counts_a_tied_tensor_once():
    w = some()
    assert list(w) == ["embed", "b", "a"]
    assert len(w) == 3
    assert w.size == 13
    assert w.nbytes == 32 + 24 + 4
    assert w["head"] is w["embed"]
    assert "head" in w
    assert "nothing" not in w
    assert repr(w) == "Weights(3 tensors, 13 elements, 1 tie)"
    assert repr(Weights([])) == "Weights(0 tensors, 0 elements)"


def test_nothing_can_be_changed_in_place():
    w = some()
    with pytest.raises(TypeError):
        w.ties["x"] = "embed"
    with pytest.raises(TypeError):
        w.meta["x"] = "y"
    with pytest.raises(dataclasses.FrozenInstanceError):
        w["a"].name = "z"
    given = {"head": "embed"}
    held = Weights.of({"embed": np.ones(1)}, ties=given)
    given.clear()
    assert held.ties == {"head": "embed"}


def test_a_name_given_twice():
    a = Weight.of("a\n", np.ones(1), origin="x.npz")
    with pytest.raises(WeightsError, match=r"^x.npz: the name 'a.*' is given twice$") as caught:
        Weights([a, a])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ties", [{"embed": "b"}, {"x": "nothing"}, {"x": "x"}, {"x": "head"}])
def test_a_tie_leads_from_a_free_name_to_a_tensor(ties):
    with pytest.raises(WeightsError, match="must lead from a free name"):
        Weights(some().values(), ties={"head": "embed", **ties})


def test_find_names_the_nearest():
    assert some().find("head").name == "embed"
    with pytest.raises(UnknownNameError, match="did you mean 'embed'"):
        some().find("embde")
    with pytest.raises(KeyError):
        some()["embde"]


def test_select_keeps_order_meta_and_the_ties_of_what_is_left():
    kept = some().select(where("*b*"))
    assert (list(kept), dict(kept.ties), dict(kept.meta)) == (["embed", "b"], {"head": "embed"}, {"license": "mit"})
    assert dict(some().select(where("b")).ties) == {}


def test_with_items_drops_a_tie_whose_alias_became_a_tensor():
    w = some().with_items([Weight.of("embed", np.ones(1)), Weight.of("head", np.ones(1))])
    assert dict(w.ties) == {}
    assert w["head"].name == "head"


def test_with_meta_adds_and_replaces():
    assert dict(some().with_meta(license="bsd", author="x").meta) == {"license": "bsd", "author": "x"}


def counted(value, calls):
    def read():
        calls.append(1)
        return value

    return Weights([Weight("a", Spec.like(value), read, stored=12, origin="f.bin @8")])


def test_reads_happen_at_read_only_and_each_time_until_settled():
    calls = []
    w = counted(np.ones(3, np.float32), calls).with_items(
        item.then(lambda x: x * 2) for item in counted(np.ones(3, np.float32), calls).values()
    )
    assert calls == []
    w["a"].array(), w["a"].array()
    assert len(calls) == 2
    settled = w.settle()
    assert len(calls) == 3
    assert settled["a"].array().tolist() == settled["a"].array().tolist() == [2, 2, 2]
    assert len(calls) == 3


def test_then_forgets_how_the_file_held_it_and_keeps_where_it_came_from():
    w = counted(np.ones(3, np.float32), [])["a"]
    later = w.then(lambda x: x.astype(np.float16), spec=Spec.of((3,), "float16"))
    assert (later.stored, later.scheme, later.origin) == (None, None, "f.bin @8")
    assert later.array().dtype == np.float16


def test_an_array_that_is_not_what_was_announced():
    w = Weight("a", Spec.of((2,), "float32"), lambda: np.zeros(3, np.float64), origin="f.bin @8")
    with pytest.raises(WeightsError, match=r"f.bin @8: 'a' was announced as float32\[2\] and read as float64\[3\]"):
        w.array()


def test_packed_values_are_decoded_by_array_and_kept_by_settle(halves):
    w = Weights.of({"a": halves})
    assert w["a"].scheme is not None
    assert w["a"].array().tolist() == [1.0, 2.0]
    assert isinstance(w.settle()["a"].read(), Packed)
    assert w.arrays()["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_of_the_first_axis_are_read_alone(lazy: bool) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)

    def fill(first: int, flat: np.ndarray) -> None:
        flat[...] = values.reshape(-1)[first : first + flat.size]

    def whole() -> np.ndarray:
        return pytest.fail("the whole tensor was read") if lazy else values

    weight = Weight("w", Spec.like(values), whole, fill=fill if lazy else None)
    for index in (slice(1, 3), slice(None), slice(-2, None), slice(3, 1), slice(2, 99), 0, 3, -1, -4):
        np.testing.assert_array_equal(weight[index], values[index])
    for wrong in (4, -5, slice(0, 4, 2), (0, 1), None):
        with pytest.raises(WeightsError, match="'w'"):
            weight[wrong]
    with pytest.raises(WeightsError, match="first axis"):
        Weight.of("s", np.float32(1))[0]
    np.testing.assert_array_equal(np.asarray(Weight.of("w", values)), values)
    assert np.asarray(Weight.of("w", values), np.float64).dtype == np.float64

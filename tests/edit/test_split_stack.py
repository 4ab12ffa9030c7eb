"""Pieces of tensors: the same values whole, in blocks, and back again; what is missing is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import steelyard as sy
from steelyard.core.weights import Weight, Weights
from steelyard.edit.split import Join, Split
from steelyard.edit.stack import Stack, Unstack
from steelyard.errors import RecipeError, WeightsError


def filled(values):
    """Weights that can be read in blocks and only so."""

    def weight(name, x):
        def fill(first, flat):
            flat[:] = x.reshape(-1)[first : first + flat.size]

        return Weight(name, sy.Spec.like(x), lambda: pytest.fail("read as a whole"), 8, "f @0", fill=fill)

    return Weights([weight(name, x) for name, x in values.items()])


def same(found, expected):
    """Values as a whole, and in blocks of every size."""
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].array().tobytes() == x.tobytes()
        assert found[name].spec.shape == x.shape
        for elements in (1, 2, 3, 5, 100):
            blocks = [block.copy() for block in found[name].blocks(elements)]
            assert all(block.size == elements for block in blocks[:-1])
            assert b"".join(block.tobytes() for block in blocks) == x.tobytes()


SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@pytest.mark.parametrize("lazily", [False, True])
@given(shape=SHAPES, axis=st.integers(-3, 2), shares=st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_split_and_join_are_inverse(lazily, shape, axis, shares):
    axis %= len(shape)
    shape[axis] *= sum(shares)
    x = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    names = tuple(f"*.{i}" for i in range(len(shares)))
    make = filled if lazily else Weights.of
    split = Split("*.all", names, tuple(shares), axis)(make({"m.all": x}))
    cuts = np.cumsum(shares)[:-1] * (shape[axis] // sum(shares))
    same(split, {f"m.{i}": part for i, part in enumerate(np.split(x, cuts, axis))})
    same(Join(names, "*.all", axis)(split), {"m.all": x})


@pytest.mark.parametrize("lazily", [False, True])
@given(shape=SHAPES, count=st.integers(1, 12))
def test_stack_and_unstack_are_inverse(lazily, shape, count):
    x = np.arange(count * np.prod(shape), dtype=np.int16).reshape(count, *shape)
    make = filled if lazily else Weights.of
    apart = {f"l.{i}.w": x[i] for i in sorted(range(count), key=str)}  # 10 before 2, as files have it
    stacked = Stack("*.#.w", "*.w")(make(apart))
    same(stacked, {"l.w": x})
    same(Unstack("*.w", "*.#.w")(stacked), {f"l.{i}.w": x[i] for i in range(count)})


def test_packed_parts_are_decoded_and_the_rest_stays_in_place():
    from steelyard.codecs.bits import Bits
    from steelyard.core.packed import pack

    x = np.arange(4, dtype=np.uint8)
    w = Weights.of({"a": np.zeros(1), "l.q": pack(x, Bits()), "b": np.ones(1), "l.k": x}, {"c": "b"}, {"k": "v"})
    joined = Join(("*.q", "*.k"), "*.qk")(w)
    assert list(joined) == ["a", "l.qk", "b"]
    assert joined["l.qk"].array().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (dict(joined.ties), dict(joined.meta)) == ({"c": "b"}, {"k": "v"})


def tensors(**values):
    return Weights.of({name.replace("_", "."): np.zeros(shape, np.float32) for name, shape in values.items()})


@pytest.mark.parametrize(
    ("step", "weights", "said"),
    [
        (Split("*.qkv", ("*.q", "*.k")), tensors(a_b=(2,)), "splitting '.*' changes nothing: no name matches"),
        (Split("*.qkv", ("*.q", "*.k")), tensors(a_qkv=(3,)), "'a.qkv' is .*; its axis 0 of 3 cannot be split 1:1"),
        (Split("*.qkv", ("*.q", "*.k")), tensors(a_qkv=()), "it has no axis 0"),
        (Split("*.qkv", ("*.q", "*.k"), axis=1), tensors(a_qkv=(2,)), "it has no axis 1"),
        (Split("*.qkv", ("*.q", "*.k")), tensors(a_qkv=(2,), a_k=(1,)), "the name 'a.k' is given twice"),
        (Join(("*.q", "*.k"), "*.qk"), tensors(a_b=(2,)), "no name matches"),
        (Join(("*.q", "*.k"), "*.qk"), tensors(a_q=(2,), b_q=(2,), b_k=(2,)), "'a.k' is missing"),
        (Join(("*.q", "*.k"), "*.qk"), tensors(a_q=(2, 3), a_k=(2, 4)), "do not fit together"),
        (Join(("*.q", "*.k"), "*.qk"), tensors(a_q=(2,), a_k=(2,), a_qk=(2,)), "'a.qk' is given twice"),
        (Stack("*.#", "*.s"), tensors(a_b=(2,)), "no name matches"),
        (Stack("*.#", "*.s"), tensors(a_0=(2,), a_2=(2,)), "none with number 1"),
        (Stack("*.#", "*.s"), tensors(a_1=(2,)), "none with number 0"),
        (Stack("*.#", "*.s"), tensors(a_0=(2,), a_00=(2,)), "'a.0' and 'a.00' have the same number"),
        (Stack("*.#", "*.s"), tensors(a_0=(2,), a_1=(3,)), "do not fit together"),
        (Unstack("*.s", "*.#"), tensors(a_b=(2,)), "no name matches"),
        (Unstack("*.s", "*.#"), tensors(a_s=()), "no axis to take apart"),
        (Unstack("*.s", "*.#"), tensors(a_s=(10**9, 0)), "more than 1000000"),
    ],
)
def test_what_does_not_fit_is_named(step, weights, said):
    with pytest.raises(WeightsError, match=said):
        step(weights)


def test_further_names_are_never_lost():
    w = Weights.of({"l.0": np.zeros(2)}, {"head": "l.0"})
    for step in (Split("l.0", ("a", "b")), Stack("l.#", "s"), Unstack("l.0", "s.#"), Join(("l.0", "head"), "s")):
        with pytest.raises(WeightsError, match="'head'"):
            step(w)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split("a", ("b",)),
        lambda: Split("a", ("b", "c"), (1,)),
        lambda: Split("a", ("b", "c"), (1, 0)),
        lambda: Split("a?", ("b", "c")),
        lambda: Split("a", ("b", "")),
        lambda: Join(("a", "a"), "b"),
        lambda: Join(("a.*", "b"), "c"),
        lambda: Stack("a.*", "b"),
        lambda: Stack("a.#.#", "b"),
        lambda: Stack("a.#", "b.#"),
        lambda: Unstack("a", "b"),
        lambda: Unstack("", "b.#"),
    ],
)
def test_settings_that_say_nothing_are_refused(make):
    with pytest.raises(RecipeError):
        make()

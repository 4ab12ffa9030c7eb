"""Bitmask and Delta: what they hold, in how many bytes."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.bitmask import Bitmask
from steelyard.codecs.delta import Delta
from steelyard.core.packed import Packed, pack
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

RNG = np.random.default_rng(4)


def sparse(n: int, density: float) -> np.ndarray:
    return np.where(RNG.random(n) < density, RNG.standard_normal(n), 0).astype(np.float32)


def test_minus_zero_and_nan_are_values() -> None:
    x = np.float32([0, -0.0, np.nan, 0])
    assert Bitmask().encode(x)["mask"].tolist() == [False, True, True, False]
    assert Delta().encode(x)["values"].size == 2


def test_a_mask_takes_one_bit_an_element() -> None:
    x = sparse(4000, 0.1)
    held = pack(x, Bitmask())
    assert isinstance(held, Packed)
    assert held.nbytes == 1 + 500 + 4 * np.count_nonzero(x)


def test_exact_gaps() -> None:
    x = np.zeros(40, np.uint8)
    x[[0, 1, 9, 39]] = 1
    assert Delta(bits=3).encode(x)["gaps"].tolist() == [7, 0, 0, 7, 0, 7, 7, 7, 7, 1]
    assert Delta(bits=8).encode(x)["gaps"].tolist() == [255, 0, 0, 7, 29]
    assert Delta(bits=9).encode(x)["gaps"].dtype == np.uint16
    assert Delta().encode(np.zeros(9))["gaps"].size == 0


@pytest.mark.parametrize("density", [0.3, 0.05, 0.003, 0.0001])
def test_the_width_that_is_chosen_is_the_best(density: float) -> None:
    x = sparse(30_000, density)
    chosen = pack(x, Delta())
    others = [pack(x, Delta(bits)) for bits in range(1, 17)]
    assert isinstance(chosen, Packed)
    assert all(np.array_equal(o.array(), x) for o in others if isinstance(o, Packed))
    assert chosen.nbytes <= min(o.nbytes for o in others) + 2


@pytest.mark.parametrize(("density", "least"), [(0.01, 0), (0.3, 0), (0.6, -3), (0.9, -3)])
def test_delta_takes_less_than_a_bit_an_element_where_little_is_left(density: float, least: int) -> None:
    x = sparse(50_000, density)
    assert pack(x, Bitmask()).nbytes - pack(x, Delta()).nbytes >= least


def test_contradictions_are_refused() -> None:
    spec = Spec.of((5,), "float32")
    two = np.float32([1, 2])
    with pytest.raises(CodecError, match="3 ones for 2 values"):
        Bitmask().decode({"mask": np.array([1, 1, 1, 0, 0], bool), "values": two}, spec)
    with pytest.raises(CodecError, match="the part 'mask' is missing; present are \\['values'\\]"):
        Bitmask().decode({"values": two}, spec)
    with pytest.raises(CodecError, match="lead to element 5 of 5"):
        Delta().decode({"gaps": np.uint8([7, 0, 4]), "values": two}, spec)
    with pytest.raises(CodecError, match="1 gaps for 2 values"):
        Delta().decode({"gaps": np.uint8([7, 0]), "values": two}, spec)
    with pytest.raises(CodecError, match="expected 1 to 16"):
        Delta(bits=17)

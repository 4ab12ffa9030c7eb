from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.bits import Bits
from steelyard.core.spec import Spec
from steelyard.errors import CodecError


def stream(x: np.ndarray) -> list[int]:
    return Bits().encode(x)["stream"].tolist()


def test_exact_bytes() -> None:
    assert stream(np.array([True, False, True])) == [1, 0b101]
    assert stream(np.uint8([5, 5, 5])) == [0x80, 10]  # width 0, offset 5 as zigzag
    assert stream(np.int8([-1, 1, 0])) == [0x82, 1, 0b01_10_00]
    assert stream(np.uint16([0, 4, 7])) == [3, 0b11_100_000, 0b1]
    assert stream(np.zeros((0, 3), np.int32)) == [0]
    assert stream(np.zeros((2, 3), np.int32)) == [0]


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_the_whole_range_of_64_bits(dtype: str) -> None:
    limits = np.iinfo(dtype)
    for values in ([limits.min, limits.max, 1], [limits.max, limits.max], [limits.min, limits.min + 2**40, limits.min]):
        x = np.array(values, dtype)
        assert Bits().decode(Bits().encode(x), Spec.like(x)).tolist() == values


@pytest.mark.parametrize("width", range(1, 65))
def test_every_width(width: int) -> None:
    x = np.random.default_rng(width).integers(0, 2**width - 1, 37, np.uint64, endpoint=True)
    x[:2] = 0, 2**width - 1
    parts = Bits().encode(x)
    assert parts["stream"].size == 1 + (37 * width + 7) // 8
    assert (Bits().decode(parts, Spec.like(x)) == x).all()


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(CodecError, match="use entropy"):
        Bits().encode(np.float32([1]))
    with pytest.raises(CodecError, match="do not fit uint8"):
        Bits().decode(Bits().encode(np.int16([-5])), Spec.of((1,), "uint8"))
    with pytest.raises(CodecError, match="2 bytes do not hold 9 numbers"):
        Bits().decode({"stream": np.uint8([2, 1, 1])}, Spec.of((9,), "uint8"))
    with pytest.raises(CodecError, match="ends within its offset"):
        Bits().decode({"stream": np.uint8([0x80, 255])}, Spec.of((9,), "uint8"))

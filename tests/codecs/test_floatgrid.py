"""The levels of small floats: those of the types themselves, of QLoRA's table, and the bytes that the names promise."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from steelyard.codecs.floatgrid import FloatGrid
from steelyard.core.packed import pack
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

TYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
}


@pytest.mark.parametrize("grid", TYPES)
def test_with_a_scale_of_one_it_is_a_cast_to_the_type(grid: str) -> None:
    random = np.random.default_rng(0)
    top = float(ml_dtypes.finfo(TYPES[grid]).max)
    x = np.append(random.normal(size=4000) * top / 8, top).clip(-top, top).astype(np.float32)
    codec = FloatGrid(grid, None)  # the largest magnitude is the largest level, so the scale is 1
    parts = codec.encode(x)
    assert float(parts["scale"]) == 1
    cast = x.astype(TYPES[grid])
    y, z = codec.decode(parts, Spec.like(x)), cast.astype(np.float32)
    assert (np.abs(x - y) <= np.abs(x - z)).all()  # ties may go the other way
    assert np.mean(y == z) > 0.99
    assert np.mean(parts["codes"] == cast.view(np.uint8)) > 0.99 - np.mean(z == 0)


def test_mxfp4_and_nvfp4_take_the_bytes_that_they_promise() -> None:
    x = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    for codec, bits in (
        (FloatGrid("e2m1", 32, "e8m0"), 4.25),
        (FloatGrid("e2m1", 16, "e4m3"), 4.5),
        (FloatGrid("nf4", 64), 4.5),
    ):
        held = pack(x, codec)
        assert held.nbytes == pytest.approx(x.size * bits / 8, abs=8)
        away = np.square(held.array() - x).mean() / np.square(x).mean()
        assert away < {"e8m0": 0.02, "e4m3": 0.011, "float32": 0.011}[codec.scales]


@pytest.mark.parametrize("grid", ["nf4", *TYPES])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_by_powers_of_two_none_loses_more_by_being_the_largest_than_by_rounding(grid: str, dtype) -> None:
    x = np.random.default_rng(3).standard_t(3, size=(3000, 32)).astype(dtype)
    codec = FloatGrid(grid, 32, "e8m0")
    parts = codec.encode(x)
    y = codec.decode(parts, Spec.like(x))
    assert pack(y, codec).array().tobytes() == y.tobytes()
    scale = np.ldexp(1.0, parts["scale"].astype(int) - 127)
    lost = np.abs(y.astype(np.float64) - x.astype(np.float64)) / scale
    step = {"nf4": 1 - 0.6961928, "e2m1": 2, "e2m3": 0.5, "e3m2": 4, "e4m3": 32, "e5m2": 8192}[grid]  # the last one
    assert lost.max() <= step / 2 * 1.03


def test_nf4_by_powers_of_two_is_not_far_from_the_best_of_them() -> None:
    x = np.random.default_rng(4).normal(size=(2000, 32))
    steps = [2.0**e for e in range(-6, 6)]
    table = np.float64(FloatGrid("nf4", 16).decode({"codes": np.arange(16, dtype=np.uint8), "scale": np.ones(1, "f4")},
                                                   Spec.of((16,), "float64")))  # fmt: skip
    each = [np.square((np.abs(x[..., None] / s - table).min(axis=-1)) * s).sum(axis=1) for s in steps]
    best, up = np.min(each, axis=0).sum(), 0.0
    for row, m in enumerate(np.abs(x).max(axis=1)):
        up += each[int(np.ceil(np.log2(m))) + 6][row]
    found = np.square(pack(x, FloatGrid("nf4", 32, "e8m0")).array() - x).sum()
    assert best <= found < 1.12 * best
    assert found < 0.98 * up


def test_scales_of_powers_of_two_are_those_of_the_standard() -> None:
    x = np.float32([[5.9, 0.3], [8.0, -1.0], [0, 0], [7, 1], [7.1, 1]])
    parts = FloatGrid("e2m1", 2, "e8m0").encode(x)
    assert parts["scale"].ravel().tolist() == [127, 128, 0, 127, 128]  # 2^(floor(log2(5.9)) - 2), 2^(3 - 2), none; up
    decoded = FloatGrid("e2m1", 2, "e8m0").decode(parts, Spec.like(x)).tolist()
    assert decoded == [[6, 0.5], [8, -1], [0, 0], [6, 1], [8, 1]]


def test_nf4_is_exact_on_its_own_levels() -> None:
    table = np.float32([-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
                        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])  # fmt: skip
    parts = FloatGrid("nf4", 16).encode(table * 4)
    assert parts["codes"].tolist() == list(range(16))
    assert FloatGrid("nf4", 16).decode(parts, Spec.like(table)) == pytest.approx(table * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"), [(("e9m9",), "no grid 'e9m9'"), (("nf4", 0), "block is 0"), (("nf4", 4, "f"), "not 'f'")]
)
def test_settings_are_checked(settings, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        FloatGrid(*settings)

"""Affine and Palette: what their levels are, and how far a value may move."""

from __future__ import annotations

import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest

from steelyard.codecs.affine import Affine
from steelyard.codecs.floatgrid import FloatGrid
from steelyard.codecs.palette import Palette
from steelyard.core.packed import pack
from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import CodecError

RNG = np.random.default_rng(3)
X = (RNG.standard_normal((12, 50)) * np.geomspace(0.01, 10, 12)[:, None]).astype(np.float32)


@pytest.mark.parametrize("long", [10**6, 10**30])
@pytest.mark.parametrize("kind", [Affine, partial(Affine, symmetric=False), FloatGrid])
def test_a_group_far_longer_than_the_axis_takes_no_more_memory(kind: Any, long: int) -> None:
    option = "block" if kind is FloatGrid else "group"
    codec, usual = kind(**{option: long}), kind(**{option: X.shape[1]})
    tracemalloc.start()
    parts = codec.encode(X)
    again = codec.decode(parts, Spec.like(X))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert again.tobytes() == usual.decode(usual.encode(X), Spec.like(X)).tobytes()
    assert peak < 100 * X.nbytes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("share", [{}, {"axis": 0}, {"axis": 1}, {"group": 7}, {"group": 100}])
def test_no_value_moves_more_than_half_a_step(bits: int, symmetric: bool, share: dict[str, int]) -> None:
    codec = Affine(bits, symmetric, **share)
    parts = codec.encode(X)
    y = codec.decode(parts, Spec.like(X))
    step = parts["scale"].astype(np.float64)
    if "axis" in share:
        step = step[:, None] if share["axis"] == 0 else step[None]
    elif "group" in share:
        step = np.repeat(step, share["group"], axis=1)[:, :50]
    assert (np.abs(y.astype(np.float64) - X) <= step / 2 * (1 + 1e-4)).all()
    top = 2**bits - 1 - symmetric
    assert int(parts["codes"].max()) == top or (symmetric and int(parts["codes"].min()) == 0)
    assert (y == 0).any() or not symmetric
    assert len(np.unique(y[0])) <= 2**bits or share == {"group": 7} or "axis" in share


def test_one_bit_is_the_sign_and_the_mean_magnitude() -> None:
    parts = Affine(bits=1).encode(np.float32([1, -2, 3, -0.0]))
    assert parts["scale"] == np.float32(1.5)
    assert parts["codes"].tolist() == [1, 0, 1, 1]


def test_the_number_of_scales() -> None:
    assert Affine(axis=0).encode(X)["scale"].shape == (12,)
    assert Affine(axis=-1).encode(X)["scale"].shape == (50,)
    assert Affine(group=16).encode(X)["scale"].shape == (12, 4)
    assert Affine().encode(X)["scale"].shape == ()
    assert Affine(symmetric=False).encode(X)["zero"].dtype == X.dtype


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_the_extremes_are_held(name: str) -> None:
    x = np.array([-2.5, 0.3, 1.75], DTYPES[name].numpy)
    for codec in (Affine(8), Affine(8, symmetric=False), Affine(2, symmetric=False)):
        y = codec.decode(codec.encode(x), Spec.like(x)).astype(np.float64)
        assert y[0] == pytest.approx(-2.5, rel=1e-6)
        if not codec.symmetric:
            assert y[2] == pytest.approx(1.75, rel=1e-6)


def test_a_scale_that_float32_cannot_hold_is_float64() -> None:
    assert Affine().encode(np.float64([1e300]))["scale"].dtype == np.float64
    assert Affine().encode(np.float32([1e-44]))["scale"].dtype == np.float64
    assert Affine().encode(np.float64([1e30]))["scale"].dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_has_no_level_is_refused(bad: float) -> None:
    x = np.float32([0, 1, 2, 3, bad])
    for codec in (Affine(), Affine(4, symmetric=False), Affine(group=2), Palette(2)):
        with pytest.raises(CodecError, match=r"NaN, infinite or|NaN or infinite"):
            codec.encode(x)
    assert np.array_equal(pack(x, Palette(5)).array(), x, equal_nan=True)


def test_wrong_configurations_are_refused() -> None:
    for wrong in ({"bits": 0}, {"bits": 9}, {"axis": 0, "group": 4}, {"group": 0}):
        with pytest.raises(CodecError, match="affine"):
            Affine(**wrong)
    for k in (0, 65537):
        with pytest.raises(CodecError, match="expected 1 to 65536"):
            Palette(k)
    with pytest.raises(CodecError, match=r"axis 2 .* 2 axes; .*--where"):
        Affine(axis=2).encode(X)
    with pytest.raises(CodecError, match="cast the tensor"):
        Affine().encode(np.int32([1]))


def test_palette_is_exact_where_it_can_be() -> None:
    odd = np.uint32([0x7FC00001, 0xFFC12345, 0x80000000, 0, 1, 0x7F800000]).view(np.float32)
    x = RNG.choice(odd, (5, 6))
    parts = Palette(6).encode(x)
    assert Palette(6).decode(parts, Spec.like(x)).tobytes() == x.tobytes()
    assert parts["codes"].dtype == np.uint8


def test_palette_keeps_only_what_is_used() -> None:
    assert Palette(256).encode(np.float32([3, 1, 3]))["codebook"].tolist() == [1, 3]
    wide = np.arange(1000, dtype=np.float32)
    parts = Palette(65536).encode(wide)
    assert parts["codes"].dtype == np.uint16
    assert (Palette().decode(parts, Spec.like(wide)) == wide).all()


def test_palette_goes_to_the_nearest_entry() -> None:
    x = RNG.standard_normal(400).astype(np.float32)
    parts = Palette(8).encode(x)
    y = Palette(8).decode(parts, Spec.like(x))
    assert parts["codebook"].size == 8
    nearest = np.abs(x[:, None].astype(np.float64) - parts["codebook"]).min(axis=1)
    assert np.allclose(np.abs(x - y), nearest, atol=1e-6)
    # more entries never do worse
    errors = [float(((Palette(k).decode(Palette(k).encode(x), Spec.like(x)) - x) ** 2).sum()) for k in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_idempotent_where_levels_are_as_dense_as_the_numbers_of_the_type(name: str, bits: int) -> None:
    codec, kind = Affine(bits, symmetric=False), DTYPES[name].numpy
    for start in (0.4, 1.8, 4.4, -2.15):
        with np.errstate(under="ignore"):
            first = np.array(start, kind)
            gap = abs(float(np.nextafter(first, np.array(9, kind)) - first))
        for count in (100, 255, *range(300, 30_000 if name == "float64" else 900, 150)):
            x = (float(first) + gap * np.append(RNG.integers(0, count, 30), [0, count])).astype(kind)
            y = codec.decode(codec.encode(x), Spec.like(x))
            assert codec.decode(codec.encode(y), Spec.like(x)).tobytes() == y.tobytes()

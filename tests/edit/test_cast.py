from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.core.spec import DTYPES, Spec
from steelyard.core.transform import on
from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.edit.cast import Cast
from steelyard.errors import RecipeError, UnknownNameError, WeightsError

FLOATS = [name for name, row in DTYPES.items() if row.kind == "float"]
INTS = [name for name, row in DTYPES.items() if row.kind in ("int", "uint")]


def cast(x, dtype, overflow="error"):
    return Cast(dtype, overflow)(Weights.of({"w": x}))["w"].array()


@pytest.mark.parametrize("new", FLOATS)
@pytest.mark.parametrize("old", ["float64", "float32"])
def test_numbers_beyond_the_largest_are_never_silent(old, new):
    limits = ml_dtypes.finfo(DTYPES[new].numpy)
    if float(limits.max) < 1e37:
        fits = np.array([1.0, float(limits.max)]).astype(DTYPES[old].numpy)
        assert cast(fits, new).astype(float).tolist() == [1.0, float(fits.astype(DTYPES[new].numpy)[1])]
        beyond = np.array([[1.0, 4 * float(limits.max)]]).astype(DTYPES[old].numpy)
        with pytest.raises(WeightsError, match=rf"'w' holds .* which {new} cannot hold"):
            cast(beyond, new)
        assert cast(beyond, new, "saturate").astype(float).tolist() == [[1.0, float(limits.max)]]
        allowed = cast(beyond, new, "allow")
        with np.errstate(all="ignore"):
            assert allowed.tobytes() == beyond.astype(DTYPES[new].numpy).tobytes()


@pytest.mark.parametrize("new", ["float16", "bfloat16", "float8_e5m2"])
def test_infinities_and_nan_that_were_there_stay(new):
    x = np.float32([np.inf, -np.inf, np.nan])
    for overflow in ("error", "saturate"):
        assert cast(x, new, overflow).astype(np.float32).tobytes()[:8] == x.tobytes()[:8]
        assert np.isnan(cast(x, new, overflow).astype(np.float32)[2])


def test_formats_without_infinity_or_nan():
    assert cast(np.float32([np.inf, -np.inf]), "float8_e4m3fn", "saturate").astype(float).tolist() == [448, -448]
    for x in (np.float32([np.inf]), np.float32([np.nan])):
        with pytest.raises(WeightsError):
            cast(x, "float4_e2m1fn")
    with pytest.raises(WeightsError):
        cast(np.float32([np.nan]), "float4_e2m1fn", "saturate")
    with pytest.raises(WeightsError):
        cast(np.float32([-1.0]), "float8_e8m0fnu")


def test_rounding_is_no_overflow():
    assert cast(np.float32([1.0001, 65504.1, 1e-30]), "float16").tolist() == [1.0, 65504.0, 0.0]


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=5), st.sampled_from(INTS))
def test_whole_numbers(values, new):
    x = np.array(values, np.int64 if all(v < 2**63 for v in values) else np.uint64) if all(
        v >= 0 for v in values) or all(v < 2**63 for v in values) else np.zeros(0, np.int64)  # fmt: skip
    limits = ml_dtypes.iinfo(DTYPES[new].numpy)
    low, high = int(limits.min), int(limits.max)
    clipped = [min(max(int(v), low), high) for v in x]
    assert [int(v) for v in cast(x, new, "saturate")] == clipped
    if clipped == x.tolist():
        assert [int(v) for v in cast(x, new)] == clipped
    else:
        with pytest.raises(WeightsError, match=f"at most {high}"):
            cast(x, new)


def test_complex_numbers_by_their_parts():
    x = np.array([[1 + 2j, 1e300]], np.complex128)
    assert cast(x[:, :1], "complex64").tolist() == [[1 + 2j]]
    assert cast(x, "complex64", "saturate")[0, 1] == np.finfo(np.float32).max
    with pytest.raises(WeightsError):
        cast(x, "complex64")


def test_other_families_pass_untouched_and_the_same_dtype_is_the_same_weight():
    w = Weights.of({"f": np.ones(2, np.float32), "i": np.ones(2, np.int64), "b": np.ones(2, bool)})
    to_half, to_int = Cast("fp16")(w), on(~where(dtype="float32"), Cast("int32"))(w)
    assert [item.spec.dtype.name for item in to_half.values()] == ["float16", "int64", "bool"]
    assert [item.spec.dtype.name for item in to_int.values()] == ["float32", "int32", "bool"]
    assert to_half["i"] is w["i"]
    assert Cast("f32")(w)["f"] is w["f"]
    assert to_half["f"].spec == Spec.of((2,), "float16")


def test_settings():
    assert Cast("bf16") == Cast("torch.bfloat16") == Cast("bfloat16")
    with pytest.raises(UnknownNameError):
        Cast("bf61")
    with pytest.raises(RecipeError, match="overflow"):
        Cast("bf16", "ignore")


@pytest.mark.parametrize("dtype", ["int8", "uint4", "int64"])
def test_fractions_are_not_cast_to_whole_numbers_and_not_left_in_silence(dtype):
    for names in ("f", "fi"):
        w = Weights.of({n: np.ones(2, np.float32 if n == "f" else np.int64) for n in names})
        with pytest.raises(WeightsError, match=f"'f' is float32.*cast to {dtype} takes whole numbers only.*quantize"):
            Cast(dtype)(w)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", "floating-point tensors"), ("bool", "truth values"), ("complex64", "complex tensors")]
)
def test_a_cast_that_no_tensor_is_of_a_kind_for(dtype, kind):
    with pytest.raises(WeightsError, match=f"changes .*{kind} only, and there are none: 'i' is int64"):
        Cast(dtype)(Weights.of({"i": np.ones(2, np.int64)}))
    assert len(Cast(dtype)(Weights([]))) == 0

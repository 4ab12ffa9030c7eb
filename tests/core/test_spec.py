from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.spec import DTYPES, Spec, dtype
from steelyard.errors import UnknownNameError, WeightsError


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_found_by_its_names_and_by_its_array_type(name):
    row = DTYPES[name]
    assert row.name == str(row) == name
    assert dtype(row) is dtype(name) is dtype(name.upper()) is dtype(row.numpy) is dtype(row.numpy.type) is row
    assert np.zeros(2, row.numpy).dtype == row.numpy
    assert row.numpy.itemsize * 8 == max(row.bits, 8)
    if row.torch:
        assert dtype(f"torch.{row.torch}") is row


def test_safetensors_codes_are_unique():
    codes = [row.safetensors for row in DTYPES.values() if row.safetensors]
    assert len(codes) == len(set(codes)) > 20


@pytest.mark.parametrize(
    ("alias", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("f32", "float32"),
                        ("double", "float64"), ("long", "int64"), ("i4", "int4"), ("u8", "uint8"), ("fp8", "float8_e4m3fn")]
)  # fmt: skip
def test_aliases(alias, name):
    assert dtype(alias).name == name


@pytest.mark.parametrize("wrong", ["float23", "", "object", np.dtype("U3"), np.dtype(object), np.dtype("M8[s]")])
def test_a_dtype_that_no_file_holds(wrong):
    with pytest.raises(UnknownNameError):
        dtype(wrong)


def test_a_near_miss_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'float32'"):
        dtype("flaot32")


@pytest.mark.parametrize(
    ("shape", "kind", "size", "nbytes"),
    [
        ((), "float64", 1, 8),
        ((0, 7), "float32", 0, 0),
        ((3,), "int4", 3, 2),
        ((5,), "int2", 5, 2),
        ((4,), "float6_e2m3fn", 4, 3),
    ],
)
def test_bytes_in_a_file(shape, kind, size, nbytes):
    spec = Spec.of(shape, kind)
    assert (spec.size, spec.nbytes) == (size, nbytes)


@pytest.mark.parametrize("shape", [(-1,), (2.0,), (True,), ("3",), (None,)])
def test_a_shape_is_made_of_whole_numbers(shape):
    with pytest.raises(WeightsError, match="non-negative"):
        Spec.of(shape, "float32")


def test_spec_of_an_array_and_as_text():
    assert Spec.like(np.zeros((2, 3), np.int16)) == Spec.of((2, 3), "int16")
    assert str(Spec.of((2, 3), "bf16")) == "bfloat16[2, 3]"
    assert isinstance(hash(Spec.of((2,), "bf16")), int)

"""The numbers of `diff`: those of plain numpy, the same to the last bit compiled or not, and defined for every value."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import steelyard as sy
from steelyard.core.weights import Weight
from steelyard.explain.diff import difference
from steelyard.explain.diff.tally import BLOCK, Tally, tally

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
WHOLE = [np.int64, np.int32, np.uint8, np.uint64, np.bool_, np.complex64, np.complex128, ml_dtypes.int4]


def counted(a: np.ndarray, b: np.ndarray, fast: bool) -> Tally:
    return tally(Weight.of("a", a), Weight.of("b", b), fast)


def any_bits(dtype: type, size: int, seed: int) -> np.ndarray:
    """Random bits: NaN with payloads, infinities, subnormals and both zeros are among them."""
    rng = np.random.default_rng(seed)
    width = np.dtype(dtype).itemsize
    if np.dtype(dtype).kind in "b" or np.dtype(dtype).name == "int4":
        return rng.integers(0, 2, size).astype(dtype)
    values = rng.integers(0, 256, size * width, np.uint8).view(dtype)
    values[: size // 3] = rng.normal(size=size // 3).astype(dtype)
    values[size // 3 : size // 2] = 0
    return values


@pytest.mark.parametrize("dtype", DTYPES + WHOLE)
@pytest.mark.parametrize("size", [0, 1, 16, 1000, BLOCK + 77])
def test_compiled_and_plain_agree_to_the_last_bit(dtype, size):
    with np.errstate(all="ignore"):
        a, b = any_bits(dtype, size, 1), any_bits(dtype, size, 2)
    b[: size // 4] = a[: size // 4]
    fast, plain = counted(a, b, True), counted(a, b, False)
    assert np.array_equal(fast.sums, plain.sums)
    for name in ("elements", "differ", "changed", "flips", "negated", "zeroed", "filled", "nan", "inf", "nan_payload"):
        assert getattr(fast, name) == getattr(plain, name), name


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_the_numbers_are_those_of_numpy(dtype, fast):
    rng = np.random.default_rng(3)
    a = rng.normal(size=5003).astype(dtype)
    b = (a.astype(np.float64) + rng.normal(size=5003) * 0.1).astype(dtype)
    x, y = a.astype(np.float64), b.astype(np.float64)
    found = counted(a, b, fast)
    assert found.changed == np.count_nonzero(x != y)
    assert found.flips == np.count_nonzero(x * y < 0)
    assert found.largest == np.abs(y - x).max()
    assert found.mean == pytest.approx(np.abs(y - x).mean(), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_whole_numbers_beyond_what_a_float_holds_differ():
    a, b = np.array([2**60, 2**60 + 1], np.int64), np.array([2**60 + 1, 2**60 + 1], np.int64)
    for fast in (False, True):
        assert counted(a, b, fast).changed == 1


values = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(values, values), max_size=40))
def test_every_pair_of_numbers_has_a_finding(pairs):
    a, b = (np.array([p[i] for p in pairs], np.float32) for i in (0, 1))
    (found,) = difference(sy.Weights.of({"w": a}), sy.Weights.of({"w": b})).findings
    assert (found.verdict == "identical") == (a.tobytes() == b.tobytes())
    t = found.tally
    if t is not None:
        assert t.differ == np.count_nonzero(a.view(np.uint32) != b.view(np.uint32))
        assert t.zero_signs == np.count_nonzero((a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b)))
        assert t.nan_appeared == np.count_nonzero(np.isnan(b) & ~np.isnan(a))
        assert math.isfinite(t.largest)


@pytest.mark.parametrize("extreme", [1e308, -1e308, 5e-324, 1.7e-310])
def test_extremes_of_float64_are_defined(extreme):
    a, b = np.full(20, extreme), np.full(20, -extreme)
    (found,) = difference(sy.Weights.of({"w": a}), sy.Weights.of({"w": b})).findings
    assert found.verdict in ("scaled", "sign flips")
    assert found.tally.negated == 20


def test_a_difference_is_read_in_blocks_and_large_tensors_agree(tmp_path):
    """Three blocks and a bit: what is found does not depend on where a block ends."""
    rng = np.random.default_rng(4)
    a = rng.normal(size=(3 * BLOCK // 512 + 5, 512)).astype(np.float32)
    order = rng.permutation(len(a))
    for name, b, verdict in (("rows", a[order], "permuted rows"), ("turned", a.T.copy(), "transposed")):
        sy.write(sy.Weights.of({"w": a}), tmp_path / "a.safetensors")
        sy.write(sy.Weights.of({"w": b}), tmp_path / f"{name}.safetensors")
        (found,) = difference(sy.open(tmp_path / "a.safetensors"), sy.open(tmp_path / f"{name}.safetensors")).findings
        assert found.verdict == verdict


@pytest.mark.parametrize("change", ["values", "order", "rank"])
def test_a_few_megabytes_are_in_memory_whatever_the_tensor_takes(tmp_path, change):
    a = np.random.default_rng(9).normal(size=(4096, 4096)).astype(np.float32)  # 64 MB
    changed = {"values": a + 1, "order": a[::-1], "rank": a + np.float32(0.1) * a[:, :1] * a[:1]}
    for name, x in (("a", a), ("b", np.ascontiguousarray(changed[change]))):
        sy.write(sy.Weights.of({"w": x}), tmp_path / f"{name}.safetensors")
    first, second = sy.open(tmp_path / "a.safetensors"), sy.open(tmp_path / "b.safetensors")
    del a, changed, x
    tracemalloc.start()
    (found,) = difference(first, second, rank=change == "rank").findings
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.verdict == ("permuted rows" if change == "order" else "values")
    assert peak < 40e6


def test_rows_wider_than_a_block(tmp_path):
    rng = np.random.default_rng(5)
    a = rng.normal(size=(3, BLOCK + 10)).astype(np.float32)
    (found,) = difference(sy.Weights.of({"w": a}), sy.Weights.of({"w": a[[2, 0, 1]]})).findings
    assert (found.verdict, found.notes) == ("permuted rows", ("3 of 3 rows moved",))
    columns = np.roll(a, 1, axis=1)
    (found,) = difference(sy.Weights.of({"w": a}), sy.Weights.of({"w": columns})).findings
    assert found.verdict == "permuted columns"


def test_growth_along_any_axis():
    rng = np.random.default_rng(6)
    a = rng.normal(size=(4, 5, 6)).astype(np.float32)
    for axis, what in enumerate(("rows", "columns", "slices of axis 2")):
        more = np.concatenate([a, np.ones_like(np.take(a, [0, 1], axis))], axis)
        (found,) = difference(sy.Weights.of({"w": a}), sy.Weights.of({"w": more})).findings
        assert found.verdict == "grown"
        assert f"2 {what} more in the second, not all zero" in found.notes[0]
        assert "are the same bits" in found.notes[0]
        (found,) = difference(sy.Weights.of({"w": more + 1}), sy.Weights.of({"w": a})).findings
        assert found.verdict == "cut"
        assert "of the first elements differ" in found.notes[0]


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_rank_of_a_difference(rank):
    rng = np.random.default_rng(7)
    a = (rng.normal(size=(300, 200)) * 0.02).astype(np.float32)
    b = a + (rng.normal(size=(300, rank)) @ rng.normal(size=(rank, 200)) * 1e-3).astype(np.float32)
    table = sy.diff(sy.Weights.of({"w": a}), sy.Weights.of({"w": b}), rank=True)
    assert table.rows[0]["rank"] == rank


def test_a_difference_of_full_rank_has_no_rank():
    rng = np.random.default_rng(8)
    a = (rng.normal(size=(300, 200)) * 0.02).astype(np.float32)
    b = a + (rng.normal(size=(300, 200)) * 1e-3).astype(np.float32)
    table = sy.diff(sy.Weights.of({"w": a}), sy.Weights.of({"w": b}), rank=True)
    assert table.rows[0]["rank"] is None
    assert "rank over 64" in table.rows[0]["notes"]


def test_only_other_values_have_a_rank():
    """What the help of --rank promises: matrices whose verdict is 'values', and no others."""
    x = np.random.default_rng(11).normal(size=(40, 30)).astype(np.float32)
    step = np.outer(np.arange(40), np.arange(30)).astype(np.float32)
    a = {"values": x, "zeroed": x, "scaled": x, "rounded": x, "sign flips": x}
    b = {"values": x + step, "zeroed": x * (x > 0), "scaled": 3 * x, "rounded": x.astype(np.float16)}
    b["sign flips"] = np.where(x > 1, -x, x)
    table = sy.diff(sy.Weights.of(a), sy.Weights.of(b), rank=True)
    assert {row["name"]: row["verdict"] for row in table.rows} == {name: name for name in a}
    assert {row["name"] for row in table.rows if row["rank"] is not None} == {"values"}


def test_a_cast_that_loses_is_rounded_and_says_what_it_lost():
    x = np.float32([0.1, 1e6, 2.0, 3.0])
    for dtype, lost in (
        (np.float16, "Inf appeared in 1 element"),
        (ml_dtypes.float8_e4m3fn, "NaN appeared in 1 element"),
    ):
        with np.errstate(over="ignore"):
            sides = [sy.Weights.of({"w": y}) for y in (x, x.astype(dtype))]
        for a, b in (sides, sides[::-1]):
            found = difference(a, b)
            assert found.findings[0].verdict == "rounded"
            assert found.tables()[-1].rows[0]["verdict"] == "the same but for rounding"
        assert lost in difference(*sides).findings[0].notes


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.float8_e4m3fn])
def test_a_cast_without_loss_holds_the_same_values(dtype):
    x = np.float32([0.5, 1, 2, -3, 0])
    found = difference(sy.Weights.of({"w": x}), sy.Weights.of({"w": x.astype(dtype)}))
    assert found.findings[0].verdict == "same values"
    assert found.tables()[-1].rows[0]["verdict"] == "the same values, held otherwise"


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-200, 1e-100, 1e-20, 1e20, 1e100, 1e160, 1e300])
def test_numbers_at_the_ends_of_the_range_warn_of_nothing(scale):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 50)) * scale
    y = x[::-1] + rng.standard_normal(x.shape) * (scale * 0.01)
    (row,) = sy.diff(sy.Weights.of({"w": x}), sy.Weights.of({"w": y}), rank=True).rows
    squares = 1e-150 < scale < 1e150  # else sums of squares are zero or infinite, and nothing is said of angles
    assert row["verdict"] == ("permuted and changed" if squares else "values")

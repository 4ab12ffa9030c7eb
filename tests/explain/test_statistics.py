"""Statistics against rational arithmetic: any dtype, any bit pattern, by numpy and by machine code."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import steelyard as sy
from steelyard.core.spec import DTYPES
from steelyard.errors import WeightsError
from steelyard.explain import reading
from steelyard.explain.narrow import _weighed
from steelyard.explain.reading import Workspace
from steelyard.explain.statistics import THOUSANDTHS, statistics
from steelyard.explain.sums import entropy, exact_mean_and_spread
from steelyard.explain.tally import tally

KINDS = [name for name in DTYPES if not name.startswith("float6")]


def patterns(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Random bits, with some of the values that are special."""
    dtype = DTYPES[name].numpy
    if name == "bool":
        return rng.random(size) < 0.3
    bits = DTYPES[name].bits
    if bits < 8:
        codes = rng.integers(0, 1 << bits, size).astype(np.uint8)
        low = -(1 << (bits - 1)) if DTYPES[name].kind == "int" else 0
        return codes.view(dtype) if DTYPES[name].kind == "float" else (codes.astype(np.int64) + low).astype(dtype)
    x = rng.integers(0, 256, size * dtype.itemsize).astype(np.uint8).view(dtype)
    if DTYPES[name].kind == "float" and bits > 8:
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], dtype)
        return np.where(rng.random(size) < 0.2, special[rng.integers(0, 6, size)], x)
    return x


def parts(x: np.ndarray) -> list[float | int]:
    flat = np.ascontiguousarray(x).reshape(-1)
    if flat.dtype.kind == "c":
        flat = flat.view(f"f{flat.dtype.itemsize // 2}")
    with np.errstate(invalid="ignore"):
        return flat.tolist() if flat.dtype.kind in "iub" else flat.astype(np.float64).tolist()


def root(value: Fraction) -> float:
    """The square root of a fraction, to more digits than a float64 has."""
    if not value:
        return 0.0
    lift = max(0, 200 - value.numerator.bit_length() + value.denominator.bit_length())
    lift += lift % 2
    return quotient(Fraction(math.isqrt((value.numerator << lift) // value.denominator), 1 << lift // 2))


def quotient(a: Fraction) -> float:
    try:
        return a.numerator / a.denominator
    except OverflowError:
        return math.inf if a > 0 else -math.inf


def check(x: np.ndarray, compiled: bool) -> None:
    values = parts(x)
    finite = sorted(Fraction(v) for v in values if math.isfinite(v))
    n = len(finite)
    found = tally(sy.Weight.of("x", x), Workspace(compiled))
    assert (found.size, found.finite) == (len(values), n)
    assert found.zeros == finite.count(0)
    assert found.positive == sum(v > 0 for v in finite)
    assert found.nan == sum(v != v for v in values)
    assert found.infinite == (values.count(math.inf), values.count(-math.inf))
    assert found.negative_zeros == sum(v == 0 and math.copysign(1, v) < 0 for v in values)
    if sy.dtype(x.dtype).kind in ("float", "complex"):
        least = float(ml_dtypes.finfo({"c8": "f4", "c16": "f8"}.get(x.dtype.str[1:], x.dtype)).smallest_normal)
        assert found.subnormal == sum(0 < abs(v) < Fraction(least) for v in finite)
    assert found.counts.sum() == len(values)
    if not n:
        return
    ranks = [0, *(-(-n * q // 1000) - 1 for q in THOUSANDTHS), n - 1]
    assert found.ordered(ranks) == [finite[r] for r in ranks]
    total, squares = sum(finite), sum(v * v for v in finite)
    mean, std, l1, l2 = exact_mean_and_spread(found.sums, n)
    assert mean == quotient(total / n)
    assert l1 == quotient(sum(map(abs, finite)))
    near = 1e-15 if compiled and x.dtype in (np.float32, np.complex64) else 2.3e-16  # there rest² is float64
    assert math.isclose(l2, root(squares), rel_tol=near)
    assert math.isclose(std, root(squares / n - (total / n) ** 2), rel_tol=near, abs_tol=near * l2)
    low, high = float(finite[0]), float(finite[-1])
    if low < high and high - low < math.inf:
        edges, counts = found.bins(low, high, 8)
        assert edges[0] == low
        assert edges[-1] == high
        assert len(counts) == len(edges) - 1 <= 8
        assert all(a < b for a, b in pairwise(edges)) or len(edges) == 9
        inner = [Fraction(e) for e in edges[1:-1]]
        expected = Counter(sum(e <= v for e in inner) for v in finite)
        assert counts == [expected[k] for k in range(len(counts))]
    if x.ndim >= 2:
        numbers = np.where(np.isfinite(values), values, 0.0).reshape(x.shape[0], -1).astype(np.longdouble)
        rows, columns = np.sqrt((numbers**2).sum(axis=1)), np.sqrt((numbers**2).sum(axis=0))
        if x.dtype.kind == "c":
            columns = np.hypot(columns[::2], columns[1::2])
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(found.rows, rows.astype(np.float64), 1e-12)
            np.testing.assert_allclose(found.columns, columns.astype(np.float64), 1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])
@pytest.mark.parametrize("name", KINDS)
def test_all_bit_patterns_of_all_dtypes(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(reading, "ALONE", 100)
    rng = np.random.default_rng(KINDS.index(name))
    for shape in ((), (0,), (3, 0), (1,), (301,), (7, 43), (5, 3, 9)):
        check(patterns(name, rng, math.prod(shape)).reshape(shape), compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64", "float8_e5m2"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 0.1, "subnormal", "largest", "payload"])
def test_tensors_of_one_value(name: str, compiled: bool, value: float | str) -> None:
    dtype = DTYPES[name].numpy
    info = ml_dtypes.finfo(dtype)
    if value == "payload":
        unsigned = np.dtype(f"u{dtype.itemsize}")
        infinity = int(np.array(np.inf, dtype).view(unsigned))
        x = np.full((4, 6), infinity + 1, unsigned).view(dtype)
    else:
        x = np.full((4, 6), {"subnormal": info.smallest_subnormal, "largest": info.max}.get(value, value), dtype)
    check(x, compiled)
    shown, quantiles, histogram = statistics(sy.Weights.of({"x": x}))
    row = shown.rows[0]
    if np.isfinite(parts(x)).all():
        assert row["minimum"] == row["maximum"] == quantiles.rows[0]["50 %"] == row["mean"]
        assert row["std"] == 0
        assert histogram.rows[0]["counts"] == [24]
    else:
        assert row["minimum"] is row["mean"] is row["std"] is quantiles.rows[0]["50 %"] is None
        assert row["L1"] == row["L2"] == 0
    shown.to_json()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    st.booleans(),
)
def test_any_floats(values: list[float], name: str, compiled: bool) -> None:
    with np.errstate(over="ignore"):
        check(np.array(values, np.float32).astype(DTYPES[name].numpy), compiled)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30), st.booleans())
def test_any_whole_numbers(values: list[int], compiled: bool) -> None:
    check(np.array(values, np.int64), compiled)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int8", "int32", "complex64"])
def test_numpy_and_machine_code_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 1000)) * 20).astype(DTYPES[name].numpy)
    one, other = tally(sy.Weight.of("x", x), Workspace(False)), tally(sy.Weight.of("x", x), Workspace(True))
    ranks = list(range(0, one.finite, 29_999))
    assert one.ordered(ranks) == other.ordered(ranks)
    assert (one.counts == other.counts).all()
    assert one.sums.total == other.sums.total
    assert one.sums.absolute == other.sums.absolute
    for a, b in zip(
        exact_mean_and_spread(one.sums, one.finite), exact_mean_and_spread(other.sums, other.finite), strict=True
    ):
        assert math.isclose(a, b, rel_tol=2.3e-16)
    assert one.distinct == other.distinct
    assert entropy(one.counts) == entropy(other.counts)
    assert one.bins(-10.0, 10.0, 16) == other.bins(-10.0, 10.0, 16)
    np.testing.assert_allclose(one.rows, other.rows, 1e-13)
    np.testing.assert_allclose(one.columns, other.columns, 1e-13)


def test_sums_of_counts_above_2_to_the_32_are_exact() -> None:
    times, factors, exponents = np.array([2**40 + 3, 5]), np.array([2**32 - 1, -(2**32)]), np.array([2, 0])
    assert _weighed(times, factors, exponents) == (2**40 + 3) * (2**32 - 1) * 4 - 5 * 2**32


def test_distinct_values_of_wide_types_are_counted_while_they_are_few() -> None:
    few = np.tile(np.arange(4096, dtype=np.float32), 3)
    for compiled in (False, True):
        assert tally(sy.Weight.of("x", few), Workspace(compiled)).distinct == 4096
        assert tally(sy.Weight.of("x", np.append(few, np.float32(-1))), Workspace(compiled)).distinct is None
        assert tally(sy.Weight.of("x", few.astype(np.float64)), Workspace(compiled)).distinct == 4096


def test_the_tables(tmp_path) -> None:
    rng = np.random.default_rng(1)
    weights = {
        "a": rng.normal(size=(40, 30)).astype(np.float32),
        "b": rng.normal(size=(40, 30)).astype(ml_dtypes.bfloat16),
        "steps": np.int64(2**62 + 1).reshape(()),
        "empty": np.zeros((0, 3), np.float16),
    }
    sy.write(sy.Weights.of(weights, ties={"c": "a"}), tmp_path / "m.safetensors")
    shown, quantiles, histogram = sy.statistics(sy.open(tmp_path / "m.safetensors"))
    assert shown.column("name") == ["a", "b", "steps", "empty"] or set(shown.column("name")) == set(weights)
    by_name = {row["name"]: row for row in shown.rows}
    assert by_name["steps"]["minimum"] == 2**62 + 1
    a = weights["a"]
    assert by_name["a"]["row norms"] == pytest.approx(np.quantile(np.linalg.norm(a, axis=1), [0, 0.5, 1]).tolist())
    assert by_name["b"]["entropy"] == pytest.approx(
        -sum(c / 1200 * math.log2(c / 1200) for c in Counter(weights["b"].view(np.uint16).ravel().tolist()).values())
    )
    for row in quantiles.rows[:2]:
        levels = [q / 1000 for q in THOUSANDTHS]
        flat = weights[row["name"]].astype(np.float64)
        assert list(row.values())[2:-1] == np.quantile(flat, levels, method="inverted_cdf").tolist()
    for row in histogram.rows:
        if row["counts"] is not None:
            assert sum(row["counts"]) == weights[row["name"]].size
    assert sy.statistics(sy.Weights.of(weights), sy.where("a"), norms=False)[0].column("name") == ["a"]
    with pytest.raises(WeightsError, match="at least one bin"):
        statistics(sy.Weights.of(weights), bins=0)
    with pytest.raises(WeightsError, match="matches"):
        statistics(sy.Weights.of(weights), sy.where("z"))


@pytest.mark.parametrize("name", KINDS)
def test_entropy_is_that_of_whole_values_or_said_to_be_of_leading_bits(name: str) -> None:
    x = patterns(name, np.random.default_rng(0), 300)
    row = statistics(sy.Weights.of({"x": x}))[0].rows[0]
    whole, leading = row["entropy"], row["entropy of leading 16 bits"]
    if sy.dtype(name).bits > (32 if sy.dtype(name).kind == "complex" else 16):
        assert whole is None
        assert leading > 0
    else:
        assert leading is None
        flat = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
        shares = np.unique(flat, return_counts=True)[1] / flat.size
        assert whole == pytest.approx(-(shares * np.log2(shares)).sum())


def test_the_widest_of_ranges_has_a_median_norm_and_a_histogram() -> None:
    for size in (1, 300):  # the second of them is of more than one piece
        x = np.tile([[1e308, -1e308], [1e308, 1e308]], (size, 1))
        shown, _, histogram = statistics(sy.Weights.of({"x": x}), bins=4)
        assert shown.rows[0]["row norms"] == pytest.approx([math.sqrt(2) * 1e308] * 3)
        assert histogram.rows[0]["counts"] == [size, 0, 0, 3 * size]
        check(x, compiled=False)
    spread = np.linspace(-1, 1, 1001) * 1.75e308
    edges, counts = (statistics(sy.Weights.of({"x": spread}), bins=7)[2].rows[0][key] for key in ("edges", "counts"))
    assert len(counts) == 7
    assert sum(counts) == 1001
    assert all(120 <= count <= 166 for count in counts)  # edges of four bits of fraction
    assert edges[0] == spread[0]
    assert edges[-1] == spread[-1]


def test_blocks_are_read_once_and_no_more_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    x = np.random.default_rng(0).normal(size=1000).astype(ml_dtypes.bfloat16)

    def fill(first: int, flat: np.ndarray) -> None:
        read.append((first, flat.size))
        flat[:] = x[first : first + flat.size]

    monkeypatch.setattr(reading, "BLOCK", 128)
    item = sy.Weight("x", sy.Spec.like(x), lambda: pytest.fail("the whole was read"), fill=fill)
    seen: list[int] = []
    found = tally(item, Workspace(False), progress=seen.append)
    assert found.ordered([0, 999]) == [float(x.min()), float(x.max())]
    assert read == [(at, min(128, 1000 - at)) for at in range(0, 1000, 128)]
    assert sum(seen) == 2000


@pytest.mark.slow
@pytest.mark.parametrize(("code", "width"), [("BF16", 2), ("F32", 4), ("I8", 1)])
def test_more_than_two_to_the_31_elements(tmp_path, code: str, width: int) -> None:
    """A file of zeros that takes no room on the disk, but for its last element."""
    import json

    size = 2**31 + 64
    entry = {"dtype": code, "shape": [2, size // 2], "data_offsets": [0, size * width]}
    head = json.dumps({"w": entry}).encode()
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size * width)
        file.seek(-1, 2)
        file.write(b"\x40")
    shown, quantiles, _ = statistics(sy.open(tmp_path / "huge.safetensors"))
    row = shown.rows[0]
    last = {"BF16": 2.0, "F32": 2.0, "I8": 64}[code]
    assert row["elements"] == size
    assert row["zeros"] == size - 1
    assert (row["minimum"], row["maximum"]) == (0, last)
    assert row["mean"] == last / size
    assert row["L1"] == row["L2"] == last
    assert row["distinct"] == 2
    assert quantiles.rows[0]["99.9 %"] == 0
    assert row["row norms"] == [0, last / 2, last]
    assert row["column norms"] is None

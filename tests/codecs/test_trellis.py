"""Trellis: what its levels cost and how far they are from the bound, that nothing is lost on the grid, and damage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steelyard.codecs import _planes
from steelyard.codecs._basis import principal
from steelyard.codecs._grades import Grades
from steelyard.codecs._rowwise import Rowwise
from steelyard.codecs.trellis import Trellis, code, decoded
from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import CodecError
from steelyard.kernels import trellis as kernel

RNG = np.random.default_rng(11)


def measured(codec: Trellis, x: np.ndarray) -> tuple[float, float]:
    """Bits for each element, and the mean squared error."""
    parts = codec.encode(x)
    y = codec.decode(parts, Spec.like(x))
    return 8 * parts["stream"].size / x.size, float(np.square(x - y).mean())


@pytest.mark.parametrize(
    ("states", "lagrangian", "gap"), [(1, 0.1, 0.275), (4, 0.4, 0.125), (8, 0.4, 0.11), (32, 0.4, 0.09)]
)
def test_how_far_from_the_bound_of_a_gaussian_source(states: int, lagrangian: float, gap: float) -> None:
    x = RNG.normal(size=(400, 500)).astype(np.float32)
    bits, error = measured(Trellis(0.3 if states == 1 else 0.15, states, lagrangian), x)  # type: ignore[arg-type]
    assert 2.5 < bits < 4.5
    assert 0 < bits - 0.5 * math.log2(1 / error) < gap


def test_scales_of_rows_and_columns_are_learned_and_not_stored() -> None:
    x = RNG.normal(size=(500, 300))
    scaled = x * np.geomspace(0.2, 5, 500)[:, None] * np.geomspace(5, 0.2, 300)  # the mean logarithm is the same
    assert measured(Trellis(0.1), scaled)[0] < measured(Trellis(0.1), x)[0] + 0.06


def test_a_tall_matrix_is_turned_where_its_columns_are_correlated() -> None:
    mixed = (RNG.normal(size=(4000, 24)) * np.geomspace(1, 0.02, 24)) @ np.linalg.qr(RNG.normal(size=(24, 24)))[0]
    for x, turned in ((mixed, True), (RNG.normal(size=(4000, 24)), False)):
        plain, free = (Trellis(0.01, turn=turn) for turn in (False, True))
        assert free.encode(x)["stream"][0] & 1 == turned
        if turned:
            (bits, error), (bits_turned, error_turned) = measured(plain, x), measured(free, x)
            assert bits_turned < bits - 1
            assert error_turned < 1.05 * error


@pytest.mark.parametrize("shape", [(), (9,), (30, 40), (8, 3, 5, 5), (0, 4)])
def test_a_path_down_the_columns_is_that_of_the_turned_matrix(shape: tuple[int, ...]) -> None:
    x = RNG.normal(size=shape).astype(np.float32)
    down, codec = Trellis(0.3, down=True), Trellis(0.3)
    parts, rows = down.encode(x), x.reshape(len(x), int(np.prod(shape[1:]))) if x.ndim > 1 else x.reshape(1, -1)
    turned = codec.encode(rows.T.copy())
    assert parts["stream"].tobytes() == turned["stream"].tobytes()
    y = down.decode(parts, Spec.like(x))
    assert y.shape == shape
    assert y.tobytes() == codec.decode(turned, Spec.like(rows.T)).T.tobytes()


@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("block", [1 << 21, 100])
def test_levels_that_are_chosen_row_by_row_are_told_as_they_were_chosen(
    states: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", block)
    codec = Trellis(0.5, states=states, lagrangian=0.2)  # type: ignore[arg-type]
    x = RNG.normal(size=(30, 40)) * 4
    rows = Rowwise(codec, x)
    wholes = np.stack([rows.take(row) for row in x])
    assert np.abs(wholes - x).max() < 3
    assert (codec.decode(rows.parts(0.5), Spec.of((30, 40), "float64")) == wholes * 0.5).all()
    with pytest.raises(CodecError, match="steps from 0"):
        Rowwise(codec, x * 1e9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (9,), (30, 40), (8, 3, 5, 5)])
def test_what_lies_on_the_grid_is_held_exactly(dtype: str, shape: tuple[int, ...]) -> None:
    x = (np.rint(RNG.normal(size=shape) * 3) * 0.125).astype(DTYPES[dtype].numpy)
    codec = Trellis(0.125, states=1, lagrangian=0)
    assert codec.decode(codec.encode(x), Spec.like(x)).tobytes() == (x + x.dtype.type(0)).tobytes()


@pytest.mark.parametrize("scale", [0.02, 0.3, 3, 40, 3000, 1e7])
@pytest.mark.parametrize("width", [1, 7, 600])
def test_levels_of_any_size_come_back(scale: float, width: int) -> None:
    levels = np.rint(RNG.standard_t(2, size=(4200 // width, width)) * scale).clip(-(2**28), 2**28).astype(np.int32)
    stream = code(levels)
    assert (decoded(np.frombuffer(stream, np.uint8), levels.shape) == levels).all()
    assert len(stream) < 32 + levels.size * (math.log2(1 + scale) + 5) / 8


def test_a_large_tensor_is_coded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=(100, 60)).astype(np.float32)
    whole = Trellis(0.2)
    once = whole.decode(whole.encode(x), Spec.like(x))
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", 1000)
    parts = whole.encode(x)
    assert _planes.read_varint(parts["stream"], 5)[0] == 17  # rows of a block
    assert np.abs(whole.decode(parts, Spec.like(x)) - once).max() < 0.8
    assert np.abs(whole.decode(parts, Spec.like(x)) - x).max() < 0.8


def test_importance_moves_error_to_where_it_matters_less() -> None:
    x = RNG.normal(size=(200, 200))
    weigh = np.ones(200)
    weigh[:100] = 0.05
    codec = Trellis(0.3)
    y = codec.decode(codec.held(x, 0.3, weigh), Spec.like(x))
    errors = np.square(x - y).mean(0)
    assert errors[:100].mean() > 1.5 * errors[100:].mean()


@pytest.mark.parametrize("states", [4, 8, 16, 32, 64])
def test_from_each_state_two_lead_on_and_two_lead_there(states: int) -> None:
    following, second = kernel.tables(states)
    assert np.bincount(following.reshape(-1), minlength=states).tolist() == [2] * states
    assert second.sum() == states // 2


def test_bad_settings_and_bad_values_are_named() -> None:
    for settings in ({"step": 0.0}, {"step": math.nan}, {"states": 3}, {"lagrangian": -1.0}):
        with pytest.raises(CodecError, match=next(iter(settings))):
            Trellis(**settings)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="NaN"):
        Trellis().encode(np.array([1, np.nan]))
    with pytest.raises(CodecError, match="greater step"):
        Trellis(1e-12).encode(np.ones(3))
    with pytest.raises(CodecError, match="cast"):
        Trellis().encode(np.arange(3))
    stream = Trellis(0.1).encode(np.ones(3))["stream"]
    with pytest.raises(CodecError, match="later version"):
        Trellis().decode({"stream": stream | 128}, Spec.of((3,), "float64"))


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("states", [1, 8])
def test_grades_multiply_the_steps_of_rows_and_columns(
    down: bool, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", 300)
    spec, grades = Spec((40, 2, 15), DTYPES["float32"]), Grades(np.arange(-20, 20), np.arange(30) % 7 - 9)
    shape = (30, 40) if down else (40, 30)
    codec = Trellis(states=states, down=down)  # type: ignore[arg-type]
    levels = RNG.integers(-9, 10, shape).astype(np.int32)
    plain = codec.decode(codec.told(levels, 0.25), spec).reshape(40, 30).astype(np.float64)
    parts = codec.told(levels, 0.25, grades)
    exact = plain * 2.0 ** (grades.rows[:, None] / 4) * 2.0 ** (grades.columns / 4)
    np.testing.assert_allclose(codec.decode(parts, spec).reshape(40, 30), exact, rtol=1e-6)
    for cut in (3, 12, 60):
        with pytest.raises(CodecError):
            codec.decode({"stream": parts["stream"][:cut]}, spec)


def test_a_basis_and_grades_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", 5000)  # several blocks
    mixed = (RNG.normal(size=(2000, 16)) * np.geomspace(1, 0.02, 16)) @ np.linalg.qr(RNG.normal(size=(16, 16)))[0]
    grades = Grades(RNG.integers(-8, 8, 2000).astype(np.int32), RNG.integers(-8, 8, 16).astype(np.int32))
    down, across = grades.factors
    x = mixed * across * down[:, None]
    codec, spec = Trellis(turn=False), Spec.like(x)
    parts = codec.turned(x, 0.01, principal(mixed), grades)
    assert parts["stream"][0] == 5
    error = (codec.decode(parts, spec) - x) / (down[:, None] * across)
    bits, within = measured(Trellis(0.01, turn=False), mixed)
    assert np.square(error).mean() < 1.2 * within
    assert 8 * parts["stream"].size / x.size < bits - 0.5  # the grades of rows take a quarter
    for cut in (1, 5, 7, 40, parts["stream"].size - 10):
        with pytest.raises(CodecError):
            codec.decode({"stream": parts["stream"][:cut]}, spec)
    with pytest.raises(CodecError, match="a basis for a matrix of 16 by 2000"):
        codec.decode(parts, Spec((16, 2000), spec.dtype))


@pytest.mark.parametrize(("dtype", "most"), [("float16", 57344.0), ("bfloat16", 3.3e38), ("float32", 3.4e38)])
def test_a_level_above_the_largest_number_of_a_type_is_that_number(dtype: str, most: float) -> None:
    x = np.array([most], DTYPES[dtype].numpy)
    y = Trellis().decode(Trellis().encode(x), Spec.like(x)).astype(np.float64)
    assert abs(y - x.astype(np.float64))[0] < 0.2 * most

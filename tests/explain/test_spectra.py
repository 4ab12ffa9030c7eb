"""Singular values in figures: against numpy's, for hostile values, in bounded memory, and certified from outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import RecipeError, WeightsError
from steelyard.explain import spectra as module
from steelyard.explain.powerlaw import fit_power_law
from steelyard.explain.spectra import Matrix, bounds, singular_values, spectra
from steelyard.formats import open, write

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8", "complex64"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 7), (7, 1), (8, 3, 3, 2)], ids=str)
def test_singular_values_are_those_of_numpy(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PANEL", 64)  # several panels
    x = (20 * RNG.standard_normal(shape)).astype(Spec.of(shape, dtype).dtype.numpy)
    wide = x.astype(np.complex128 if dtype == "complex64" else np.float64).reshape(shape[0], -1)
    expected = np.linalg.svd(wide, compute_uv=False)
    np.testing.assert_allclose(singular_values(Weight.of("w", x)), expected, rtol=1e-9, atol=1e-7 * expected[0])


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)], ids=str)
def test_a_file_is_read_in_panels(shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PANEL", 100)
    x = RNG.standard_normal(shape).astype(np.float32)
    write(Weights.of({"w": x}), tmp_path / "a.safetensors")
    item = open(tmp_path / "a.safetensors")["w"]
    assert item.fill is not None
    whole = Weight(item.name, item.spec, lambda: pytest.fail("the whole tensor was read"), fill=item.fill)
    np.testing.assert_allclose(singular_values(whole), np.linalg.svd(x.astype(np.float64), compute_uv=False), rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1.0, 1e300])
def test_any_scale(factor: float) -> None:
    values = singular_values(Weight.of("w", np.diag([3.0, 2.0, 1.0]) * factor))
    np.testing.assert_allclose(values, np.array([3.0, 2.0, 1.0]) * factor, rtol=1e-12)


def test_elements_at_the_end_of_the_range() -> None:
    row = spectra(Weights.of({"w": np.array([[1e308, -1e308], [1e308, 1e308]])})).rows[0]
    assert row["largest"] == pytest.approx(2**0.5 * 1e308)
    assert row["stable rank"] == pytest.approx(2)
    beyond = spectra(Weights.of({"w": np.full((9, 9), 1e308), "b": np.full((300, 300), 1e308)}), exact=100)
    assert [row["largest"] for row in beyond.rows] == [np.inf, np.inf]


def test_the_figures_of_a_known_spectrum() -> None:
    left, _ = np.linalg.qr(RNG.standard_normal((50, 50)))
    right, _ = np.linalg.qr(RNG.standard_normal((30, 30)))
    values = np.r_[8.0, 4.0, 2.0, 1.0, np.zeros(26)]
    row = spectra(Weights.of({"w": left[:, :30] * values @ right})).rows[0]
    p = values[:4] ** 2 / 85
    assert row["norm"] == pytest.approx(85**0.5)
    assert row["largest"] == row["largest below"] == pytest.approx(8)
    assert row["smallest"] == 0
    assert row["condition"] == np.inf
    assert row["rank"] == 4
    assert row["stable rank"] == pytest.approx(85 / 64)
    assert row["effective rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert row["90 % energy"] == 2
    assert row["alpha"] is None  # four values are no tail


def test_values_of_every_kind_are_defined() -> None:
    x = np.ones((2, 3), np.float32)
    bad = x.copy()
    bad[1, 2] = np.nan
    table = spectra(
        Weights.of(
            {
                "zero": 0 * x,
                "nan": bad,
                "inf": np.full((2, 2), -np.inf),
                "empty": np.zeros((0, 4)),
                "one": np.full((1, 1), -2.0),
                "subnormal": np.full((2, 2), 1e-310),
                "vector": np.zeros(4),
                "scalar": np.float32(1),
            }
        )
    )
    found = {row["name"]: row for row in table.rows}
    assert list(found) == ["zero", "nan", "inf", "empty", "one", "subnormal"]
    assert (found["zero"]["largest"], found["zero"]["rank"], found["zero"]["how"]) == (0, 0, "all zero")
    assert "1 values are not finite" in found["nan"]["how"]
    assert "4 values are not finite" in found["inf"]["how"]
    assert found["empty"]["how"] == "no elements"
    assert found["one"]["largest"] == found["one"]["smallest"] == 2
    assert found["subnormal"]["largest"] == pytest.approx(2e-310, rel=1e-6, abs=0)
    with pytest.raises(WeightsError, match="needs two axes"):
        spectra(Weights.of({"vector": np.zeros(4)}))
    with pytest.raises(WeightsError, match="needs two axes"):
        singular_values(Weight.of("vector", np.zeros(4)))
    with pytest.raises(RecipeError, match="at least 0"):
        spectra(Weights.of({"w": x}), exact=-1)


SPECTRA = {
    "flat": np.ones(300),
    "decaying": 0.97 ** np.arange(300),
    "spiked": np.r_[50.0, np.ones(299)],
    "low rank": np.r_[np.ones(5), np.zeros(295)],
    "power": (1.0 + np.arange(300)) ** -0.6,
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_bounds_hold_and_mean_something(kind: str) -> None:
    values = SPECTRA[kind]
    left, _ = np.linalg.qr(RNG.standard_normal((400, 300)))
    right, _ = np.linalg.qr(RNG.standard_normal((300, 300)))
    matrix = Matrix.of(Weight.of("w", left * values @ right))
    p = values[values > 0] ** 2 / (values**2).sum()
    effective = np.exp(-(p * np.log(p)).sum())
    for seed in range(10):
        found = bounds(matrix, seed)
        square = found.scale**2
        assert square * found.total == pytest.approx((values**2).sum())
        assert np.all(square * found.energies <= values[: found.energies.size] ** 2 * (1 + 1e-9) + 1e-12)
        assert values[0] ** 2 <= square * found.most * (1 + 1e-12)
        assert found.most <= 4 * found.energies[0]
        low, high = found.effective_rank()
        assert low <= effective * (1 + 1e-9)
        assert effective <= high * (1 + 1e-9)


def test_a_matrix_beyond_the_limit_gets_bounds_in_the_table() -> None:
    x = RNG.standard_normal((300, 200))
    exact, bounded = (spectra(Weights.of({"w": x}), exact=n).rows[0] for n in (200, 199))
    assert (exact["how"], bounded["how"]) == ("exact", "bounds")
    assert bounded["norm"] == pytest.approx(exact["norm"])
    for name in ("largest", "stable rank", "effective rank"):
        assert bounded[name] <= exact[name] <= bounded[f"{name} below"]
    assert spectra(Weights.of({"w": 0 * x}), exact=0).rows[0]["how"] == "all zero"


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_planted_power_law_is_found(alpha: float) -> None:
    away = []
    for seed in range(10):
        draw = np.random.default_rng(seed).random(3000)
        x = (1 - draw) ** (-1 / (alpha - 1))
        body = np.random.default_rng(seed).random(3000)  # below the threshold of 1: no power law
        law = fit_power_law(np.r_[x, body[body > 0.3]])
        away.append(law.alpha - alpha)
        assert abs(law.alpha - alpha) < 5 * law.sigma + 0.1
        assert 0.7 < law.xmin < 8
    assert abs(np.mean(away)) < 0.1


def test_a_power_law_needs_positive_values() -> None:
    for values in ([], [1.0], [0.0, 1.0], [1.0, np.inf], [1.0, np.nan]):
        with pytest.raises(WeightsError, match="two or more positive"):
            fit_power_law(np.array(values))
    assert fit_power_law(np.ones(5)).tail == 1  # no spread, no exponent


def test_inspect_shows_the_figures_of_every_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    write(Weights.of({"w": np.diag([4.0, 3.0]), "v": np.zeros(3)}), path)
    assert main(["inspect", str(path), "--spectra", "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[0])
    assert table["title"] == "spectra"
    assert [(row["name"], row["largest"], row["stable rank"]) for row in table["rows"]] == [("w", 4.0, 25 / 16)]

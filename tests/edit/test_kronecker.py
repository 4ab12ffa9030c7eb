"""Errors that cost tr(A D B Dᵀ): how much less is lost at the same bytes, what has no evidence, and what counts nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.edit._components import Components
from steelyard.edit._kept import Kept
from steelyard.edit.kronecker import INPUTS, OUTPUTS, Kronecker
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.errors import RecipeError, WeightsError


def moments(random: np.random.Generator, size: int) -> np.ndarray:
    """Of correlated numbers, some larger than others."""
    mix = random.normal(size=(size, size)) / size**0.5 + np.eye(size)
    x = random.normal(size=(4 * size, size)) @ mix * np.exp(0.7 * random.normal(size=size))
    return np.asarray(x.T @ x / len(x), np.float32)


def evidence(**factors: np.ndarray) -> Weights:
    """`learn.kronecker`'s form, for a weight ``w``."""
    about = {"kind": "kronecker", "model": "", "inputs first": [], "samples": {}}
    named = {"w" + {"outputs": OUTPUTS, "inputs": INPUTS}[name]: x for name, x in factors.items()}
    return Weights.of(named, meta={"evidence": json.dumps(about)})


def problem(seed: int, shape: tuple[int, ...], *, paired: bool = True) -> tuple[Weights, Weights]:
    random = np.random.default_rng(seed)
    a, b = moments(random, shape[0]), moments(random, int(np.prod(shape[1:])))
    w = Weights.of({"w": random.normal(size=shape).astype(np.float32)})
    return w, evidence(outputs=a if paired else a.diagonal().copy(), inputs=b)


def lost(step: RateDistortion, w: Weights, by: Weights) -> tuple[int, float]:
    """The bytes, and what the error costs."""
    held = step(w)["w"].read()
    return held.nbytes, Kronecker.of(by, w["w"]).cost(held.array().astype(np.float64) - w["w"].array())


@pytest.mark.parametrize(("paired", "share"), [(True, 0.3), (False, 0.6)])
@pytest.mark.parametrize("shape", [(200, 160), (96, 16, 3, 3)])
def test_much_less_is_lost_at_no_more_bytes_than_by_single_importances(
    paired: bool, share: float, shape: tuple[int, ...]
) -> None:
    w, by = problem(1, shape, paired=paired)
    single = Weights.of({"w": Kronecker.of(by, w["w"]).single.reshape(shape).astype(np.float32)})
    size, cost = lost(RateDistortion(bits=2.9, by=by), w, by)
    plain, plainly = lost(RateDistortion(bits=3.1, by=single), w, by)
    assert size <= plain
    assert cost < share * plainly


@pytest.mark.parametrize("shape", [(300, 320), (330, 300)])
def test_a_trellis_within_loses_a_tenth_less_at_no_more_bytes(shape: tuple[int, int]) -> None:
    w, by = problem(7, shape)
    (size, cost), (plain, plainly) = (lost(RateDistortion(bits=2.5, by=by, states=n), w, by) for n in (8, 1))
    assert size <= 1.01 * plain
    assert cost < 0.9 * plainly


def test_of_few_bits_one_state_takes_a_tenth_less(monkeypatch: pytest.MonkeyPatch) -> None:
    w, by = problem(8, (256, 256))
    size, cost = lost(RateDistortion(bits=0.6, by=by), w, by)
    monkeypatch.setattr("steelyard.edit.ratedistortion.FEW", 0.0)
    more, other = lost(RateDistortion(bits=0.6, by=by), w, by)
    assert 1.1 * size < more
    assert cost < 1.02 * other


@pytest.mark.parametrize("bits", [0.5, 1.5, 3, 5])
def test_bits_are_about_what_was_asked_for(bits: float) -> None:
    w, by = problem(2, (256, 200))
    size, _ = lost(RateDistortion(bits=bits, by=by), w, by)
    assert 0.9 * bits < 8 * size / w["w"].spec.size < 1.05 * bits


def test_a_file_holds_it_and_gives_the_same_values(tmp_path) -> None:  # type: ignore[no-untyped-def]
    w, by = problem(3, (40, 6, 3, 3))
    made = RateDistortion(bits=3, by=by)(w)
    formats.write(made, tmp_path / "small.safetensors")
    assert (formats.open(tmp_path / "small.safetensors")["w"].array() == made["w"].array()).all()


def test_what_counts_nothing_becomes_zero_and_takes_next_to_nothing() -> None:
    w, by = problem(4, (30, 20))
    nothing = evidence(outputs=np.zeros((30, 30), np.float32), inputs=by["w" + INPUTS].array())
    held = RateDistortion(bits=3, by=nothing)(w)["w"].read()
    assert not held.array().any()
    assert held.nbytes < 20


def test_a_row_that_costs_more_is_held_finer() -> None:
    w, _ = problem(5, (64, 300))
    rows = np.geomspace(1, 1e4, 64).astype(np.float32)
    by = evidence(outputs=rows, inputs=np.eye(300, dtype=np.float32) / 300)
    error = np.square(RateDistortion(bits=3, by=by)(w)["w"].array() - w["w"].array()).mean(axis=1)
    assert error[:8].mean() > 100 * error[-8:].mean()


def test_vectors_that_cost_more_are_held_finer_and_those_without_evidence_as_they_were() -> None:
    random = np.random.default_rng(7)
    w, by = problem(7, (64, 48))
    cheap, dear, buffer = (random.normal(size=400).astype(np.float32) for _ in range(3))
    whole = Weights([*w.values(), *Weights.of({"cheap": cheap, "dear": dear, "buffer": buffer}).values()])
    known = {"cheap": 1.0, "dear": 64.0}
    told = {n + OUTPUTS: np.full(400, c, np.float32) for n, c in known.items()}
    told |= {n + INPUTS: np.ones(1, np.float32) for n in known}
    held = RateDistortion(bits=3, by=Weights([*by.values(), *Weights.of(told).values()], {}, by.meta))(whole)
    errors = {n: float(np.square(held[n].array() - whole[n].array()).mean()) for n in known}
    assert errors["cheap"] == pytest.approx(64 * errors["dear"], rel=0.3)
    assert held["dear"].read().nbytes > held["cheap"].read().nbytes + 400 * 2.5 / 8
    assert held["buffer"].scheme is None
    assert np.array_equal(held["buffer"].array(), buffer)


def test_evidence_that_does_not_fit_is_named() -> None:
    w, by = problem(6, (12, 10))
    biased = Weights.of({"w": w["w"].array(), "bias": np.ones(12, np.float32)})
    assert RateDistortion(bits=3, by=by)(biased)["bias"].array().all()
    with pytest.raises(WeightsError, match=r"'v'.* has none for its outputs"):
        RateDistortion(bits=3, by=by)(Weights.of({"v": w["w"].array()})).arrays()
    for wrong in (
        evidence(outputs=by["w" + OUTPUTS].array()),
        evidence(outputs=np.eye(9, dtype=np.float32), inputs=by["w" + INPUTS].array()),
        evidence(outputs=-by["w" + OUTPUTS].array(), inputs=by["w" + INPUTS].array()),
        evidence(outputs=by["w" + OUTPUTS].array() * np.float32(np.nan), inputs=by["w" + INPUTS].array()),
    ):
        with pytest.raises(WeightsError, match="'w'"):
            RateDistortion(bits=3, by=wrong)(w)["w"].read()
    with pytest.raises(RecipeError, match="give bits"):
        RateDistortion(error=0.1, by=by)


def test_damping_makes_less_of_evidence_that_few_examples_gave() -> None:
    random = np.random.default_rng(8)
    truth, inputs = moments(random, 96), moments(random, 96)
    w = Weights.of({"w": random.normal(size=(96, 96)).astype(np.float32)})
    true, roots = evidence(outputs=truth, inputs=inputs), [np.linalg.cholesky(x) for x in (truth, inputs)]
    few = [root @ random.normal(size=(96, 12)) for root in roots]
    by = evidence(**{n: np.float32(x @ x.T / 12) for n, x in zip(("outputs", "inputs"), few, strict=True)})
    costs = {}
    for damping in (None, 1.0, 1e5):
        size, costs[damping] = lost(RateDistortion(bits=3, by=by, damping=damping), w, true)
        assert 8 * size / 96**2 == pytest.approx(3, rel=0.1)
    assert costs[1.0] < 0.8 * min(costs[None], costs[1e5])


def test_vectors_keep_their_share_with_any_damping() -> None:
    random = np.random.default_rng(9)
    w, by = problem(9, (64, 48))
    whole = Weights([*w.values(), *Weights.of({"v": random.normal(size=400).astype(np.float32)}).values()])
    mean = float(np.outer(by["w" + OUTPUTS].array().diagonal(), by["w" + INPUTS].array().diagonal()).mean())
    told = {"v" + OUTPUTS: np.full(400, mean, np.float32), "v" + INPUTS: np.ones(1, np.float32)}
    by = Weights([*by.values(), *Weights.of(told).values()], {}, by.meta)
    held = RateDistortion(bits=3, by=by, damping=1e5)(whole)
    errors = [float(np.square(held[n].array() - whole[n].array()).mean()) for n in ("w", "v")]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), 1e6])
def test_damping_out_of_range_is_named(damping: float) -> None:
    _, by = problem(6, (12, 10))
    with pytest.raises(RecipeError, match="damping is a share of the mean of the diagonal, above 0, not"):
        RateDistortion(bits=3, by=by, damping=damping)


def test_damping_without_evidence_of_pairs_is_an_error() -> None:
    with pytest.raises(RecipeError, match="damping is of evidence of the kind kronecker or hessian: give that as by"):
        RateDistortion(bits=3, damping=1.0)


def test_tensors_share_bits_such_that_one_buys_as_much_in_each_of_them() -> None:
    """One of pairs on both sides, and one of pairs of columns alone, whose trellis loses more for its step."""
    (first, by), (second, other) = problem(8, (128, 96)), table(8)
    w = Weights.of({"a": first["w"].array(), "b": second["w"].array() * np.float32(0.1)})
    about = by.meta
    named = {name + key[1:]: x.array() for name, found in (("a", by), ("b", other)) for key, x in found.items()}
    by = Weights.of(named, meta=about)
    found = {}
    for factor in (0.3, 1.0, 3.0):
        held = RateDistortion(bits=3, by=by, importance={"a": factor})(w)
        bits = sum(8 * item.read().nbytes for item in held.values()) / sum(item.spec.size for item in w.values())
        cost = sum(Kronecker.of(by, w[n]).cost(held[n].array() - w[n].array()) for n in w)
        found[factor] = cost * 4 ** (bits - 3)  # at three bits
    assert min(found, key=found.__getitem__) == 1


def table(seed: int) -> tuple[Weights, Weights]:
    """Rows of correlated numbers, and evidence of pairs of columns alone."""
    random = np.random.default_rng(seed)
    mix = np.linalg.qr(random.normal(size=(12, 12)))[0] * np.geomspace(3, 0.1, 12)[:, None]
    x = random.normal(size=(3000, 12)) @ mix
    return Weights.of({"w": x.astype(np.float32)}), evidence(
        outputs=random.exponential(size=3000).astype(np.float32), inputs=moments(random, 12)
    )


def test_a_tall_table_is_held_in_components_at_less_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    w, by = table(4)
    step = RateDistortion(bits=2.5, by=by)
    assert step(w)["w"].scheme.codec.turn  # type: ignore[union-attr]
    assert step(w)["w"].read().parts["stream"][0] == 5
    size, cost = lost(step, w, by)
    assert abs(8 * size / 36000 - 2.5) < 0.15
    monkeypatch.setattr("steelyard.edit.kronecker.separable", lambda weight: False)
    plain, plainly = lost(RateDistortion(bits=2.7, by=by), w, by)
    assert size < plain
    assert cost < 0.6 * plainly


def test_components_of_a_loss_that_hardly_minds_some_directions_do_no_harm() -> None:
    w, _ = table(5)
    ones = np.ones(3000, np.float32)
    for inputs in (np.diag(np.geomspace(1, 1e-12, 12)), np.outer(np.arange(12.0), np.arange(12.0))):
        by = evidence(outputs=ones, inputs=inputs.astype(np.float32))
        held = RateDistortion(bits=4, by=by)(w)["w"].array()
        assert Kronecker.of(by, w["w"]).cost(held - w["w"].array()) < 0.05 * Kronecker.of(by, w["w"]).cost(
            w["w"].array()
        )


def test_components_say_what_an_error_costs() -> None:
    random = np.random.default_rng(6)
    x, rows, mix = (
        random.normal(size=(500, 6)),
        random.uniform(0.5, 2, 500),
        np.linalg.qr(random.normal(size=(6, 6)))[0],
    )
    costs = mix * np.linspace(1, 9, 6) @ mix.T
    found = Components.of(x, rows, costs)
    down, across = found.grades.factors
    z = found.some(x, np.arange(500))
    np.testing.assert_allclose(down[:, None] * (z @ found.components) * across, x)
    moved = found.components * across
    np.testing.assert_allclose(moved @ costs @ moved.T, np.eye(6), atol=1e-9)


@pytest.mark.parametrize(("made", "limit", "times"), [
    (lambda: problem(8, (40, 30)), 1 << 20, 1), (lambda: problem(8, (40, 30)), 0, 8),
    (lambda: table(9), 1 << 20, 1), (lambda: table(9), 0, 8),
])  # fmt: skip
def test_what_is_kept_for_several_sizes_changes_no_byte(made, limit, times, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Where there is no room, each size is foreseen and rounded with factors of its own, and comes out the same."""
    w, by = made()
    sizes = (4.0, 2.5, 0.9, 2.0)  # one quantizer below, a trellis above
    alone = [RateDistortion(bits=bits, by=by)(w)["w"].read().parts for bits in sizes]
    taken, apart = [], Kronecker.apart
    monkeypatch.setattr(Kronecker, "apart", lambda *given, **told: taken.append(0) or apart(*given, **told))
    kept = Kept(limit)
    together = [RateDistortion(bits=bits, by=by).rounded(w, kept)["w"].read().parts for bits in sizes]
    for a, b in zip(alone, together, strict=True):
        assert {name: part.tobytes() for name, part in a.items()} == {name: part.tobytes() for name, part in b.items()}
    assert len(taken) == times

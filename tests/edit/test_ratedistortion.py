"""RateDistortion: the bits that were asked for, the slope that all tensors share, importances, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.errors import CodecError, RecipeError, WeightsError


def weights() -> Weights:
    rng = np.random.default_rng(5)
    sizes = {"wide": (300, 200), "narrow": (40, 60), "bias": (50,)}
    return Weights.of({n: (rng.normal(size=s) * (i + 1)).astype(np.float32) for i, (n, s) in enumerate(sizes.items())})


def cost(step: RateDistortion, before: Weights) -> tuple[float, dict[str, float]]:
    """Bits for each weight, and the relative squared error of each tensor."""
    after = step(before)
    bits = 8 * sum(item.read().nbytes for item in after.values()) / before.size
    pairs = {name: (before[name].array(), after[name].array()) for name in before}
    return bits, {n: float(np.square(a - b).sum() / np.square(a).sum()) for n, (a, b) in pairs.items()}


@pytest.mark.parametrize("bits", [1.5, 3, 5])
@pytest.mark.parametrize("states", [1, 8])
def test_the_bits_are_those_that_were_asked_for(bits: float, states: int) -> None:
    assert cost(RateDistortion(bits=bits, states=states), weights())[0] == pytest.approx(bits, rel=0.06)


@pytest.mark.parametrize("states", [1, 4, 8, 16, 32, 64])
def test_the_error_is_the_one_that_was_asked_for(states: int) -> None:
    _, errors = cost(RateDistortion(error=0.02, states=states), weights())
    sizes = {item.name: item.spec.size for item in weights().values()}
    mean = sum(errors[n] * sizes[n] for n in errors) / sum(sizes.values())
    assert mean**0.5 == pytest.approx(0.02, rel=0.05)


def test_large_tensors_are_coarser_in_proportion() -> None:
    _, errors = cost(RateDistortion(error=0.03), weights())
    assert errors["wide"] / errors["narrow"] == pytest.approx(25, rel=0.2)


def test_importances_decide_the_steps() -> None:
    before = weights()
    by = Weights.of({n: np.full(i.spec.shape, 100.0 if n == "wide" else 1.0) for n, i in before.items()})
    after = RateDistortion(bits=4, by=by)(before)
    wide, narrow = (np.square(before[n].array() - after[n].array()).mean() for n in ("wide", "narrow"))
    assert narrow / wide == pytest.approx(100, rel=0.2)


def test_an_importance_by_glob_multiplies() -> None:
    before = weights()
    _, plain = cost(RateDistortion(error=0.03), before)
    _, errors = cost(RateDistortion(error=0.03, importance={"narr*": 0.01, "*": 1.0}), before)
    assert errors["narrow"] / errors["wide"] == pytest.approx(100 * plain["narrow"] / plain["wide"], rel=0.1)
    with pytest.raises(WeightsError, match=r"'q\*'"):
        RateDistortion(bits=3, importance={"q*": 0.1})(before)


def test_of_no_importance_is_zero_and_zeros_stay() -> None:
    before = Weights.of({"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32), "c": np.zeros((3, 2))})
    by = Weights.of({"a": np.zeros((4, 4)), "b": np.ones((4, 4)), "c": np.ones((3, 2))})
    after = RateDistortion(bits=10, by=by)(before).arrays()
    assert not after["a"].any()
    assert not after["c"].any()
    assert after["b"] == pytest.approx(1, abs=0.3)
    assert not RateDistortion(error=0.1)(Weights.of({"c": np.zeros((3, 2))})).arrays()["c"].any()


def test_bad_input_is_named() -> None:
    for settings in (
        {},
        {"bits": 3, "error": 0.1},
        {"bits": 0},
        {"bits": 25},
        {"error": 1.0},
        {"bits": 3, "states": 5},
    ):
        with pytest.raises(RecipeError):
            RateDistortion(**settings)
    bad = Weights.of({"a": np.array([[1, np.nan]])})
    with pytest.raises(CodecError, match=r"'a' has NaN or infinite values, the first at \[0, 1\]"):
        RateDistortion(bits=3)(bad).arrays()
    with pytest.raises(WeightsError, match="no tensor 'narrow'"):
        RateDistortion(bits=3, by=Weights.of({"wide": np.ones((300, 200))}))(weights())
    negative = Weights.of({n: -np.ones(i.spec.shape) for n, i in weights().items()})
    with pytest.raises(WeightsError, match="finite and >= 0"):
        RateDistortion(bits=3, by=negative)(weights()).arrays()


@pytest.mark.parametrize("error", [1e-12, 1e-9])
def test_an_error_finer_than_levels_is_told_with_the_least_that_works(error: float) -> None:
    with pytest.raises(RecipeError, match=rf"error={error:g} would need more than 2\^28 levels .*: ask for ") as told:
        cost(RateDistortion(error=error), weights())
    least = float(str(told.value).partition("ask for ")[2].split()[0])
    assert 1e-9 < least < 1e-6
    cost(RateDistortion(error=least), weights())
    with pytest.raises(RecipeError, match="ask for"):
        cost(RateDistortion(error=least / 1.2), weights())


def test_bits_finer_than_levels_are_as_many_as_can_be_held() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 64)).astype(np.float32)
    x[0, 0] = 1e7
    before = Weights.of({"far": x, "near": rng.normal(size=(64, 64)).astype(np.float32), "two": np.float32([1, 2])})
    bits, _ = cost(RateDistortion(bits=24), before)
    assert 14 < bits < 24
    after = RateDistortion(bits=24)(before)
    assert np.abs(after["far"].array() - x).max() <= 1e7 / 2**27
    assert np.abs(after["two"].array() - before["two"].array()).max() <= 2.0**-22
    assert cost(RateDistortion(bits=5), Weights.of({"far": x}))[0] == pytest.approx(5, rel=0.06)


def test_tensors_that_nothing_minds_leave_their_bits_to_nobody() -> None:
    before = weights()
    by = Weights.of({n: np.full(i.spec.shape, 0.0 if n == "wide" else 1.0) for n, i in before.items()})
    after = RateDistortion(bits=4, by=by)(before)
    assert not after["wide"].array().any()
    others = [n for n in before if n != "wide"]
    bits = 8 * sum(after[n].read().nbytes for n in others) / sum(before[n].spec.size for n in others)
    assert bits == pytest.approx(4, rel=0.06)

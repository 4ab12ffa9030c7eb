"""Laws of every initialiser: the variance is the published one, and chance belongs to a name, not to an order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steelyard.core.recipe import Reader
from steelyard.core.spec import Spec
from steelyard.core.weights import Weights
from steelyard.init import INITS, Init, generator, start

# More settings of a row than its defaults; a row that is not here is tested with its defaults.
SETTINGS = {
    "constant": [{"value": 0.25}],
    "normal": [{}, {"std": 0.3, "mean": -1.0}],
    "uniform": [{}, {"low": -0.1, "high": 0.5}],
    "truncated_normal": [{}, {"std": 0.4}],
    "xavier": [{"gain": 5 / 3, "distribution": d} for d in ("normal", "uniform", "truncated_normal")],
    "he": [{"mode": m, "distribution": d, "slope": s}
           for m, d, s in (("fan_in", "normal", 0.0), ("fan_out", "uniform", 0.2), ("fan_avg", "truncated_normal", 0.0))],
    "lecun": [{"gain": g, "mode": m, "distribution": d}
              for g, m, d in ((1.0, "fan_in", "normal"), (1.5, "fan_out", "uniform"), (0.5, "fan_avg", "truncated_normal"))],
    "orthogonal": [{}, {"gain": math.sqrt(2)}],
    "delta_orthogonal": [{}, {"gain": 0.5}],
    "identity": [{}, {"gain": 2.0}],
    "sparse": [{}, {"connections": 4, "std": 0.5}],
}  # fmt: skip

FANS = {
    "fan_in": lambda out, into: into,
    "fan_out": lambda out, into: out,
    "fan_avg": lambda out, into: (into + out) / 2,
}

# The variances as published, written down apart from the code: functions of the settings and the shape (out, in, *kernel).
PUBLISHED = {
    "zeros": lambda s, shape: 0.0,
    "constant": lambda s, shape: 0.0,
    "normal": lambda s, shape: s.get("std", 0.02) ** 2,
    "uniform": lambda s, shape: (s.get("high", 0.05) - s.get("low", -0.05)) ** 2 / 12,
    "truncated_normal": lambda s, shape: s.get("std", 0.02) ** 2,  # the std is that after the cut
    # Glorot and Bengio 2010, equation 16
    "xavier": lambda s, shape: s.get("gain", 1) ** 2 * 2 / ((shape[0] + shape[1]) * math.prod(shape[2:])),
    # He et al. 2015, equations 10, 14 and 15
    "he": lambda s, shape: (
        2 / (1 + s.get("slope", 0) ** 2) / FANS[s.get("mode", "fan_in")](*shape[:2]) / math.prod(shape[2:])
    ),
    # LeCun et al. 1998, equation 16
    "lecun": lambda s, shape: s.get("gain", 1) ** 2 / FANS[s.get("mode", "fan_in")](*shape[:2]) / math.prod(shape[2:]),
    "orthogonal": lambda s, shape: s.get("gain", 1) ** 2 / max(shape[0], math.prod(shape[1:])),
    # Xiao et al. 2018: a matrix of min(shape) orthonormal rows or columns, in one place of the kernel
    "delta_orthogonal": lambda s, shape: s.get("gain", 1) ** 2 / max(shape[:2]) / math.prod(shape[2:]),
    "identity": lambda s, shape: 0.0,
    # Martens 2010: so many of a unit's inputs
    "sparse": lambda s, shape: s.get("std", 1) ** 2 * s.get("connections", 15) / math.prod(shape[1:]),
}
EVERY = [(name, settings) for name in INITS for settings in SETTINGS.get(name, [{}])]
SHAPES = [(120, 80), (24, 10, 5, 5)]
SEEDS = 32


def build(name, settings) -> Init:
    return Reader({}, {}).build(INITS[name], settings)


@pytest.mark.parametrize("name", INITS)
def test_it_is_in_its_row(name):
    assert INITS[name].name == name
    assert issubclass(INITS[name], Init)


def test_every_row_has_a_published_variance():
    assert set(PUBLISHED) == set(INITS)


CERTAIN = ("zeros", "constant", "identity")  # no chance, so that each element has the variance 0


@pytest.mark.parametrize("name", CERTAIN)
def test_what_is_certain_is_the_same_for_every_seed(name):
    init, spec = build(name, SETTINGS.get(name, [{}])[0]), Spec.of((6, 4, 3), "float64")
    assert init.variance(spec) == 0
    assert init(spec, generator(0, "w")).tobytes() == init(spec, generator(1, "v")).tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "settings"), [row for row in EVERY if row[0] not in CERTAIN])
def test_the_variance_is_the_published_and_the_stated_one(name, settings, shape):
    """Within six standard errors: a variance v of n draws with fourth moment m has one of sqrt((m - v^2) / n)."""
    init, spec = build(name, settings), Spec.of(shape, "float64")
    values = np.stack([init(spec, generator(seed, "w")) for seed in range(SEEDS)])
    stated = PUBLISHED[name](settings, shape)
    assert init.variance(spec) == pytest.approx(stated, rel=1e-12)
    n = values.size
    fourth = np.mean((values - values.mean()) ** 4)
    assert abs(values.var() - stated) <= 6 * math.sqrt(max(fourth - stated**2, 0) / n)
    middle = settings.get("mean", (settings.get("low", 0) + settings.get("high", 0)) / 2)
    assert abs(values.mean() - middle) <= 6 * math.sqrt(stated / n)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_shape_and_dtype_and_the_same_bytes_again(name, settings, dtype):
    init, spec = build(name, settings), Spec.of((7, 3, 2), dtype)
    first, again = init(spec, generator(3, "w")), init(spec, generator(3, "w"))
    assert Spec.like(first) == spec
    assert first.tobytes() == again.tobytes()
    exact = init(Spec.of((7, 3, 2), "float64"), generator(3, "w"))
    assert np.array_equal(first, exact.astype(first.dtype))  # narrower formats round the same numbers
    assert first.flags.c_contiguous


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_neither_order_nor_company_matters(name, settings):
    arrays = {n: np.zeros((6, 4), np.float32) for n in ("a", "b", "c")}
    init = build(name, settings)
    whole = start(Weights.of(arrays), init, seed=5)
    backwards = {n: whole[n].array().tobytes() for n in reversed(arrays)}
    alone = {n: start(Weights.of({n: arrays[n]}), init, seed=5)[n].array().tobytes() for n in arrays}
    assert backwards == alone
    if init.variance(Spec.of((6, 4), "float32")):
        assert len(set(alone.values())) == 3
        assert start(Weights.of(arrays), init, seed=6)["a"].array().tobytes() != alone["a"]


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_nothing_is_nothing(name, settings):
    for shape in ((0, 3), (3, 0), (0, 0, 3)):
        spec = Spec.of(shape, "float32")
        assert build(name, settings)(spec, generator(0, "w")).shape == shape
        assert math.isfinite(build(name, settings).variance(spec))

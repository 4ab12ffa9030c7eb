from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from steelyard.core.spec import Spec
from steelyard.core.transform import on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import where
from steelyard.errors import RecipeError, UnknownNameError, WeightsError
from steelyard.init import INITS, generator, scheme_of, start
from steelyard.init.base import TRUNCATED_STD, fans
from steelyard.init.he import He
from steelyard.init.orthogonal import Orthogonal
from steelyard.init.truncated_normal import TruncatedNormal
from steelyard.init.xavier import Xavier


def model():
    arrays = {
        "embed.weight": np.ones((10, 8), np.float32),
        "conv.weight": np.ones((6, 4, 3, 3), np.float16),
        "conv.bias": np.ones(6, np.float16),
        "norm.weight": np.ones(6, np.float32),
        "norm.running_mean": np.ones(6, np.float32),
        "rnn.bias_ih_l0": np.ones(6, np.float32),
        "attn.in_proj_bias": np.ones(6, np.float32),
        "unbiased": np.ones(6, np.float32),
        "temperature": np.float32(3).reshape(()),
        "steps": np.arange(6).reshape(2, 3),
    }
    return Weights.of(arrays, ties={"head.weight": "embed.weight"}, meta={"k": "v"})


def test_what_a_scheme_speaks_of():
    started = start(model(), "he", seed=1)
    before, after = model().arrays(), started.arrays()
    same = {n for n in before if np.array_equal(before[n], after[n])}
    zero = {n for n in after if not after[n].any()}
    assert same == {"norm.weight", "norm.running_mean", "unbiased", "temperature", "steps"}
    assert zero == {"conv.bias", "rnn.bias_ih_l0", "attn.in_proj_bias"}
    assert (list(started), dict(started.ties), dict(started.meta)) == (list(model()), dict(model().ties), {"k": "v"})


def test_nothing_is_read_and_draws_are_the_same_at_every_read():
    def fail():
        raise AssertionError("read")

    w = start(Weights([Weight("w", Spec.of((4, 4), "float32"), fail, stored=64, origin="f")]), "lecun")["w"]
    assert np.array_equal(w.array(), w.array())
    assert (w.stored, w.origin) == (None, "start(seed=0)")


def test_other_schemes_elsewhere():
    w = on(where("embed.*"), lambda w: start(w, "normal(std=7.0)"))(start(model(), "zeros"))
    assert w["embed.weight"].array().std() > 4
    assert not w["conv.weight"].array().any()


def test_the_stream_of_a_name_is_fixed_for_good():
    digest = hashlib.sha256(b"7\0fc.weight").digest()
    expected = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(4)
    assert generator(7, "fc.weight").bit_generator.random_raw(4).tolist() == expected.tolist()
    assert expected.tolist() == [1077286391899732603, 12176418811774780309, 18037166864328087591, 15457397196978268574]
    assert generator(-7, "\udcff é").bit_generator.random_raw(1).size == 1
    assert generator(1, "1").bit_generator.random_raw(1) != generator(11, "").bit_generator.random_raw(1)


def test_fans():
    assert fans(Spec.of((3, 5), "float32")) == (5, 3)
    assert fans(Spec.of((8, 2, 3, 3), "float32")) == (18, 72)
    assert fans(Spec.of((8, 2, 7), "float32")) == (14, 56)
    with pytest.raises(WeightsError, match="fan in and fan out need"):
        fans(Spec.of((3,), "float32"))


@pytest.mark.parametrize("name", ["xavier", "he", "lecun", "orthogonal"])
def test_a_vector_has_no_fans(name):
    with pytest.raises(WeightsError, match="not float32"):
        INITS[name]()(Spec.of((3,), "float32"), generator(0, "w"))


def test_textbook_variances():
    spec = Spec.of((64, 32, 3, 3), "float32")
    assert He().variance(spec) == pytest.approx(2 / 288)
    assert He(mode="fan_out").variance(spec) == pytest.approx(2 / 576)
    assert He(slope=math.sqrt(5)).variance(spec) == pytest.approx(1 / (3 * 288))
    assert Xavier().variance(spec) == pytest.approx(2 / (288 + 576))
    assert scheme_of("lecun").variance(spec) == pytest.approx(1 / 288)


def test_bounded_distributions_keep_their_bounds():
    spec, g = Spec.of((100, 100), "float64"), generator(0, "w")
    assert np.abs(TruncatedNormal(0.5)(spec, g)).max() <= 2 * 0.5 / TRUNCATED_STD
    assert np.abs(Xavier()(spec, g)).max() <= math.sqrt(6 / 200)
    assert pytest.approx(0.8796256610342398, rel=1e-12) == TRUNCATED_STD


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 2, 3, 3), (6, 6)])
def test_orthogonal_rows_or_columns(shape):
    spec = Spec.of(shape, "float64")
    m = Orthogonal(1.5)(spec, generator(2, "w")).reshape(shape[0], -1)
    small = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    assert np.allclose(small, 1.5**2 * np.eye(min(m.shape)))
    assert np.mean(m**2) == pytest.approx(Orthogonal(1.5).variance(spec))


def test_orthogonal_has_no_favourite_sign():
    first = [Orthogonal()(Spec.of((3, 3), "float64"), generator(seed, "w"))[0, 0] for seed in range(60)]
    assert 15 < sum(v > 0 for v in first) < 45


@pytest.mark.parametrize(("text", "error", "message"), [
    ("hee", UnknownNameError, "did you mean 'he'"),
    ("he(slop=1)", RecipeError, "did you mean 'slope'"),
    ("he(mode='fan')", RecipeError, "not a choice"),
    ("he(distribution=cauchy)", RecipeError, "not a choice"),
    ("constant", RecipeError, "'value' is missing"),
    ("normal(std=-1.0)", RecipeError, "not negative"),
    ("truncated_normal(std=-1)", RecipeError, "not negative"),
    ("uniform(low=1.0, high=0.0)", RecipeError, "above"),
    ("sparse(connections=0)", RecipeError, "at least 1 connection"),
    ("sparse(std=-1)", RecipeError, "not negative"),
    ("lecun(gain=automatic)", RecipeError, "did you mean 'auto'"),
    ("he(", RecipeError, "cannot read"),
    ("3", UnknownNameError, "no initialiser"),
])  # fmt: skip
def test_a_scheme_that_does_not_exist(text, error, message):
    with pytest.raises(error, match=message):
        start(model(), text)


@pytest.mark.parametrize("name", ["lecun", "xavier", "orthogonal", "delta_orthogonal", "identity"])
def test_a_gain_that_only_a_model_can_tell(name):
    with pytest.raises(RecipeError, match="needs a model: use init_"):
        start(model(), f"{name}(gain=auto)")["conv.weight"].array()


def test_settings_are_checked_where_they_are_used():
    with pytest.raises(RecipeError, match="fan_in, fan_out or fan_avg"):
        He(mode="fan_sum").variance(Spec.of((2, 2), "float32"))
    with pytest.raises(RecipeError, match="normal, uniform or truncated_normal"):
        He(distribution="cauchy")(Spec.of((2, 2), "float32"), generator(0, "w"))

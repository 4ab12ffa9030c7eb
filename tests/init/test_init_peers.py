"""What other libraries draw: torch.nn.init by its own numbers, Keras by the formulas of its documentation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.core.spec import Spec
from steelyard.init import generator, scheme_of
from steelyard.init.base import fans

SHAPES = [(200, 300), (300, 200), (40, 30, 5, 5)]
UNIFORM, NORMAL = "distribution=uniform", "distribution=normal"

# ours, and a function of torch with its arguments
TORCH = [
    (f"xavier(gain=1.5, {UNIFORM})", lambda t: nn.init.xavier_uniform_(t, gain=1.5)),
    (f"xavier({NORMAL})", nn.init.xavier_normal_),
    (f"he({NORMAL})", lambda t: nn.init.kaiming_normal_(t, nonlinearity="relu")),
    (f"he(slope=0.3, mode=fan_out, {UNIFORM})", lambda t: nn.init.kaiming_uniform_(t, a=0.3, mode="fan_out")),
    (f"he(slope={math.sqrt(5)}, {UNIFORM})", lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5))),
    (f"lecun({NORMAL})", lambda t: nn.init.kaiming_normal_(t, nonlinearity="linear")),
    ("orthogonal(gain=2)", lambda t: nn.init.orthogonal_(t, gain=2)),
    ("normal(std=0.3)", lambda t: nn.init.normal_(t, std=0.3)),
    ("uniform(low=-0.2, high=0.2)", lambda t: nn.init.uniform_(t, -0.2, 0.2)),
    # torch's std is that of the normal distribution before it is cut
    ("truncated_normal(std=0.3)", lambda t: nn.init.trunc_normal_(t, std=(s := 0.3 / 0.8796256610), a=-2 * s, b=2 * s)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scheme", "theirs"), TORCH, ids=[scheme for scheme, _ in TORCH])
def test_torch_draws_the_same_distribution(scheme, theirs, shape):
    init, spec = scheme_of(scheme), Spec.of(shape, "float64")
    tensor = torch.empty(shape, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs(tensor)
    other, ours = tensor.numpy().ravel(), init(spec, generator(0, "w")).ravel()
    assert other.var() == pytest.approx(init.variance(spec), rel=0.03)
    shares = np.linspace(0.02, 0.98, 25)  # the whole distribution, not its variance alone
    spread = math.sqrt(init.variance(spec))
    assert np.abs(np.quantile(other, shares) - np.quantile(ours, shares)).max() < 0.06 * spread
    assert np.abs(other).max() == pytest.approx(np.abs(ours).max(), rel=0.25)


def test_torch_has_the_same_fans():
    for shape in SHAPES:
        assert fans(Spec.of(shape, "float32")) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 6, 3), (6, 4, 3, 3), (5, 5, 4), (3, 3, 1, 3, 5)])
def test_the_identity_is_that_of_torch(shape):
    ours = scheme_of("identity")(Spec.of(shape, "float32"), generator(0, "w"))
    theirs = torch.empty(shape)
    nn.init.eye_(theirs) if len(shape) == 2 else nn.init.dirac_(theirs)
    assert np.array_equal(ours, theirs.numpy())


def keras(scale, mode, distribution, inputs, outputs):
    """Variance and largest value of VarianceScaling, from the documentation of keras.initializers."""
    n = {"fan_in": inputs, "fan_out": outputs, "fan_avg": (inputs + outputs) / 2}[mode]
    variance = scale / max(1.0, n)
    largest = {
        "untruncated_normal": math.inf,
        "uniform": math.sqrt(3 * scale / n),
        "truncated_normal": 2 * math.sqrt(variance) / 0.87962566103423978,
    }[distribution]
    return variance, largest


KERAS = {  # ours -> scale, mode and distribution of Keras' initialiser of that name
    "xavier": ("GlorotUniform", 1.0, "fan_avg", "uniform"),
    "xavier(distribution=truncated_normal)": ("GlorotNormal", 1.0, "fan_avg", "truncated_normal"),
    "he(distribution=truncated_normal)": ("HeNormal", 2.0, "fan_in", "truncated_normal"),
    "he(distribution=uniform)": ("HeUniform", 2.0, "fan_in", "uniform"),
    "lecun(distribution=truncated_normal)": ("LecunNormal", 1.0, "fan_in", "truncated_normal"),
    "lecun(distribution=uniform)": ("LecunUniform", 1.0, "fan_in", "uniform"),
    "lecun(gain=3, mode=fan_out)": ("VarianceScaling", 9.0, "fan_out", "untruncated_normal"),
    "lecun(gain=0.5, mode=fan_avg, distribution=uniform)": ("VarianceScaling", 0.25, "fan_avg", "uniform"),
    "he(mode=fan_avg)": ("VarianceScaling", 2.0, "fan_avg", "untruncated_normal"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", KERAS)
def test_keras_has_the_same_formula(scheme, shape):
    _, scale, mode, distribution = KERAS[scheme]
    field = math.prod(shape[2:])
    variance, largest = keras(scale, mode, distribution, shape[1] * field, shape[0] * field)
    init, spec = scheme_of(scheme), Spec.of(shape, "float64")
    assert init.variance(spec) == pytest.approx(variance, rel=1e-12)
    found = np.abs(init(spec, generator(0, "w"))).max()
    assert found <= largest
    assert largest == math.inf or found > 0.98 * largest


@pytest.mark.parametrize("shape", [(8, 8, 3, 3), (8, 4, 3), (6, 6)])
def test_a_delta_orthogonal_convolution_keeps_the_norm(shape):
    w = torch.from_numpy(scheme_of("delta_orthogonal(gain=3)")(Spec.of(shape, "float64"), generator(0, "w")))
    x = torch.randn(2, shape[1], *[9] * (len(shape) - 2), dtype=torch.float64)
    convolve = {2: nn.functional.linear, 3: nn.functional.conv1d, 4: nn.functional.conv2d}[len(shape)]
    y = convolve(x, w) if len(shape) == 2 else convolve(x, w, padding=1)
    assert float(y.norm()) == pytest.approx(3 * float(x.norm()), rel=1e-12)


def test_a_sparse_unit_has_its_number_of_connections():
    w = scheme_of("sparse(connections=7, std=2)")(Spec.of((400, 10, 5), "float64"), generator(0, "w")).reshape(400, 50)
    assert ((w != 0).sum(1) == 7).all()
    assert (w != 0).sum(0).std() < 15  # spread over all inputs: 56 for each on average
    assert np.count_nonzero((w != 0).sum(0)) == 50
    assert w[w != 0].std() == pytest.approx(2, rel=0.05)
    few = scheme_of("sparse")(Spec.of((4, 3), "float64"), generator(0, "w"))
    assert (few != 0).all()

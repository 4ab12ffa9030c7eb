"""A bit buys as much everywhere: fewer bytes than other ways at the same loss, and steps where evidence says."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.codecs.entropy import Entropy
from steelyard.core.packed import Packed
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.edit.gptq import Gptq
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.edit.watersic import WaterSic
from steelyard.errors import CodecError, RecipeError, WeightsError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.evidence import score


def layer(seed: int, outputs: int = 256, inputs: int = 256) -> tuple[Weights, Weights]:
    """A matrix, and the Hessian of inputs that are correlated, some of them much larger than others."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(inputs, inputs)) / inputs**0.5 + np.eye(inputs)
    x = random.normal(size=(4 * inputs, inputs)) @ mix * np.exp(random.normal(size=inputs))
    w = random.normal(size=(outputs, inputs)) / inputs**0.5
    return Weights.of({"w": w.astype(np.float32)}), Weights.of({"w": (x.T @ x / len(x)).astype(np.float32)})


def losses(step, weights: Weights, h: Weights, name: str = "w") -> tuple[int, np.ndarray]:  # type: ignore[no-untyped-def]
    """The bytes of a tensor, and d_i H d_iᵀ of each row."""
    held = step(weights)[name].read()
    d = held.array().astype(np.float64) - weights[name].array()
    return held.nbytes, np.einsum("oi,ij,oj->o", d, h[name].array().astype(np.float64), d)


def test_half_the_loss_of_coded_gptq_and_a_fifth_of_grids_without_data_at_no_more_bytes() -> None:
    for seed in range(2):
        w, h = layer(seed)
        size, lost = losses(WaterSic(2.5, by=h), w, h)
        coded = losses(Gptq(8, by=h, step=0.8, codes=Entropy(), scale=Entropy()), w, h)
        plain = losses(RateDistortion(bits=2.75), w, h)
        assert size <= coded[0]
        assert size <= plain[0]
        assert lost.sum() < 0.5 * coded[1].sum()
        assert lost.sum() < 0.2 * plain[1].sum()


@pytest.mark.parametrize("bits", [1.2, 2.5, 4])
@pytest.mark.parametrize("states", [1, 8])
def test_bits_are_about_what_was_asked_for(bits: float, states: int) -> None:
    w, h = layer(3, outputs=400)
    size, _ = losses(WaterSic(bits, by=h, states=states), w, h)
    factors = 2 * (400 + 256)
    assert 0.9 * bits < 8 * (size - factors) / w["w"].spec.size < 1.03 * bits


def test_a_weight_may_lose_as_much_in_one_tensor_as_in_another() -> None:
    parts = [layer(seed, outputs) for seed, outputs in enumerate((100, 400))]
    w = Weights.of({f"w{i}": own["w"].array() * 10.0**i for i, (own, _) in enumerate(parts)})
    h = Weights.of({f"w{i}": own["w"].array() * 3.0**i for i, (_, own) in enumerate(parts)})
    step = WaterSic(3, by=h)
    shares = []
    for name in w:
        x = w[name].array().astype(np.float64)
        whole = np.einsum("oi,ij,oj->", x, h[name].array().astype(np.float64), x)
        shares.append(losses(step, w, h, name)[1].sum() / whole / x.size)
    assert 0.85 < shares[0] / shares[1] < 1.18


def test_outputs_that_matter_more_lose_less() -> None:
    w, h = layer(4)
    gains = np.geomspace(0.01, 100, 256)[:, None]
    fisher = gains * np.diag(h["w"].array())
    (size, without), (other, lost) = (
        losses(WaterSic(2.5, by=h, fisher=f), w, h) for f in (None, Weights.of({"w": fisher.astype(np.float32)}))
    )
    assert other < 1.05 * size
    assert (lost * gains[:, 0]).sum() < 0.2 * (without * gains[:, 0]).sum()
    assert lost[-64:].mean() < 0.2 * without[-64:].mean()


def test_fisher_information_and_hessians_of_a_model_fit(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 24)
    batches = [x[i : i + 1] for i in range(64)]
    h, w = score(net, [x], "hessian"), from_module(net)
    fisher = score(net, batches, "fisher", loss=lambda m, b: m(b).square().sum())
    once = WaterSic(3, by=h, fisher=fisher)(w)
    formats.write(once, tmp_path / "a.safetensors")
    again = formats.open(tmp_path / "a.safetensors")
    assert all(again[n].array().tobytes() == once[n].array().tobytes() for n in w)
    assert again["0.bias"].array().tobytes() == w["0.bias"].array().tobytes()
    small = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    into_module(again, small)
    with torch.no_grad():
        assert (small(x) - net(x)).square().mean() < 0.05 * net(x).square().mean()


def test_columns_beyond_one_block_of_the_stream_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = layer(5, outputs=96, inputs=40)
    size, whole = losses(WaterSic(3, by=h), w, h)
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", 500)
    more, blocks = losses(WaterSic(3, by=h), w, h)
    assert more != size
    assert blocks.sum() < 2 * whole.sum()  # a path that is read otherwise than it was written is far off


def test_half_of_the_columns_are_dead() -> None:
    w, h = layer(6, outputs=64, inputs=32)
    dead = h["w"].array().copy()
    dead[::2] = dead[:, ::2] = 0
    size, lost = losses(WaterSic(2, by=Weights.of({"w": dead})), w, Weights.of({"w": dead}))
    full, _ = losses(WaterSic(2, by=h), w, h)
    x = w["w"].array().astype(np.float64)
    assert lost.sum() < 0.05 * np.einsum("oi,ij,oj->", x, dead, x)
    assert size < 1.1 * full


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WaterSic(0), "bits is 0, expected more than 0 and at most 16"),
        (lambda: WaterSic(17), "bits is 17"),
        (lambda: WaterSic(float("nan")), "bits is nan"),
        (lambda: WaterSic(2, damping=0), "damping"),
        (lambda: WaterSic(2, states=3), "states is 3"),
    ],
)
def test_settings_out_of_range_are_named(make, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make()


def test_what_cannot_be_rounded_and_evidence_that_does_not_fit_are_named() -> None:
    w, h = layer(0, outputs=6, inputs=5)
    bad = Weights([Weight("w", Spec.of((1, 2), "float32"), lambda: np.float32([[1, np.nan]]), origin="f.bin")])
    with pytest.raises(CodecError, match=re.escape("f.bin: 'w' has NaN or infinite values")):
        WaterSic(3)(bad)["w"].array()
    ones, moments = np.ones((6, 5), np.float32), h["w"].array()
    wrong = [
        ({"by": Weights([])}, "no tensor 'w'"),
        ({"by": Weights.of({"w": ones})}, "the Hessian of 'w' is"),
        ({"by": Weights.of({"w": -moments})}, "not positive definite"),
        ({"by": Weights.of({"w": moments * np.nan})}, "NaN or infinite"),
        ({"by": h, "fisher": Weights([])}, "no tensor 'w'"),
        ({"by": h, "fisher": Weights.of({"w": -ones})}, "must be finite and >= 0"),
        ({"by": h, "fisher": Weights.of({"w": ones[:1]})}, "the Fisher information of 'w' is"),
    ]
    for settings, says in wrong:
        with pytest.raises(WeightsError, match=says):
            WaterSic(3, **settings)(w)["w"].array()
    (net, x), other = (nn.Linear(20, 10), torch.randn(9, 20)), nn.Linear(20, 10)
    with pytest.raises(WeightsError, match="measured on other weights"):
        WaterSic(3, by=score(other, [x], "hessian"))(from_module(net))["weight"].array()
    with pytest.raises(WeightsError, match="expected evidence of the kind hessian"):
        WaterSic(3, by=score(net, [x], "norms"))(from_module(net))["weight"].array()
    with pytest.raises(WeightsError, match="expected evidence of the kind fisher"):
        WaterSic(3, fisher=score(net, [x], "hessian"))(from_module(net))["weight"].array()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 3, 4), (7,), (4, 200), (0, 3)])
def test_any_shape_zeros_and_constants_come_back(shape: tuple[int, ...]) -> None:
    for x in (np.zeros(shape, np.float32), np.full(shape, 3, np.float16), np.ones(shape) * np.arange(shape[-1])):
        held = WaterSic(8)(Weights.of({"a": x}))["a"]
        assert isinstance(held.read(), Packed) == (len(shape) == 2)
        y = held.array()
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert np.abs(y - x).max(initial=0) <= (0.02 if x.size > 100 else 1) * np.abs(x).max(initial=1)

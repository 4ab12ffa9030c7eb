"""RateDistortion by second moments of inputs: fewer bytes than other ways at the same loss, and steps where evidence says."""

from __future__ import annotations

import json
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
from steelyard.errors import CodecError, RecipeError, WeightsError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.evidence import score


def hessians(first: tuple[str, ...] = (), **named: np.ndarray) -> Weights:
    """Evidence of the kind hessian; first: names of weights whose first axis are the inputs."""
    about = {"kind": "hessian", "inputs first": list(first), "samples": {}}
    return Weights.of({n: h.astype(np.float32) for n, h in named.items()}, meta={"evidence": json.dumps(about)})


def layer(seed: int, outputs: int = 256, inputs: int = 256) -> tuple[Weights, Weights]:
    """A matrix, and the Hessian of inputs that are correlated, some of them much larger than others."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(inputs, inputs)) / inputs**0.5 + np.eye(inputs)
    x = random.normal(size=(4 * inputs, inputs)) @ mix * np.exp(random.normal(size=inputs))
    w = random.normal(size=(outputs, inputs)) / inputs**0.5
    return Weights.of({"w": w.astype(np.float32)}), hessians(w=x.T @ x / len(x))


def losses(step, weights: Weights, h: Weights, name: str = "w") -> tuple[int, np.ndarray]:  # type: ignore[no-untyped-def]
    """The bytes of a tensor, and d_i H d_iᵀ of each row."""
    held = step(weights)[name].read()
    d = held.array().astype(np.float64) - weights[name].array()
    return held.nbytes, np.einsum("oi,ij,oj->o", d, h[name].array().astype(np.float64), d)


def test_half_the_loss_of_coded_gptq_and_a_fifth_of_grids_without_data_at_no_more_bytes() -> None:
    for seed in range(2):
        w, h = layer(seed)
        size, lost = losses(RateDistortion(2.5, by=h), w, h)
        coded = losses(Gptq(8, by=h, step=0.8, codes=Entropy(), scale=Entropy()), w, h)
        plain = losses(RateDistortion(2.65), w, h)
        assert size <= coded[0]
        assert size <= plain[0]
        assert lost.sum() < 0.5 * coded[1].sum()
        assert lost.sum() < 0.2 * plain[1].sum()


@pytest.mark.parametrize("bits", [0.6, 1.2, 2.5, 4])
@pytest.mark.parametrize("states", [1, 8])
def test_bits_are_about_what_was_asked_for(bits: float, states: int) -> None:
    w, h = layer(3, outputs=400)
    size, _ = losses(RateDistortion(bits, by=h, states=states), w, h)
    assert 0.93 * bits < 8 * size / w["w"].spec.size < 1.05 * bits


def test_bits_of_a_matrix_are_foreseen_wherever_in_it_they_are_needed() -> None:
    random, (w, h) = np.random.default_rng(0), layer(7, outputs=1200, inputs=400)
    gains = np.exp(2 * random.normal(size=(1200, 1)))
    fisher = Weights.of({"w": (gains * np.diag(h["w"].array())).astype(np.float32)})
    size, _ = losses(RateDistortion(2.5, by=h, fisher=fisher), w, h)
    assert 2.35 < 8 * size / w["w"].spec.size < 2.55


def test_a_weight_may_lose_as_much_in_one_tensor_as_in_another() -> None:
    parts = [layer(seed, outputs) for seed, outputs in enumerate((100, 400))]
    w = Weights.of({f"w{i}": own["w"].array() * 10.0**i for i, (own, _) in enumerate(parts)})
    h = hessians(**{f"w{i}": own["w"].array() * 3.0**i for i, (_, own) in enumerate(parts)})
    step = RateDistortion(3, by=h)
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
        losses(RateDistortion(2.5, by=h, fisher=f), w, h) for f in (None, Weights.of({"w": fisher.astype(np.float32)}))
    )
    assert other < 1.05 * size
    assert (lost * gains[:, 0]).sum() < 0.22 * (without * gains[:, 0]).sum()
    assert lost[-64:].mean() < 0.2 * without[-64:].mean()


def test_a_weight_whose_first_axis_are_the_inputs_is_rounded_as_its_transpose_is() -> None:
    w, h = layer(5, outputs=200, inputs=120)
    turned = Weights.of({"w": np.ascontiguousarray(w["w"].array().T)})
    gains = np.geomspace(0.01, 100, 200)[:, None] * np.diag(h["w"].array())
    for fisher in (None, gains.astype(np.float32)):
        both = [
            None if fisher is None else Weights.of({"w": f}) for f in (fisher, None if fisher is None else fisher.T)
        ]
        one = RateDistortion(2.5, by=h, fisher=both[0])(w)["w"].read()
        other = RateDistortion(2.5, by=hessians(("w",), w=h["w"].array()), fisher=both[1])(turned)["w"].read()
        loss, same = (np.vdot(d @ h["w"].array(), d) for d in (one.array() - w["w"].array(),
                                                               other.array().T - w["w"].array()))  # fmt: skip
        assert 0.97 < other.nbytes / one.nbytes < 1.03
        assert 0.9 < same / loss < 1.1


def test_fisher_information_and_hessians_of_a_model_fit(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 24)
    batches = [x[i : i + 1] for i in range(64)]
    h, w = score(net, [x], "hessian"), from_module(net)
    fisher = score(net, batches, "fisher", loss=lambda m, b: m(b).square().sum())
    once = RateDistortion(3.5, by=h, fisher=fisher)(w)
    formats.write(once, tmp_path / "a.safetensors")
    again = formats.open(tmp_path / "a.safetensors")
    assert all(again[n].array().tobytes() == once[n].array().tobytes() for n in w)
    assert again["0.bias"].array().tobytes() == w["0.bias"].array().tobytes()
    small = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    into_module(again, small)
    with torch.no_grad():
        assert (small(x) - net(x)).square().mean() < 0.05 * net(x).square().mean()


def test_filters_take_part_and_a_matrix_without_a_hessian_counts_by_fisher_or_relatively() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3), nn.Flatten(), nn.Linear(512, 4))
    w = from_module(net)
    x = torch.randn(16, 3, 8, 8)
    h = score(net, [x], "hessian", where="0.weight,4.weight")
    fisher = score(net, [x[i : i + 1] for i in range(16)], "fisher", loss=lambda m, b: m(b).square().sum())
    for given in (None, fisher):
        made = RateDistortion(3, by=h, fisher=given)(w)
        for weight in made.values():
            assert isinstance(weight.read(), Packed) == (len(weight.spec.shape) > 1)
        before = w["2.weight"].array()
        assert np.square(made["2.weight"].array() - before).sum() < 0.2 * np.square(before).sum()
    more = RateDistortion(3, by=h, fisher=fisher, importance={"2.*": 100.0})(w)["2.weight"].read()
    assert more.nbytes > made["2.weight"].read().nbytes


def test_columns_beyond_one_block_of_the_stream_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = layer(5, outputs=96, inputs=40)
    size, whole = losses(RateDistortion(3, by=h), w, h)
    monkeypatch.setattr("steelyard.codecs.trellis._BLOCK", 500)
    more, blocks = losses(RateDistortion(3, by=h), w, h)
    assert more != size
    assert blocks.sum() < 2 * whole.sum()  # a path that is read otherwise than it was written is far off


def test_half_of_the_columns_are_dead() -> None:
    w, h = layer(6, outputs=64, inputs=32)
    dead = h["w"].array().copy()
    dead[::2] = dead[:, ::2] = 0
    size, lost = losses(RateDistortion(2, by=hessians(w=dead)), w, hessians(w=dead))
    full, _ = losses(RateDistortion(2, by=h), w, h)
    x = w["w"].array().astype(np.float64)
    assert lost.sum() < 0.05 * np.einsum("oi,ij,oj->", x, dead, x)
    assert size < 1.1 * full


def test_settings_that_contradict_each_other_are_named() -> None:
    h = hessians(w=np.eye(3))
    with pytest.raises(RecipeError, match="give bits"):
        RateDistortion(error=0.1, by=h)
    for by in (None, Weights.of({"w": np.ones((2, 3))})):
        with pytest.raises(RecipeError, match="beside evidence of the kind hessian"):
            RateDistortion(2, by=by, fisher=Weights.of({"w": np.ones((2, 3))}))


def test_what_cannot_be_rounded_and_evidence_that_does_not_fit_are_named() -> None:
    w, h = layer(0, outputs=6, inputs=5)
    bad = Weights([Weight("w", Spec.of((1, 2), "float32"), lambda: np.float32([[1, np.nan]]), origin="f.bin")])
    with pytest.raises(CodecError, match=re.escape("f.bin: 'w' has NaN or infinite values")):
        RateDistortion(3, by=hessians(w=np.eye(2)))(bad)["w"].array()
    ones, moments = np.ones((6, 5), np.float32), h["w"].array()
    wrong = [
        ({"by": hessians(other=moments)}, "no tensor 'w', nor any other"),
        ({"by": hessians(w=ones)}, "the Hessian of 'w' is"),
        ({"by": hessians(w=-moments)}, "not positive definite"),
        ({"by": hessians(w=moments * np.nan)}, "NaN or infinite"),
        ({"by": h, "fisher": Weights([])}, "no tensor 'w'"),
        ({"by": h, "fisher": Weights.of({"w": -ones})}, "must be finite and >= 0"),
        ({"by": h, "fisher": Weights.of({"w": ones[:1]})}, "the importances of 'w' are"),
    ]
    for settings, says in wrong:
        with pytest.raises(WeightsError, match=says):
            RateDistortion(3, **settings)(w)["w"].array()
    (net, x), other = (nn.Linear(20, 10), torch.randn(9, 20)), nn.Linear(20, 10)
    batches, square = [x[:1], x[1:2]], (lambda m, b: m(b).square().sum())
    for kind in ("hessian", "fisher"):
        by = score(other, batches, kind, loss=square if kind == "fisher" else None)
        with pytest.raises(WeightsError, match="measured on other weights"):
            RateDistortion(3, by=by)(from_module(net))["weight"].array()
    with pytest.raises(WeightsError, match="expected evidence of the kind kronecker, hessian or fisher, got 'norms'"):
        RateDistortion(3, by=score(net, [x], "norms"))(from_module(net))["weight"].array()
    with pytest.raises(WeightsError, match="expected evidence of the kind fisher, got 'norms'"):
        RateDistortion(3, by=score(net, [x], "hessian"), fisher=score(net, [x], "norms"))(from_module(net)).arrays()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 3, 4), (4, 200), (0, 3), (3, 0)])
def test_any_shape_zeros_and_constants_come_back(shape: tuple[int, ...]) -> None:
    inputs = int(np.prod(shape[1:]))
    for x in (np.zeros(shape, np.float32), np.full(shape, 3, np.float16), np.ones(shape) * np.arange(shape[-1])):
        held = RateDistortion(8, by=hessians(a=np.eye(inputs)))(Weights.of({"a": x}))["a"]
        assert isinstance(held.read(), Packed)
        y = held.array()
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert np.abs(y - x).max(initial=0) <= (0.02 if x.size > 100 else 1) * np.abs(x).max(initial=1)

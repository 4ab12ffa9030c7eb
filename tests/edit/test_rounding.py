"""Rounding with and without data: each method loses less than the plainer one, and by hand where it can be told by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.codecs.affine import Affine
from steelyard.codecs.entropy import Entropy
from steelyard.core.packed import Packed
from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import Levels
from steelyard.edit.adaround import AdaRound
from steelyard.edit.awq import Awq
from steelyard.edit.gptq import Gptq
from steelyard.edit.hqq import Hqq
from steelyard.edit.prune import Prune
from steelyard.edit.quantize import Quantize
from steelyard.errors import CodecError, RecipeError, SteelyardError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.evidence import score


def layer(seed: int = 0, inputs: int = 48, outputs: int = 40) -> tuple[nn.Linear, torch.Tensor]:
    """A linear layer and inputs that are correlated, some of them much larger than others."""
    random = torch.Generator().manual_seed(seed)
    net = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(outputs, inputs, generator=random))
    mix = torch.randn(inputs, inputs, generator=random) / inputs**0.5 + torch.eye(inputs)
    size = torch.exp(torch.randn(inputs, generator=random))
    return net, torch.randn(400, inputs, generator=random) @ mix * size


def moved(net: nn.Linear, x: torch.Tensor, weights: Weights) -> float:
    """The mean squared change of the outputs, as a share of their mean square."""
    w = torch.from_numpy(weights["weight"].array())
    with torch.no_grad():
        before, after = net(x).double(), (x @ w.t()).double()
    return float((after - before).square().mean() / before.square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_with_data_outputs_move_less_than_without(bits: int, group: int | None) -> None:
    losses: dict[str, list[float]] = {}
    for seed in range(3):
        net, x = layer(seed)
        w, h = from_module(net), score(net, [x], "hessian")
        plain = {"axis": 0} if group is None else {"group": group}
        ways = {
            "range": Quantize(bits, **plain),
            "error": Quantize(bits, error=2, **plain),
            "weighed": Quantize(bits, error=2, by=h, **plain),
            "gptq": Gptq(bits, group=group, by=h, sweeps=0),
            "swept": Gptq(bits, group=group, by=h),
            "awq": Awq(bits, symmetric=True, group=group, by=h),
        }
        for name, step in ways.items():
            losses.setdefault(name, []).append(moved(net, x, step(w)))
    mean = {name: float(np.mean(found)) for name, found in losses.items()}
    assert mean["weighed"] < mean["error"]
    assert mean["error"] < mean["range"] or bits == 4
    assert mean["awq"] < mean["error"]
    assert mean["gptq"] < 0.8 * mean["weighed"]
    assert mean["swept"] < mean["gptq"]


def test_after_the_sweeps_no_code_can_move_alone() -> None:
    net, x = layer(inputs=12)
    evidence = score(net, [x], "hessian")
    held = Gptq(bits=3, step=0.5, by=evidence, damping=1e-7, sweeps=60)(from_module(net))["weight"].read()
    assert isinstance(held, Packed)
    h, scale, q = evidence["weight"].array()[0].astype(np.float64), held.parts["scale"], held.array().astype(np.float64)
    d = net.weight.detach().numpy().astype(np.float64) - q

    def loss(d: np.ndarray) -> np.ndarray:
        return np.einsum("oi,ij,oj->o", d, h, d)

    for j, move in itertools.product(range(12), (-1, 1)):
        other = d.copy()
        other[:, j] -= move * scale
        within = np.abs(q[:, j] + move * scale) <= 3 * scale * 1.001
        assert (loss(other) >= loss(d) * (1 - 1e-4))[within].all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("symmetric", "group"), [(True, None), (False, 16)])
def test_learned_rounding_is_no_worse_than_nearest_in_any_row_and_far_better_in_all(bits, symmetric, group) -> None:
    for seed in range(3):
        net, x = layer(seed)
        evidence, w = score(net, [x], "hessian"), net.weight.detach().numpy().astype(np.float64)
        held = AdaRound(bits, symmetric, group, evidence, rounds=100)(from_module(net))["weight"].read()
        assert isinstance(held, Packed)
        scale, q = held.parts["scale"].astype(np.float64), held.array().astype(np.float64)
        wide = scale[:, None] if group is None else np.repeat(scale, group, axis=1)
        zero = 0 if symmetric else np.repeat(held.parts["zero"].astype(np.float64), group, axis=1)
        top = (1 << bits) - 1 - (2**bits // 2 if symmetric else 0)
        codes = np.clip(np.rint((w - zero) / wide), -top if symmetric else 0, top)
        h = evidence["weight"].array()[0].astype(np.float64)
        nearest, learned = (np.einsum("oi,ij,oj->o", d, h, d) for d in (w - zero - codes * wide, w - q))
        assert (learned <= nearest * (1 + 1e-4)).all()
        assert learned.sum() < 0.8 * nearest.sum()
        inside = np.abs(w - zero - codes * wide) <= wide / 2 * 1.001
        assert (np.abs(w - q) < wide * 1.001)[inside].all()  # up or down, no farther


def test_learned_rounding_is_close_to_the_best_of_all_ups_and_downs() -> None:
    lost = []
    for seed in range(5):
        net, x = layer(seed, inputs=10, outputs=8)
        evidence, w = score(net, [x], "hessian"), net.weight.detach().numpy().astype(np.float64)
        held = AdaRound(4, by=evidence)(from_module(net))["weight"].read()
        assert isinstance(held, Packed)
        scale, h = held.parts["scale"].astype(np.float64)[:, None], evidence["weight"].array()[0].astype(np.float64)
        ways = np.array(list(itertools.product((0, 1), repeat=10)))
        every = w[:, None] - np.clip(np.floor(w / scale)[:, None] + ways, -7, 7) * scale[:, None]
        best = np.einsum("osi,ij,osj->os", every, h, every).min(axis=1)
        d = w - held.array()
        lost.append(np.einsum("oi,ij,oj->o", d, h, d).sum() / best.sum())
    assert np.mean(lost) < 1.2


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_by_error_are_no_worse_than_any_of_a_fine_search(symmetric: bool) -> None:
    random = np.random.default_rng(1)
    x = random.standard_t(4, size=(6, 64))
    levels = Levels(3, symmetric)
    scale, zero = (v[:, None] for v in levels.search(x, None, 2))
    found = ((x - levels.values(levels.round(x, scale, zero), scale, zero)) ** 2).sum(axis=1)
    best = np.full(len(x), np.inf)
    for share in np.linspace(0.2, 1, 400):
        if symmetric:
            s, z = np.abs(x).max(axis=1, keepdims=True) * share / 3, np.zeros((6, 1))
        else:
            low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
            middle = (low + high) / 2
            s, z = (high - low) * share / 7, middle - (middle - low) * share
        best = np.minimum(best, ((x - levels.values(levels.round(x, s, z), s, z)) ** 2).sum(axis=1))
    assert (found <= best * 1.01).all()


def test_hqq_loses_less_of_the_bulk_than_levels_from_end_to_end() -> None:
    random = np.random.default_rng(2)
    w = Weights.of({"w": random.standard_t(3, size=(64, 256)).astype(np.float32)})
    x = w["w"].array()

    def loss(step: object) -> float:
        return float((np.abs(x - step(w)["w"].array()) ** 0.7).mean())  # type: ignore[operator]

    assert loss(Hqq(3)) < 0.99 * loss(Quantize(3, symmetric=False, group=64))


def test_awq_keeps_its_scales_in_the_file(tmp_path) -> None:
    net, x = layer()
    step = Awq(3, group=16, by=score(net, [x], "hessian"), codes=Entropy(), scale=Entropy())
    once = step(from_module(net))
    formats.write(once, tmp_path / "a.safetensors")
    again = formats.open(tmp_path / "a.safetensors")
    assert again["weight"].array().tobytes() == once["weight"].array().tobytes()
    assert np.ptp(once["weight"].read().parts["factor"]) > 0.1


def test_coarse_steps_on_a_wide_grid_take_fewer_bytes_for_the_same_loss() -> None:
    net, x = layer(inputs=256, outputs=256)
    w, h = from_module(net), score(net, [x], "hessian")
    narrow = Gptq(3, by=h, codes=Entropy())(w)
    wide = Gptq(6, by=h, step=0.75, codes=Entropy())(w)
    assert wide["weight"].read().nbytes <= narrow["weight"].read().nbytes
    assert moved(net, x, wide) < moved(net, x, narrow)


def test_convolutions_and_inputs_first_are_rounded_along_their_outputs() -> None:
    conv, x = nn.Conv2d(6, 8, 3, groups=2), torch.randn(8, 6, 9, 9)
    w = from_module(conv)
    held = Gptq(4, group=4, by=score(conv, [x], where="weight"))(w)["weight"].read()
    assert held.codec == Affine(4, axis=0)
    assert held.array().shape == (8, 3, 3, 3)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    net, x = First(), torch.randn(99, 12)
    held = Gptq(3, by=score(net, [x]))(from_module(net))["weight"].read()
    assert held.codec == Affine(3, axis=1)
    turned = nn.Linear(12, 7, bias=False)
    turned.weight.data = net.weight.data.t().contiguous()
    other = Gptq(3, by=score(turned, [x]))(from_module(turned))["weight"].array()
    assert held.array().T.tolist() == other.tolist()


def test_pruned_weights_are_rounded_by_the_evidence_of_the_dense_ones() -> None:
    net, x = layer()
    h = score(net, [x], "hessian")
    pruned = Prune(0.5)(from_module(net))
    assert Gptq(4, by=h)(pruned)["weight"].array().shape == (40, 48)


STEPS = [Gptq(4), Awq(4), AdaRound(4), Hqq(4), Quantize(4, error=2, group=64)]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
def test_nan_is_named(step) -> None:
    w = Weights([Weight("a", Spec.of((1, 2), "float32"), lambda: np.float32([[1, np.nan]]), origin="f.bin")])
    with pytest.raises(CodecError, match=r"f.bin: 'a' has NaN or infinite values"):
        step(w)["a"].array()


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 3, 4), (4, 200), (5, 64), (5, 65)])
def test_any_shape_zeros_and_constants_come_back(step, shape) -> None:
    for x in (
        np.zeros(shape, np.float32),
        np.full(shape, 3.0, np.float32),
        np.arange(np.prod(shape)).reshape(shape).astype(np.float16),
    ):
        if isinstance(step, Awq) and len(shape) > 2:
            with pytest.raises(
                WeightsError, match=r"rounded by awq: .*2 axes, the inputs last, found 'a' \w+\[2, 3, 4"
            ):
                step(Weights.of({"a": x}))
            continue
        y = step(Weights.of({"a": x}))["a"].array()
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert np.abs(y.astype(np.float64) - x).max() <= (x.max() - min(x.min(), 0)) * 0.11


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gptq(1), "bits of symmetric levels are 2 to 8, not 1"),
        (lambda: Gptq(9), "2 to 8, not 9"),
        (lambda: Gptq(4, group=0), "at least 1 element"),
        (lambda: Gptq(4, damping=0), "damping"),
        (lambda: Gptq(4, sweeps=-1), "sweeps"),
        (lambda: Gptq(4, step=0.5, group=8), "step is"),
        (lambda: AdaRound(1), "bits of symmetric levels are 2 to 8, not 1"),
        (lambda: AdaRound(rounds=0), "at least 1, not 0"),
        (lambda: AdaRound(rate=0), "the rate is above 0"),
        (lambda: AdaRound(rate=float("nan")), "the rate is above 0"),
        (lambda: AdaRound(push=-1), "the push"),
        (lambda: Hqq(0), "1 to 8, not 0"),
        (lambda: Hqq(4, power=2), "power"),
        (lambda: Awq(4, group=-1), "at least 1"),
        (lambda: Quantize(4, error=0), "exponent of the loss"),
        (lambda: Quantize(4, by=Weights([])), "give error=2"),
    ],
)
def test_settings_out_of_range_are_named(make, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make()


def test_evidence_that_is_missing_or_of_others_is_refused() -> None:
    (net, x), (other, _) = layer(0), layer(1)
    w, h = from_module(net), score(other, [x])
    for step in (Gptq(4, by=h), Awq(4, by=h), AdaRound(4, by=h), Quantize(4, error=2, by=h)):
        with pytest.raises(WeightsError, match="measured on other weights"):
            step(w)["weight"].array()
    for step in (Gptq(4, by=Weights([])), AdaRound(4, by=Weights([])), Quantize(4, error=2, by=Weights([]))):
        with pytest.raises(WeightsError, match="no tensor 'weight'"):
            step(w)["weight"].array()
    wrong: list[tuple[Weights, type[SteelyardError], str]] = [
        (score(net, [x], "norms"), WeightsError, "expected evidence of the kind hessian"),
        (Weights.of({"weight": np.full((48, 48), np.inf)}), WeightsError, "NaN or infinite"),
        (Weights.of({"weight": -np.eye(48)}), WeightsError, "not positive definite"),
    ]
    for by, error, says in wrong:
        with pytest.raises(error, match=says):
            Gptq(4, by=by)(w)["weight"].array()
        with pytest.raises(error, match=says):
            AdaRound(4, by=by)(w)["weight"].array()

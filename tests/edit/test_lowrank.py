"""Thin products: no rank does better, with and without data, and the rank is the one asked for by bytes or by error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.codecs.affine import Affine
from steelyard.codecs.lowrank import LowRank
from steelyard.core.packed import Packed
from steelyard.core.weights import Weights
from steelyard.edit.lowrank import Factorize
from steelyard.errors import CodecError, RecipeError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.evidence import score


def layer(seed: int = 0) -> tuple[nn.Linear, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    net = nn.Linear(40, 30, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(30, 40, generator=random))
    return net, torch.randn(300, 40, generator=random) * torch.exp(torch.randn(40, generator=random))


def test_without_data_nothing_of_that_rank_is_nearer() -> None:
    net, _ = layer()
    w = from_module(net)["weight"].array().astype(np.float64)
    held = Factorize(rank=5)(from_module(net))["weight"].array()
    s = np.linalg.svd(w, compute_uv=False)
    assert np.square(held - w).sum() == pytest.approx(np.square(s[5:]).sum(), rel=1e-5)
    assert np.linalg.matrix_rank(held, tol=1e-4) == 5


def test_with_data_the_outputs_move_as_little_as_any_of_that_rank_can() -> None:
    net, x = layer()
    w = from_module(net)["weight"].array().astype(np.float64)
    xs = x.double().numpy()
    by = score(net, [x], "hessian", precision="float64")
    best = np.square(np.linalg.svd(xs @ w.T, compute_uv=False)[5:]).sum()
    moved = {}
    for name, step in {"data": Factorize(rank=5, by=by, damping=1e-9), "plain": Factorize(rank=5)}.items():
        d = step(from_module(net))["weight"].array().astype(np.float64) - w
        moved[name] = np.square(xs @ d.T).sum()
    assert moved["data"] == pytest.approx(best, rel=1e-3)
    assert moved["plain"] > 1.5 * best


def test_inputs_first_are_factored_by_their_outputs_too() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(layer()[0].weight.detach().t().contiguous())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    net, x = layer()
    step = {"rank": 4, "left": Affine(8, axis=0)}
    one = Factorize(by=score(net, [x]), rank=4)(from_module(net))["weight"].array()
    other = Factorize(by=score(First(), [x]), rank=4)(from_module(First()))["weight"]
    assert pytest.approx(one, abs=1e-4) == other.array().T
    assert Factorize(by=score(First(), [x]), **step)(from_module(First()))["weight"].array().shape == (40, 30)


def test_the_rank_is_what_the_bytes_allow() -> None:
    w = from_module(layer()[0])
    for keep in (0.2, 0.5, 0.9):
        held = Factorize(keep=keep)(w)["weight"].read()
        assert isinstance(held, Packed)
        assert held.nbytes <= keep * w["weight"].spec.nbytes < held.nbytes + 4 * 70
    assert not isinstance(Factorize(keep=0.01)(w)["weight"].read(), Packed)  # not even rank 1 fits


def test_a_rank_that_no_matrix_has_is_refused() -> None:
    w = Weights.of({"a": np.ones((6, 4), np.float32), "b": np.ones((3, 9), np.float32), "c": np.ones(50, np.float32)})
    assert not isinstance(Factorize(rank=4)(w)["a"].read(), Packed)  # it takes no fewer elements
    with pytest.raises(WeightsError, match="rank 5 is more than any of the 2 matrices has: 4 at most"):
        Factorize(rank=5)(w)


def test_the_rank_is_the_least_that_loses_no_more_than_said() -> None:
    random = np.random.default_rng(0)
    x = (random.normal(size=(60, 8)) @ random.normal(size=(8, 50)) + 0.01 * random.normal(size=(60, 50))).astype(
        np.float32
    )
    w = Weights.of({"w": x})
    s = np.square(np.linalg.svd(x.astype(np.float64), compute_uv=False))
    for error in (0.5, 0.1, 0.01):
        held = Factorize(error=error)(w)["w"].read()
        rank = held.codec.rank
        assert s[rank:].sum() <= error * s.sum() < s[rank - 1 :].sum()
    assert Factorize(error=0)(w)["w"].read() is x  # nothing can be saved without a loss


def test_quantized_factors_nest_and_the_second_makes_up_for_the_first(tmp_path) -> None:
    net, x = layer()
    by = score(net, [x], "hessian")
    plans = {"left": Affine(3, axis=0), "right": Affine(8, axis=0)}
    held = Factorize(rank=12, by=by, **plans)(from_module(net))
    formats.write(held, tmp_path / "a.safetensors")
    again = formats.open(tmp_path / "a.safetensors")["weight"]
    assert again.array().tobytes() == held["weight"].array().tobytes()
    xs, w = x.double().numpy(), from_module(net)["weight"].array().astype(np.float64)
    plain = Factorize(rank=12, by=by)(from_module(net))["weight"].read()
    apart = Affine(3, axis=0)
    left = apart.decode(apart.encode(plain.parts["left"]), formats_spec(plain.parts["left"]))
    naive = np.square(xs @ (left.astype(np.float64) @ plain.parts["right"] - w).T).sum()
    assert np.square(xs @ (again.array() - w).T).sum() < 0.95 * naive


def formats_spec(x: np.ndarray):
    from steelyard.core.spec import Spec

    return Spec.like(x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Factorize, "say one of rank, keep and error, not none"),
        (lambda: Factorize(rank=2, keep=0.5), "not rank and keep"),
        (lambda: Factorize(rank=0), "at least 1, not 0"),
        (lambda: Factorize(keep=1.5), "above 0 and at most 1"),
        (lambda: Factorize(error=1), "below 1, not 1"),
        (lambda: Factorize(rank=2, damping=0), "damping"),
        (lambda: LowRank(0), "expected at least 1"),
    ],
)
def test_settings_out_of_range_are_named(make, says: str) -> None:
    with pytest.raises((RecipeError, CodecError), match=says):
        make()


def test_bad_values_and_evidence_are_named() -> None:
    net, x = layer()
    with pytest.raises(CodecError, match="'w' has NaN"):
        Factorize(rank=1)(Weights.of({"w": np.full((4, 4), np.nan, np.float32)}))["w"].array()
    with pytest.raises(WeightsError, match="measured on other weights"):
        Factorize(rank=1, by=score(layer(1)[0], [x]))(from_module(net))["weight"].array()
    with pytest.raises(WeightsError, match="not positive"):
        Factorize(rank=1, by=Weights.of({"weight": -np.eye(40)}))(from_module(net))["weight"].array()

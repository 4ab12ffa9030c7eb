"""Residual branches scaled by depth: the published factors, and what they do to the stream."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.claims.architectures import noise
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.residual import RULES
from steelyard.learn.task import Interface

WIDTH = 64


class Block(nn.Module):
    def __init__(self, layers: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = torch.relu(layer(y))
        y = self.layers[-1](y)
        return x + (y if self.norm is None else self.norm(y))


class Stream(nn.Module):
    """A layer, so many residual blocks, and a layer."""

    def __init__(self, depth: int, layers: int = 2, norm: bool = False) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(20, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(Block(layers, norm) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def growth(depth: int, residual: str | None, seed: int) -> float:
    """The mean square of the stream after all blocks over that before them."""
    model, x = Stream(depth), noise(64, 20)
    sy.init_(model, "lecun(gain=auto)", seed=seed, residual=residual)
    with torch.no_grad():
        stream = model.first(x)
        before = float(stream.square().mean())
        for block in model.blocks:
            stream = block(stream)
    return float(stream.square().mean()) / before


@pytest.mark.parametrize("depth", [4, 32])
def test_the_stream_over_depth(depth: int) -> None:
    """A branch that keeps the scale doubles it in every block; a factor of 1 / sqrt(L) for each of L blocks makes it (1 + 1 / L)^L < e."""
    plain = statistics.fmean(math.log2(growth(depth, None, seed)) for seed in range(4))
    assert plain == pytest.approx(depth, rel=0.25)
    scaled = statistics.fmean(growth(depth, "gpt2", seed) for seed in range(4))
    assert scaled == pytest.approx((1 + 1 / depth) ** depth, rel=0.15)
    for rule in ("rezero", "fixup"):
        assert growth(depth, rule, 0) == 1


def change_by_one_step(depth: int, rule: str) -> float:
    """How far the outputs move by the second step of gradient descent (the first one moves the zeros alone)."""
    model, x = Stream(depth, layers=3).double(), noise(64, 20).double()
    targets = torch.arange(64) % 5
    sy.init_(model, "he", seed=1, residual=rule)
    sy.init_(model.head, "lecun")
    optimizer = torch.optim.SGD([p for block in model.blocks for p in block.parameters()], lr=1e-3)
    outputs = []
    for _ in range(3):
        found = model(x)
        outputs.append(found.detach())
        optimizer.zero_grad()
        nn.functional.cross_entropy(found, targets).backward()
        optimizer.step()
    return float((outputs[1] - outputs[0]).square().mean().sqrt())


def test_one_step_of_fixup_moves_the_outputs_as_far_at_any_depth() -> None:
    """Each of L branches moves by L^(-1/(2m-2)) per layer, twice: forwards and in the gradient; all together by 1."""
    few, many = (change_by_one_step(depth, "fixup") for depth in (4, 64))
    assert 0.5 < many / few < 2
    few, many = (change_by_one_step(depth, "rezero") for depth in (4, 64))
    assert many / few > 8


def std(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_the_factors_of_fixup(layers: int) -> None:
    plain, scaled = Stream(8, layers), Stream(8, layers)
    sy.init_(plain, "he")
    table = sy.init_(scaled, "he", residual="fixup")
    factor = 8 ** (-1 / (2 * layers - 2))
    for one, other in zip(plain.blocks, scaled.blocks, strict=True):
        for a, b in zip(one.layers[:-1], other.layers[:-1], strict=True):
            assert torch.allclose(b.weight, a.weight * factor)
        assert not other.layers[-1].weight.any()
    assert torch.equal(scaled.first.weight, plain.first.weight)
    assert not scaled.head.weight.any()
    said = dict(zip(table.column("layer"), table.column("done"), strict=True))
    assert said["blocks.0.layers.0"] == f"weight he; times {factor:.4g} (fixup: 8 branches)"
    assert said[f"blocks.7.layers.{layers - 1}"] == "weight he; zero (ends a residual branch)"
    assert said["head"] == "weight he; zero (the last layer)"


def test_the_factors_of_gpt2_on_a_transformer() -> None:
    model = sy.model("transformer", Interface((12,), 40, 40), layers=3)
    table = sy.init_(model, "normal(std=0.02)", torch.zeros(2, 12, dtype=torch.long), residual="gpt2")
    ends = [n for n, d in zip(table.column("layer"), table.column("done"), strict=True) if "gpt2" in d]
    assert ends == [f"blocks.{i}.{n}" for i in range(3) for n in ("attention.out", "down")]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            factor = 1 / math.sqrt(6) if name in ends else 1
            assert std(layer.weight) == pytest.approx(0.02 * factor, rel=0.06), name


class Translator(nn.Module):
    def __init__(self, encoders: int, decoders: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, 32), nn.Embedding(50, 32)
        self.core = nn.Transformer(32, 4, encoders, decoders, 64, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.core(self.source(source), self.target(target)))


def test_the_factors_of_t_fixup() -> None:
    plain, scaled = Translator(2, 3), Translator(2, 3)
    tokens = torch.arange(10).reshape(2, 5)
    sy.init_(plain, "xavier")
    sy.init_(scaled, "xavier", (tokens, tokens), residual="t-fixup")
    encoder, decoder = 0.67 * 2**-0.25, 27**-0.25
    before = dict(plain.named_parameters())
    for name, p in scaled.named_parameters():
        if p.ndim < 2 or name == "head.weight":
            factors = [1.0]
        elif name.endswith("in_proj_weight"):
            factors = [1.0, 1.0, decoder if "decoder" in name else encoder]
        elif name in ("source.weight", "target.weight"):
            factors = [32**-0.5 * decoder]
        else:
            factors = [decoder if "decoder" in name else encoder]
        parts = zip(factors, before[name].detach().chunk(len(factors)), p.detach().chunk(len(factors)), strict=True)
        for factor, a, b in parts:
            assert torch.allclose(b, a * factor, rtol=1e-5), name


def test_an_encoder_alone() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    plain, scaled = (nn.TransformerEncoder(layer, 4, enable_nested_tensor=False) for _ in range(2))
    sy.init_(plain, "xavier")
    sy.init_(scaled, "xavier", noise(2, 5, 32), residual="t-fixup")
    factor = 0.67 * 4**-0.25
    assert torch.allclose(scaled.layers[3].linear1.weight, plain.layers[3].linear1.weight * factor)
    assert torch.allclose(scaled.layers[0].linear2.weight, plain.layers[0].linear2.weight * factor)


@pytest.mark.parametrize(("rule", "gain"), [("rezero", 0.0), ("gpt2", 0.5)])
def test_behind_a_norm_its_gain_is_scaled(rule: str, gain: float) -> None:
    model = Stream(4, norm=True)
    table = sy.init_(model, "he", residual=rule)
    for block in model.blocks:
        assert torch.equal(block.norm.weight.detach(), torch.full((WIDTH,), gain))
        assert std(block.layers[-1].weight) == pytest.approx(math.sqrt(2 / WIDTH), rel=0.1)
    assert any("; blocks.3.norm.weight" in done for done in table.column("done"))


def test_a_shared_block_is_scaled_once_by_all_its_sums() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(2, norm=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(9):
                x = self.block(x)
            return x

    model = Loop()
    sy.init_(model, "lecun", residual="gpt2")
    assert std(model.block.layers[1].weight) == pytest.approx(1 / 8 / 3, rel=0.1)


def test_streams_count_for_themselves() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(*(Block(2, norm=False) for _ in range(n))) for n in (4, 16))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) @ self.b(y).mT

    model, x = Two(), noise(4, WIDTH)
    sy.init_(model, "lecun", (x, x), residual="gpt2")
    assert std(model.a[0].layers[1].weight) == pytest.approx(1 / 8 / 2, rel=0.1)
    assert std(model.b[0].layers[1].weight) == pytest.approx(1 / 8 / 4, rel=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_frozen_weights_and_ties_are_kept(rule: str) -> None:
    model = Stream(2)
    model.blocks[0].layers[1].weight.requires_grad_(False)
    model.head = nn.Linear(WIDTH, WIDTH, bias=False)
    model.head.weight = model.blocks[1].layers[0].weight
    kept = model.blocks[0].layers[1].weight.clone()
    sy.init_(model, "he", residual=rule)
    assert torch.equal(model.blocks[0].layers[1].weight, kept)
    assert model.head.weight is model.blocks[1].layers[0].weight
    assert model.head.weight.any()


def test_wrong_use_leaves_the_model_as_it_was() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = [p.clone() for p in plain.parameters()]
    with pytest.raises(ModelError, match="residual='gpt2' scales residual branches, and Sequential has none"):
        sy.init_(plain, "he", residual="gpt2")
    with pytest.raises(UnknownNameError, match="did you mean 'fixup'"):
        sy.init_(plain, "he", residual="fixupp")
    with pytest.raises(RecipeError, match="goes with the other schemes"):
        sy.init_(plain, "data", noise(8, 4), residual="gpt2")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), before, strict=True))

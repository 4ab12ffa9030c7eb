"""The start that chooses: what many layers in series do, mirrored pairs, the choice for each layer, and the proof."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.claims.architectures import ZOO, noise
from steelyard.errors import ModelError, RecipeError
from steelyard.learn.auto import chosen
from steelyard.learn.depth import alike, calm, growth, is_deep, odd_part
from steelyard.learn.gain import activation
from steelyard.learn.matrices import layers
from steelyard.learn.pairs import Halves, pairs
from steelyard.learn.start import init_
from steelyard.learn.tracing import record

EXACTLY_LINEAR = ("relu", "leaky_relu", "gelu", "silu", "softplus")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
}


def deep(kind: type[nn.Module], depth: int, width: int = 32) -> nn.Sequential:
    sizes = pairwise([20] + [width] * depth)
    return nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), kind())), nn.Linear(width, 4))


def halves(model: nn.Module, *batch: Tensor, wanted: tuple[str, ...] | None = None) -> dict[str, Halves]:
    found = layers(model)
    return pairs(model, found, record(model, batch), batch, found if wanted is None else wanted)


# what many layers do


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "selu"])
def test_correlation_and_growth_are_those_of_a_wide_net(name: str) -> None:
    """Against 8 random layers of 2,000 units, of weights that keep the mean square."""
    f, width, depth = activation(name), 2000, 8
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, width, generator=random, dtype=torch.float64)
    x = torch.linalg.qr(x.T)[0].T * math.sqrt(width)  # two samples, uncorrelated
    for _ in range(depth):
        x = x / x.square().mean(1, keepdim=True).sqrt()
        x = f(x) @ torch.randn(width, width, generator=random, dtype=torch.float64)
    found = functional.cosine_similarity(x[0], x[1], 0).item()
    assert found == pytest.approx(alike(name, depth), abs=0.06)
    z = torch.randn(1_000_000, generator=random, dtype=torch.float64, requires_grad=True)
    values = f(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    assert growth(name) == pytest.approx(float(slopes.square().mean() / values.detach().square().mean()), rel=0.01)


@pytest.mark.parametrize("name", EXACTLY_LINEAR)
def test_the_odd_part_of_rectifiers_is_linear_so_that_any_depth_is_calm(name: str) -> None:
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    part = odd_part(activation(name))(z)
    assert torch.allclose(part / z[-1] * 2, part[-1] * z * 2 / z[-1] ** 2, atol=1e-12)
    assert calm(odd_part(activation(name)), 1000) == 1.0


def test_the_calm_scale_is_the_largest_one() -> None:
    for depth in (30, 100):
        std = calm("tanh", depth)
        assert growth("tanh", std) ** depth == pytest.approx(2, rel=1e-2)
    assert calm("tanh", 3) == 1.0


def test_few_layers_need_nothing() -> None:
    assert not is_deep("relu", 1)
    assert "alike" in is_deep("relu", 30)
    assert "enlarge" in is_deep("tanh", 30)
    assert "alike" in is_deep("sigmoid", 2)


# mirrored pairs


def test_a_chain_is_mirrored_from_the_first_to_the_last_layer() -> None:
    found = halves(deep(nn.ReLU, 3), noise(4, 20))
    assert found["0"] == Halves(outputs=True)
    assert found["2"] == found["4"] == Halves(outputs=True, inputs=True)
    assert found["6"] == Halves(inputs=True)


class Cases(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


CONV = (4, 1, 8, 8)
BETWEEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "flattened": (
        lambda: Cases(lambda h: torch.relu(h).flatten(1), nn.Conv2d(1, 4, 3), nn.Linear(144, 2)), CONV, True),
    "pooled and dropped": (
        lambda: Cases(lambda h: functional.dropout(functional.max_pool2d(torch.relu(h), 2), 0.5, False),
                      nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3)), CONV, True),
    "places first": (
        lambda: Cases(lambda h: torch.relu(h).permute(0, 2, 3, 1).flatten(1), nn.Conv2d(1, 4, 3), nn.Linear(144, 2)),
        CONV, False),
    "with others": (
        lambda: Cases(lambda h: torch.cat([torch.relu(h), h[:, :2]], 1), nn.Linear(6, 4), nn.Linear(6, 2)),
        (5, 6), False),
    "added to the input": (lambda: Cases(lambda h: torch.relu(h) + 1e-3 * h.roll(1, 1), nn.Linear(4, 4), nn.Linear(4, 2)),
                           (5, 4), False),
    "gated": (lambda: Cases(functional.glu, nn.Linear(4, 8), nn.Linear(4, 2)), (5, 4), False),
    "odd width": (lambda: Cases(torch.relu, nn.Linear(4, 5), nn.Linear(5, 2)), (5, 4), False),
    "groups": (lambda: Cases(torch.relu, nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2)), (5, 4, 6), False),
    "into a recurrent layer": (
        lambda: Cases(torch.relu, nn.Linear(4, 4), nn.RNN(4, 4, batch_first=True)), (5, 3, 4), False),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_pairs_only_where_the_next_layer_meets_the_halves(name: str) -> None:
    build, shape, can = BETWEEN[name]
    model = build()
    found = halves(model, noise(*shape), wanted=("first",))
    assert found == ({"first": Halves(outputs=True), "second": Halves(inputs=True)} if can else {})


def test_a_unit_that_is_also_used_elsewhere_has_no_twin() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return self.b(h), h

    assert halves(Two(), noise(3, 4)) == {}


def test_looking_for_pairs_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    halves(model, noise(8, 4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


# the choice and its proof


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_hundred_layers_keep_signal_samples_and_gradient(name: str) -> None:
    model = deep(ACTIVATIONS[name], 100)
    x = noise(64, 20)
    table = init_(model, "auto", x)
    assert table.meta["proved"], table.meta
    assert table.meta["activations in series"] == 100
    outputs: list[Tensor] = []
    for layer in model:
        x = layer(x).detach()
        if isinstance(layer, nn.Linear):
            outputs.append(x)
    stds = [float(h.std()) for h in outputs[:-1]]
    assert max(stds) / min(stds) < 1.01
    table = init_(model, "data", noise(64, 20))
    steep = table.meta["gradient norm, largest over smallest"]
    flat = table.meta["mean cosine of outputs"]
    assert steep is None or steep > 10 or flat > 0.9 or math.isnan(steep)  # what the plain start by data leaves


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_rectifiers_start_exactly_linear(name: str) -> None:
    model = deep(ACTIVATIONS[name], 40).double()
    x = noise(32, 20).double()
    init_(model, "auto", x)
    with torch.no_grad():
        assert torch.allclose(model(2 * x[:5] - 3 * x[5:10]), 2 * model(x[:5]) - 3 * model(x[5:10]), atol=1e-10)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_architecture_is_started_and_proved(name: str) -> None:
    torch.manual_seed(0)
    build, batch = ZOO[name]
    model = build()
    table = init_(model, "auto", batch)
    assert table.meta["proved"], table.meta
    assert all(row["why"] for row in table.rows)


def test_branches_are_scaled_by_their_number() -> None:
    build, batch = ZOO["residual"]
    model = build()
    table = {row["layer"]: row for row in init_(model, "auto", batch).rows}
    assert table["blocks.3.2"]["target"] == pytest.approx(8**-0.5)
    assert table["blocks.3.2"]["std"] == pytest.approx(8**-0.5, rel=1e-4)
    assert "8 branches" in table["blocks.3.2"]["why"]


def test_a_layer_before_a_norm_is_told_that_its_scale_is_the_same() -> None:
    model = nn.Sequential(
        *(layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())), nn.Linear(8, 2)
    )
    found = layers(model)
    choice = chosen(model, found, record(model, (noise(6, 8),)), (noise(6, 8),))
    assert choice.depth == 0
    assert not choice.halves
    assert "norm" in choice.why["0"]


def test_what_is_not_proved_is_said() -> None:
    """An activation that kills the signal: nothing that a start can mend."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 100 + torch.sin(x)

    model = nn.Sequential(nn.Linear(8, 7), Flat(), nn.Linear(7, 7), Flat(), nn.Linear(7, 3), Flat())
    table = init_(model, "auto", noise(32, 8))
    assert not table.meta["proved"]
    assert "cosine" in table.meta["not proved because"]


def test_errors_leave_the_model_as_it_was() -> None:
    model = deep(nn.ReLU, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RecipeError, match=r"needs a batch: init_\(model, 'auto', batch\)"):
        init_(model, "auto")
    with pytest.raises(ModelError, match="fails"):
        init_(model, "auto", noise(4, 19))
    with pytest.raises(ModelError, match="only equal values"):
        init_(model, "auto", torch.zeros(4, 20))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    one, two, other = deep(nn.ReLU, 8), deep(nn.ReLU, 8), deep(nn.ReLU, 8)
    for model, seed in ((one, 0), (two, 0), (other, 1)):
        init_(model, "auto", noise(16, 20), seed=seed)
    assert torch.equal(one[4].weight, two[4].weight)
    assert not torch.equal(one[4].weight, other[4].weight)


def test_the_mean_of_a_sigmoid_is_taken_away_by_the_biases_that_follow() -> None:
    model = deep(nn.Sigmoid, 10)
    x = noise(64, 20)
    rows = {row["layer"]: row for row in init_(model, "auto", x).rows}
    assert "take its mean away" in rows["2"]["why"]
    assert "mirrored" not in rows["2"]["done"]
    for i, layer in enumerate(model):
        x = layer(x).detach()
        if isinstance(layer, nn.Linear) and i:
            assert x.mean(0).abs().max() < 1e-5
    assert model[0].bias.abs().max() == 0


def test_without_biases_a_sigmoid_is_mirrored() -> None:
    layers = (layer for _ in range(10) for layer in (nn.Linear(20, 20, bias=False), nn.Sigmoid()))
    model = nn.Sequential(*layers, nn.Linear(20, 2, bias=False))
    rows = {row["layer"]: row for row in init_(model, "auto", noise(64, 20)).rows}
    assert "mirrored outputs" in rows["4"]["done"]
    assert float(model(noise(64, 20)).detach().std(unbiased=False)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("name", ["conv", "one column"])
def test_units_of_convolutions_are_centred_over_places(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Sigmoid(),
        nn.Conv2d(4, 6, 3),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(96, 1 + (name == "conv")),
    )
    x = noise(32, 1, 8, 8)
    init_(model, "auto", x)
    with torch.no_grad():
        assert model[:3](x).mean((0, 2, 3)).abs().max() < 1e-5
        assert model(x).mean(0).abs().max() < 1e-5


class TiedBranches(nn.Module):
    """Residual branches between an embedding and the head that shares its matrix: the start takes a second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.up = nn.ModuleList(nn.Linear(32, 64) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(4))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(functional.gelu(up(x)))
        return self.head(self.norm(x))


def test_targets_hold_in_the_second_pass() -> None:
    words = torch.randint(0, 50, (32, 12), generator=torch.Generator().manual_seed(0))
    table = init_(TiedBranches(), "auto", words)
    assert table.meta["passes"] == 2
    assert [row["std"] for row in table.rows if row["layer"].startswith("down")] == pytest.approx([0.5] * 4, rel=1e-3)
    assert table.meta["proved"], table.meta


@pytest.mark.parametrize("scheme", ["data", "auto"])
def test_autocast_and_inference_mode_change_nothing(scheme: str) -> None:
    plain, cast, inferred = deep(nn.ReLU, 4), deep(nn.ReLU, 4), deep(nn.ReLU, 4)
    x = noise(64, 20)
    init_(plain, scheme, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast(x)
        init_(cast, scheme, x)
    with torch.inference_mode():
        init_(inferred, scheme, x)
    for model in (cast, inferred):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_checkpointed_part_is_one_line() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = deep(nn.ReLU, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.part, x, use_reentrant=False))

    with pytest.raises(ModelError, match="turn activation checkpointing off") as told:
        init_(Checkpointed(), "data", noise(64, 20))
    assert "\n" not in str(told.value)


def test_layers_without_a_start_that_ruin_the_scale_are_no_proof() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.02 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.weight.T)

    table = init_(nn.Sequential(*(Own() for _ in range(8)), nn.Linear(20, 10)), "auto", noise(64, 20))
    assert not table.meta["proved"]
    assert "is not started" in table.meta["not proved because"]


def test_a_batch_of_one_sample_many_times_is_no_proof() -> None:
    table = init_(deep(nn.ReLU, 1), "auto", noise(1, 20).expand(32, 20))
    assert "all the same" in table.meta["not proved because"]

"""Starts of whole modules: right by execution for twelve architectures, matrix by matrix, and harmless when they fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from steelyard.claims.architectures import ZOO, noise, standard_deviations, words
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.gain import NAMED, OTHERS, activation, gain
from steelyard.learn.start import init_


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    build, batch = ZOO[name]
    return build(), batch


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_executed_layer_has_standard_deviation_1_after_two_passes_at_most(name: str) -> None:
    model, batch = built(name)
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    table = init_(model, "data", batch)
    handle.remove()
    assert len(forwards) == table.meta["passes"] <= 2
    assert table.meta["furthest from target"] <= 0.02
    found = standard_deviations(model, batch)
    assert found
    for layer, std in found.items():
        assert abs(std - 1) <= 0.02, layer
    assert table.meta["gradient scale, largest over smallest"] < 100


def test_without_the_second_pass_a_shared_layer_is_off() -> None:
    model, batch = built("weight-shared")
    assert init_(model, "data", batch, passes=1).meta["furthest from target"] > 0.02


def gate_sums(layer: nn.RNNBase, x: Tensor) -> Tensor:
    """The sums into the gates of the lowest forward layer, step by step."""
    w, u = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()
    alone = type(layer)(x.shape[-1], layer.hidden_size, batch_first=True)
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if k.endswith("_l0")})
    with torch.no_grad():
        states = alone(x)[0]
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    return x @ w.T + before @ u.T


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_the_sums_into_gates_have_standard_deviation_1(name: str) -> None:
    model, (x,) = built(name)
    init_(model, "data", (x,))
    assert float(gate_sums(model.rnn, x).std()) == pytest.approx(1, abs=0.02)
    for gate in model.rnn.weight_hh_l0.detach().chunk(4 if name == "LSTM" else 3):
        assert torch.allclose(gate @ gate.T, torch.eye(32), atol=1e-5)
    if name == "LSTM":
        assert model.rnn.bias_ih_l0.detach().chunk(4)[1].tolist() == [1.0] * 32
        assert float(model.rnn.bias_ih_l0.detach().sum()) == 32


def test_a_cell_that_is_called_at_every_step() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(12, 32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 32)
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return self.head(state)

    table = init_(Loop(), "data", (noise(64, 9, 12),))
    assert table.column("calls") == [9, 1]
    assert table.meta["furthest from target"] <= 0.02


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_fifty_layers_and_any_scale_of_the_input(factor: float) -> None:
    layers = [layer for _ in range(50) for layer in (nn.Linear(64, 64), nn.ReLU())]
    table = init_(nn.Sequential(*layers), "data", factor * noise(128, 64))
    assert table.meta["furthest from target"] < 1e-5
    assert table.meta["gradient scale, largest over smallest"] <= 10


def test_a_tie_stays_a_tie_and_says_so() -> None:
    model, batch = built("tied embedding")
    table = init_(model, "data", batch)
    assert model.head.weight is model.embed.weight
    rows = {row["layer"]: row for row in table.rows}
    assert rows["head"]["std"] == pytest.approx(1, abs=0.02)
    assert rows["embed"]["std"] == pytest.approx(1 / 8, abs=0.1)  # 64 units: sums of them are 8 times as large
    assert "one scale with embed" in rows["head"]["done"]


SCHEMES = ["he", "xavier", "lecun", "orthogonal", "normal(std=0.1)", "uniform(low=-1, high=1)", "truncated_normal"]
SCHEMES += ["delta_orthogonal", "sparse", "he(mode=fan_avg)"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_scheme_starts_every_architecture(name: str, scheme: str) -> None:
    model, batch = built(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    init_(model, scheme)
    for n, p in model.named_parameters():
        assert torch.isfinite(p).all()
        assert p.ndim < 2 or not torch.equal(p.detach(), before[n]), n
    model(*batch)


def std_of(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


def test_each_matrix_has_the_variance_of_its_own_fans() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(64, 64, 3, groups=4),
            "transposed": nn.ConvTranspose2d(32, 128, 4),
            "attention": nn.MultiheadAttention(128, 4),
            "lstm": nn.LSTM(64, 256),
            "embed": nn.Embedding(200, 32),
        }
    )
    init_(model, "he")
    assert std_of(model["grouped"].weight) == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.02)
    assert std_of(model["transposed"].weight) == pytest.approx(math.sqrt(2 / (32 * 16)), rel=0.02)
    init_(model, "xavier")
    assert std_of(model["attention"].in_proj_weight) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert std_of(model["lstm"].weight_ih_l0) == pytest.approx(math.sqrt(2 / (64 + 256)), rel=0.02)
    assert std_of(model["embed"].weight) == pytest.approx(1, rel=0.05)
    init_(model, "orthogonal")
    for part in model["attention"].in_proj_weight.detach().chunk(3):
        assert torch.allclose(part @ part.T, torch.eye(128), atol=1e-5)


def test_the_result_depends_on_names_and_the_seed_alone() -> None:
    class Two(nn.Module):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            for name in ("b", "a") if swapped else ("a", "b"):
                setattr(self, name, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = []
    for swapped, seed in ((False, 0), (True, 0), (False, 1)):
        torch.manual_seed(swapped)
        model = Two(swapped)
        init_(model, "data", noise(32, 4), seed=seed)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not torch.equal(found[0]["a.weight"], found[2]["a.weight"])


def test_what_is_frozen_or_not_executed_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model.register_module("unused", nn.Linear(3, 3))
    model.forward = lambda x: model[1](model[0](x))
    before = model[0].weight.clone()
    rows = {row["layer"]: row for row in init_(model, "data", noise(32, 4)).rows}
    assert torch.equal(model[0].weight, before)
    assert rows["0"]["done"] == "weight kept: frozen; 96% off its target, because its weights are kept: frozen"
    assert rows["1"]["std"] == pytest.approx(1)
    assert rows["unused"]["done"].endswith("not executed by this batch")
    assert rows["unused"]["calls"] == 0


class Fails(nn.Module):
    """Runs its layers, and then does not go on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.LSTM(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.layers(x)
        raise RuntimeError("two\nlines")


def lazily() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def on_meta() -> nn.Module:
    return nn.Linear(4, 4, device="meta")


BAD: dict[str, tuple[Callable[[], nn.Module], object, str]] = {
    "a model that cannot run the batch": (lambda: nn.Linear(4, 4), noise(8, 5), "fails"),
    "a model that fails at its end": (Fails, noise(8, 4), r"test_learn_start\.py.*: RuntimeError: two"),
    "a batch of zeros": (lambda: nn.Linear(4, 4), torch.zeros(8, 4), "only equal values"),
    "a batch with NaN": (lambda: nn.Linear(4, 4), torch.full((8, 4), float("nan")), "not finite"),
    "one number": (lambda: nn.Linear(4, 1), noise(1, 4), "single number"),
    "whole numbers for a linear layer": (lambda: nn.Linear(4, 4), words(8, 4), "fails"),
    "no layer with weights": (nn.ReLU, noise(8, 4), "no layer with weights"),
    "meta": (on_meta, noise(8, 4), "meta device"),
    "lazy": (lazily, noise(8, 4), "no shape yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_start_leaves_the_model_exactly_as_it_was(case: str) -> None:
    build, batch, message = BAD[case]
    torch.manual_seed(0)
    model = build()
    model.train(False)
    real = not any(p.is_meta for p in model.parameters()) and case != "lazy"
    before = {n: v.clone() for n, v in model.state_dict().items()} if real else {}
    state = torch.get_rng_state()
    with pytest.raises(ModelError, match=message) as caught:
        init_(model, "data", batch)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if real)
    assert not any(layer.training for layer in model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules() if case != "lazy")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_good_start_leaves_all_but_the_weights_as_it_was() -> None:
    model, batch = built("CNN")
    model.eval()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    init_(model, "data", batch)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrong_use_is_said() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="needs a batch"):
        init_(model, "data")
    with pytest.raises(RecipeError, match="at least 1 pass"):
        init_(model, "data", noise(4, 2), passes=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", math.sqrt(2)),
        ("leaky_relu", math.sqrt(2 / (1 + 0.01**2))),
        ("linear", 1),
        ("selu", 1),
        ("sin", (0.5 * (1 - math.exp(-2))) ** -0.5),
        ("relu_squared", 1.5**-0.5),
    ],
)
def test_the_gain_is_that_of_the_closed_form(name: str, expected: float) -> None:
    assert gain(name) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_the_gain_of_every_name_is_that_of_a_sample(name: str) -> None:
    z = torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert gain(name) == pytest.approx(float(activation(name)(z).square().mean()) ** -0.5, rel=0.01)
    assert gain(activation(name)) == gain(name)


def test_a_gain_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gelu'"):
        gain("gellu")
    for function in (torch.zeros_like, lambda z: z / 0, lambda z: z[:3]):
        with pytest.raises(ModelError):
            gain(function)


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x**4)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("batch", [noise(16, 128), None], ids=["batch", "symbolic"])
@pytest.mark.parametrize(
    "scheme", ["lecun(gain=auto)", "orthogonal(gain=auto)", "xavier(gain=auto, distribution=normal)"]
)
def test_each_layer_gets_the_gain_of_what_follows_it(scheme: str, batch: Tensor | None) -> None:
    followers = [nn.Tanh(), nn.Identity(), nn.GELU(), nn.ReLU(), Swish()]
    model = nn.Sequential(*(m for f in followers for m in (nn.Linear(128, 128), f)), nn.Linear(128, 128))
    table = init_(model, scheme, batch)
    assert table.column("activation") == ["tanh", "linear", "gelu", "relu", "silu", "linear"]
    wanted = [gain(name) for name in ("tanh", "linear", "gelu", "relu", "silu", "linear")]
    found = [std_of(m.weight) * math.sqrt(128) for m in model if isinstance(m, nn.Linear)]
    assert found == pytest.approx(wanted, rel=0.03)


def test_a_gain_that_cannot_be_found_is_said() -> None:
    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = Follows()
    with pytest.raises(ModelError, match=r"gain='auto' needs to know .* torch.fx cannot follow Follows.*give a batch"):
        init_(model, "lecun(gain=auto)")
    rows = {row["layer"]: row for row in init_(model, "lecun(gain=auto)", torch.ones(2, 4)).rows}
    assert rows["a"]["order"] == 1
    assert rows["b"]["done"] == "weight lecun; not executed by this batch"
    endless = nn.Sequential(nn.Linear(4, 4), Endless())
    with pytest.raises(ModelError, match="Endless, after the layer '0': the mean square"):
        init_(endless, "lecun(gain=auto)", torch.ones(2, 4))


def test_a_batch_shows_the_order_of_execution() -> None:
    model, batch = built("reverse-registered MLP")
    table = init_(model, "he", batch)
    assert table.column("layer") == [f"layers.{i}" for i in reversed(range(6))]
    assert table.column("activation") == ["relu"] * 6
    assert init_(model, "he").column("layer") == [f"layers.{i}" for i in range(6)]


def test_a_padding_row_stays_zero_and_a_shared_table_is_drawn_as_what_multiplies() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(300, 64, padding_idx=3), "head": nn.Linear(64, 300, bias=False)})
    model["head"].weight = model["embed"].weight
    rows = {row["layer"]: row["done"] for row in init_(model, "lecun").rows}
    assert rows == {"embed": "weight is that of head", "head": "weight lecun"}
    weight = model["embed"].weight.detach()
    assert not weight[3].any()
    assert std_of(weight) == pytest.approx(1 / 8, rel=0.03)
    other = nn.Embedding(300, 64, padding_idx=0)
    init_(other, "he")
    assert not other.weight.detach()[0].any()
    assert std_of(other.weight.detach()[1:]) == pytest.approx(1, rel=0.03)


def test_what_is_frozen_or_computed_keeps_its_values() -> None:
    lstm, normed = nn.LSTM(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    lstm.bias_ih_l0.requires_grad_(False)
    before = lstm.bias_ih_l0.clone()
    model = nn.ModuleDict({"lstm": lstm, "normed": normed})
    kept = {n: p.clone() for n, p in normed.named_parameters() if n != "bias"}
    rows = {row["layer"]: row["done"] for row in init_(model, "he").rows}
    assert torch.equal(lstm.bias_ih_l0, before)
    assert rows["normed"] == "weight kept: computed from other parameters"
    assert all(torch.equal(p, kept[n]) for n, p in normed.named_parameters() if n != "bias")


TRANSPOSED: dict[str, nn.Module] = {
    "stride 2": nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
    "a kernel that the stride does not divide": nn.ConvTranspose2d(64, 64, 3, stride=2),
    "no overlap": nn.ConvTranspose1d(64, 64, 2, stride=2),
    "gaps": nn.ConvTranspose1d(128, 128, 2, stride=1),
    "dilated": nn.ConvTranspose1d(128, 128, 4, stride=4, dilation=2),
    "groups": nn.ConvTranspose2d(128, 64, (4, 3), stride=(2, 3), groups=4),
    "three dimensions": nn.ConvTranspose3d(32, 32, 2, stride=2),
}


@pytest.mark.parametrize("scheme", ["lecun", "orthogonal", "lecun(distribution=truncated_normal)"])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_keeps_the_scale(case: str, scheme: str) -> None:
    layer = TRANSPOSED[case]
    init_(layer, scheme)
    axes = layer.weight.ndim - 2
    x = torch.randn(
        4, layer.in_channels, *[{1: 60, 2: 12, 3: 6}[axes]] * axes, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        y = layer(x)
    inner = y[(..., *[slice(8, -8) if n > 20 else slice(3, -3) for n in y.shape[2:]])]
    met = float(inner.square().mean() / (inner != 0).double().mean())  # a stride may leave places that nothing reaches
    assert math.sqrt(met) == pytest.approx(1, rel=0.06)


def test_grouped_and_attention_matrices_each_have_the_identity() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(8, 8, 3, padding=1, groups=2), "up": nn.ConvTranspose2d(4, 4, 2, stride=2)}
    )
    model["attention"] = nn.MultiheadAttention(8, 2)
    init_(model, "identity")
    x, image = noise(2, 8, 5), noise(2, 4, 3, 3)
    assert torch.equal(model["conv"](x), x)
    assert torch.equal(model["up"](image), image.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(model["attention"].in_proj_weight.detach(), torch.eye(8).repeat(3, 1))


def test_scales_of_layers_by_forward_variance() -> None:
    """Of every kind of layer: with lecun the output has the variance of the input, whatever is packed into a tensor."""
    cases = [
        (nn.Linear(300, 200), noise(200, 300)),
        (nn.Bilinear(40, 30, 200), (noise(300, 40), noise(300, 30, seed=1))),
        (nn.Conv2d(32, 64, 3, groups=4, dilation=2), noise(8, 32, 16, 16)),
        (nn.Conv3d(8, 32, 3), noise(4, 8, 8, 8, 8)),
        (nn.Embedding(500, 64), torch.arange(500)),
        (nn.EmbeddingBag(500, 64, mode="sum"), torch.arange(500)[:, None]),
    ]
    for layer, given in cases:
        init_(layer, "lecun")
        inputs = given if isinstance(given, tuple) else (given,)
        with torch.no_grad():
            y = layer(*inputs)
        expected = math.prod(float(x.square().mean()) for x in inputs) if inputs[0].is_floating_point() else 1.0
        assert float(y.square().mean()) == pytest.approx(expected, rel=0.1), type(layer).__name__

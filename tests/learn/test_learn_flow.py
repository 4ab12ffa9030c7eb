"""What follows each layer: activations of every spelling, what lies between, and the ends of residual branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.claims.architectures import ZOO, Vision
from steelyard.errors import ModelError
from steelyard.learn.flow import flow
from steelyard.learn.gain import gain

X = torch.zeros(2, 8)


class Called(nn.Module):
    """Layers a, b, ... of the same width, and a function that says how they are called."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], count: int = 3, **others: nn.Module) -> None:
        super().__init__()
        self.how = how
        for name in "abcdefgh"[:count]:
            setattr(self, name, nn.Linear(8, 8))
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cubed.apply(x)


FOLLOWING: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, Callable[[Tensor], Tensor] | None]] = {
    "a function": (lambda m, x: m.b(functional.relu(m.a(x))), "relu", torch.relu),
    "a method": (lambda m, x: m.b(m.a(x).tanh()), "tanh", torch.tanh),
    "in place": (lambda m, x: m.b(functional.silu(m.a(x), inplace=True)), "silu", functional.silu),
    "in place, by its method": (lambda m, x: m.b(m.a(x).relu_()), "relu", torch.relu),
    "a module": (lambda m, x: m.b(m.act(m.a(x))), "Cubed", lambda z: z**3),
    "written out": (lambda m, x: m.b(torch.sigmoid(h := m.a(x)) * h), "silu", functional.silu),
    "of two functions": (lambda m, x: m.b(functional.relu(m.a(x)) ** 2), "relu_squared", lambda z: torch.relu(z) ** 2),
    "by cases": (
        lambda m, x: m.b(torch.where((h := m.a(x)) > 0, h, 0.2 * h)),
        "where",
        lambda z: functional.leaky_relu(z, 0.2),
    ),
    "with a scale": (lambda m, x: m.b(2 * torch.sin(m.a(x) / 3)), "sin", lambda z: 2 * torch.sin(z / 3)),
    "nothing": (lambda m, x: m.b(m.a(x)), "linear", None),
    "nothing, but a scale": (lambda m, x: m.b(0.5 * m.a(x) + 1), "linear", None),
    "softmax is not one": (lambda m, x: m.b(functional.softmax(m.a(x), -1)), "linear", None),
    "a product is not one": (lambda m, x: m.b(m.a(x) * x), "linear", None),
    "of one side of a product": (lambda m, x: m.b(torch.tanh(m.a(x)) * m.c(x)), "tanh", torch.tanh),
    "behind a sum": (lambda m, x: m.b(functional.relu(m.a(x) + x)), "relu", torch.relu),
    "not that of a later layer": (lambda m, x: functional.relu(m.c((h := m.a(x)) + m.b(h))), "linear", None),
    "the earlier use": (lambda m, x: (h := m.a(x)) + m.b(torch.tanh(h)), "tanh", torch.tanh),
}


@pytest.mark.parametrize("batch", [X, None], ids=["batch", "symbolic"])
@pytest.mark.parametrize("case", FOLLOWING)
def test_the_activation_that_follows(case: str, batch: Tensor | None) -> None:
    how, name, function = FOLLOWING[case]
    found = flow(Called(how, act=Cubed()), batch)
    assert not found.unknown
    place = found.layers["a"]
    assert (place.order, place.name) == (1, name)
    if function is None:
        assert place.activation is None
    else:
        assert place.activation is not None
        z = torch.linspace(-3, 3, 11)
        assert torch.allclose(place.activation(z), function(z), atol=1e-6)
        assert gain(place.activation) == pytest.approx(gain(function), rel=1e-5)
    assert found.layers["b"].activation is None


BETWEEN: dict[str, tuple[list[nn.Module], tuple[int, ...], str, tuple[str, ...]]] = {
    "a norm": ([nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()], (2, 8), "gelu", ("norm",)),
    "a norm of the user": ([nn.Linear(8, 8), nn.RMSNorm(8), Swish()], (2, 8), "silu", ("norm",)),
    "a norm behind the activation": ([nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)], (2, 8), "relu", ()),
    "dropout and reshaping": (
        [nn.Linear(8, 8), nn.Dropout(0.9), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.ELU()], (2, 8), "elu", ("dropout",)
    ),
    "a convolution, a norm and pooling": (
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(inplace=True)], (2, 3, 8, 8), "relu",
        ("norm", "pool"),
    ),
    "transposed": ([nn.ConvTranspose1d(3, 4, 3), nn.Hardswish()], (2, 3, 8), "hardswish", ()),
    "slopes for each channel": ([nn.Conv1d(3, 4, 3), nn.PReLU(4)], (2, 3, 8), "prelu", ()),
    "the identity": ([nn.Linear(8, 8), nn.Identity(), nn.Softplus()], (2, 8), "softplus", ()),
    "a softmax": ([nn.Linear(8, 8), nn.Softmax(-1), nn.ReLU()], (2, 8), "linear", ()),
    "a recurrent layer": ([nn.RNN(8, 8, nonlinearity="relu")], (2, 8), "relu", ()),
    "gates": ([nn.LSTMCell(8, 8)], (2, 8), "gates", ()),
}  # fmt: skip


@pytest.mark.parametrize("symbolically", [False, True])
@pytest.mark.parametrize("case", BETWEEN)
def test_what_lies_between_a_layer_and_its_activation(case: str, symbolically: bool) -> None:
    modules, shape, name, between = BETWEEN[case]
    model = nn.Sequential(*modules)
    for training in (True, False):
        place = flow(model.train(training), None if symbolically else torch.zeros(shape)).layers["0"]
        assert (place.name, place.between if name != "linear" else ()) == (name, between)
        assert place.norm == ("norm" in between)
        assert not place.ends_branch


def test_the_slopes_of_a_parametrised_rectifier_count() -> None:
    place = flow(nn.Sequential(nn.Conv1d(3, 4, 3), nn.PReLU(4, init=0.5)), torch.zeros(1, 3, 5)).layers["0"]
    assert place.activation is not None
    assert gain(place.activation) == pytest.approx((2 / (1 + 0.5**2)) ** 0.5)


def norm() -> dict[str, nn.Module]:
    return {"n": nn.LayerNorm(8), "k": nn.LayerNorm(8)}


def loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + m.b(torch.relu(m.a(x)))
    return m.c(x)


def added(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += functional.dropout(m.b(functional.gelu(h)), 0.5, m.training)
    return m.c(h)


# (how the layers are called, layers that end a branch, residual additions)
BRANCHES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str], int]] = {
    "none": (lambda m, x: m.c(torch.relu(m.b(m.a(x)))), {}, 0),
    "a block": (lambda m, x: m.c(x + m.b(torch.relu(m.a(x)))), {"b": ""}, 1),
    "the branch first": (lambda m, x: m.b(torch.relu(m.a(x))) + x, {"b": ""}, 1),
    "a difference": (lambda m, x: x - m.b(torch.relu(m.a(x))), {"b": ""}, 1),
    "in place, with dropout": (added, {"b": ""}, 1),
    "the same block three times": (loop, {"b": ""}, 3),
    "a norm before it": (lambda m, x: x + m.b(torch.relu(m.a(m.n(x)))), {"b": ""}, 1),
    "a norm after the sum": (lambda m, x: m.n(x + m.b(torch.relu(m.a(x)))), {"b": ""}, 1),
    "a norm within": (lambda m, x: x + m.n(m.b(torch.relu(m.a(x)))), {"b": "n"}, 1),
    "a scale for each unit": (lambda m, x: x + 0.1 * m.b(torch.relu(m.a(x))) * m.a.bias, {"b": ""}, 1),
    "an activation that keeps zero": (lambda m, x: x + torch.tanh(m.a(x)), {"a": ""}, 1),
    "an activation that does not": (lambda m, x: x + torch.sigmoid(m.a(x)), {}, 0),
    "two, one after the other": (lambda m, x: (h := x + m.a(x)) + m.b(h), {"a": "", "b": ""}, 2),
    "two in parallel": (lambda m, x: x + m.a(h := m.n(x)) + m.b(h), {"a": "", "b": ""}, 2),
    "two that are added first": (lambda m, x: (m.a(x) + m.b(x)) + x, {"a": "", "b": ""}, 1),
    "a shortcut with a layer": (lambda m, x: m.c(x) + m.b(torch.relu(m.a(x))), {"b": ""}, 1),
    "two layers side by side": (lambda m, x: m.c(m.a(x) + m.b(x)), {}, 0),
    "a gate": (lambda m, x: x + m.a(x) * torch.sigmoid(m.b(x)), {"a": ""}, 1),
    "gated units": (lambda m, x: x + m.c(functional.silu(m.a(x)) * m.b(x)), {"c": ""}, 1),
    "a skip over several": (lambda m, x: (h := torch.relu(m.a(x))) + m.c(torch.relu(m.b(h))), {"c": ""}, 1),
    "concatenated": (lambda m, x: m.c(torch.cat([x[:, :4], m.a(x)[:, 4:]], 1)), {}, 0),
}


@pytest.mark.parametrize("batch", [X, None], ids=["batch", "symbolic"])
@pytest.mark.parametrize("case", BRANCHES)
def test_the_ends_of_residual_branches(case: str, batch: Tensor | None) -> None:
    how, ends, additions = BRANCHES[case]
    found = flow(Called(how, **norm()), batch)
    assert not found.unknown
    assert {p.layer: p.branch_norm for p in found.layers.values() if p.ends_branch} == ends
    assert found.additions == additions


class Basic(nn.Module):
    """The basic block of a residual network, with a projection where it changes the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 8, 8), None], ids=["batch", "symbolic"])
def test_a_residual_network_with_a_projection(batch: Tensor | None) -> None:
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    found = flow(nn.Sequential(*stem, Basic(4, 4, 1), Basic(4, 8, 2), *head), batch)
    assert found.additions == 2
    ends = {p.layer: p.branch_norm for p in found.layers.values() if p.ends_branch}
    assert ends == {"3.conv2": "3.bn2", "4.conv2": "4.bn2"}
    assert {p.layer: (p.name, p.between) for p in found.layers.values()} == {
        "0": ("relu", ("norm",)),
        "3.conv1": ("relu", ("norm",)),
        "3.conv2": ("relu", ("norm", "add")),
        "4.conv1": ("relu", ("norm",)),
        "4.conv2": ("relu", ("norm", "add")),
        "4.short.0": ("relu", ("norm", "add")),
        "7": ("linear", ()),
    }


@pytest.mark.parametrize("before", [True, False], ids=["norm first", "norm last"])
def test_an_encoder_layer(before: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=before)
    found = flow(nn.Sequential(layer, layer), torch.zeros(2, 5, 16))
    assert [p.layer for p in found.layers.values()] == [f"0.{n}" for n in NAMES]
    assert {p.layer: p.calls for p in found.layers.values()} == {f"0.{n}": 2 for n in NAMES}
    assert [p.name for p in found.layers.values()] == ["attention", "linear", "relu", "linear"]
    assert [p.ends_branch for p in found.layers.values()] == [False, True, False, True]
    assert found.additions == 4


NAMES = ("self_attn", "self_attn.out_proj", "linear1", "linear2")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_layer_of_the_architectures_is_met(name: str) -> None:
    build, batch = ZOO[name]
    model = build()
    found = flow(model, batch)
    assert {p.order for p in found.layers.values()} == set(range(1, len(found.layers) + 1))
    weighted = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    assert set(found.layers) == {n for n, m in model.named_modules() if isinstance(m, weighted)}
    assert found.additions == {"residual": 8, "small ViT": 4}.get(name, 0)


def test_a_layer_whose_weights_are_used_without_calling_it() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = functional.linear(self.embed(x), self.hidden.weight)
            return functional.linear(torch.relu(h), self.embed.weight)

    for batch in (torch.zeros(2, 3, dtype=torch.long), None):
        found = flow(Head(), batch)
        assert {p.layer: (p.order, p.calls, p.name) for p in found.layers.values()} == {
            "embed": (1, 2, "linear"),
            "hidden": (2, 1, "relu"),
        }


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.RReLU(), nn.Linear(8, 2))
    model[1].eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    state = torch.get_rng_state()
    flow(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    flow(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_model_that_fails_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 2))
    with pytest.raises(ModelError, match="fails: RuntimeError"):
        flow(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_cannot_be_followed_without_a_batch_is_unknown() -> None:
    found = flow(Vision())
    assert (found.layers, found.additions) == ({}, 0)
    assert found.unknown.startswith("torch.fx cannot follow Vision: ")
    assert "\n" not in found.unknown


def crossed(m: Any, x: Tensor) -> Tensor:
    memory = torch.relu(m.a(x))
    x = x + m.b(x)
    return x + m.d(torch.softmax(m.c(x) @ m.e(memory).mT, -1) @ m.f(memory))


def test_what_a_branch_holds() -> None:
    """Layers behind a softmax do not carry a signal to the sum; what was there before its stream is crossed to."""
    for batch in (X, None):
        first, second = flow(Called(crossed, 6), batch).branches
        assert (first.layers, dict(first.ends), first.depth, first.crosses) == (("b",), {"b": ""}, 1, False)
        assert (second.layers, dict(second.ends), second.depth, second.crosses) == (("f", "d"), {"d": ""}, 2, True)
        assert first.stream == second.stream
    (gated,) = flow(Called(lambda m, x: x + m.b(torch.relu(m.a(x))) * torch.sigmoid(m.c(x))), X).branches
    assert (gated.layers, gated.depth) == (("a", "b"), 2)
    model = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    one, two, three = flow(model, (torch.zeros(1, 3, 16), torch.zeros(1, 4, 16))).branches
    assert [b.layers for b in (one, three)] == [("self_attn", "self_attn.out_proj"), ("linear1", "linear2")]
    assert [b.crosses for b in (one, two, three)] == [False, True, False]
    assert [b.depth for b in (one, two, three)] == [2, 2, 2]
    assert len({b.stream for b in (one, two, three)}) == 1


class Counting(nn.Module):
    """An activation that keeps a count, with a part inside it that is in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.inner = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return torch.tanh(self.inner(x))


def test_trying_an_activation_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Counting())
    model[1].train(False)
    model[1].inner.train(True)
    for batch in (X, None):
        assert flow(model, batch).layers["0"].name == "tanh"
        assert float(model[1].count) == 0
        assert [m.training for m in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize(
    ("layer", "batch"),
    [
        (nn.Linear(8, 3), X),
        (nn.Conv1d(2, 3, 3), torch.zeros(1, 2, 8)),
        (nn.LSTM(8, 4), X),
        (nn.Embedding(8, 4), torch.zeros(2, dtype=torch.long)),
        (nn.MultiheadAttention(8, 2), (X, X, X)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_is_a_layer(layer: nn.Module, batch: Any) -> None:
    expected = ["", "out_proj"] if isinstance(layer, nn.MultiheadAttention) else [""]
    for given in (batch, None):
        assert list(flow(layer, given).layers) == expected

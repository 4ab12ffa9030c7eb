"""The verdict on a model's scales: right for starts whose fate is known, silent on healthy ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.explain.signal import signal
from steelyard.learn.tasks import task

loss = functional.cross_entropy


def deep(init: object, depth: int = 20, width: int = 128, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False)
        init(layer.weight)  # type: ignore[operator]
        layers += [layer, act()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def batch(width: int = 128, examples: int = 256) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(examples, width, generator=random), torch.randint(10, (examples,), generator=random)


@pytest.mark.parametrize(
    ("std", "verdict"),
    [(0.4, "vanishing signal"), (2**0.5, "healthy"), (3.0, "exploding signal"), (1e30, "not finite")],
)
def test_relu_by_scale(std: float, verdict: str) -> None:
    table = signal(deep(lambda w: nn.init.normal_(w, std=std / 128**0.5)), batch(), loss)
    assert table.meta["verdict"] == verdict
    flagged = [r for r in table.rows if r["verdict"] != "healthy"]
    assert bool(flagged) is (verdict != "healthy")
    assert all("; " in r["cause and cure"] for r in flagged)  # type: ignore[operator]
    assert all(r["cause and cure"] == "" for r in table.rows if r["verdict"] == "healthy")


def test_biases_do_not_hide_a_lost_signal() -> None:
    """With biases the activations keep their size, but they no longer depend on the input."""
    net = nn.Sequential(*[m for _ in range(25) for m in (nn.Linear(128, 128), nn.ReLU())], nn.Linear(128, 10))
    table = signal(net, batch(), loss)
    assert table.rows[24]["rms"] > 1e-2  # type: ignore[operator]
    assert table.meta["verdict"] == "vanishing signal"


def test_saturation() -> None:
    table = signal(deep(lambda w: nn.init.normal_(w, std=3.0), 3, act=nn.Tanh), batch(), loss)
    assert table.meta["verdict"] == "saturated"
    assert table.rows[0]["saturated"] > 0.9  # type: ignore[operator]


def test_a_vanishing_gradient_is_told_from_a_vanishing_signal() -> None:
    class Small(nn.Module):
        """Forwards at scale, backwards a thousandth."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            return self.two(x.detach() + (x - x.detach()) * 1e-5)

    table = signal(Small(), batch(), loss)
    assert (table.meta["verdict"], table.meta["first"]) == ("vanishing gradient", "one")


@pytest.mark.parametrize("where", ["module", "function", "method"])
def test_dead_units_are_found_exactly(where: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 10, 3), nn.ReLU(inplace=True), nn.LazyLinear(10)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            z = {"module": self.act, "function": functional.relu, "method": Tensor.relu}[where](z)
            return self.head(z.flatten(1))

    data = task("digits", augment=False)
    first = next(iter(data.batches("train", 0)))
    net = Net()
    net(first.inputs)
    with torch.no_grad():
        net.conv.bias.fill_(0.5)
        net.conv.bias[[2, 7]] = -100.0
    table = signal(net, (first.inputs, first.targets), data.loss)
    assert table.meta["dead units"] == {"conv": [2, 7]}
    assert table.rows[0]["dead"] == 0.2


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Linear(8, 10), nn.Linear(128, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(torch.tanh(self.early(x)))

    assert signal(Backwards(), batch(), loss).column("layer") == ["early", "late"]


def test_a_bag_of_embeddings_is_a_layer_with_weights() -> None:
    model = nn.Sequential(nn.EmbeddingBag(16, 8), nn.Linear(8, 10))
    words = torch.arange(64).reshape(16, 4) % 16
    table = signal(model, (words, torch.zeros(16, dtype=torch.long)), loss)
    assert list(zip(table.column("layer"), table.column("kind"), strict=True)) == [
        ("0", "EmbeddingBag"),
        ("1", "Linear"),
    ]
    assert all(table.column("weight gradient"))


def test_the_gradients_are_those_of_autograd() -> None:
    net, (x, y) = deep(nn.init.kaiming_normal_, 2), batch()
    table = signal(net, (x, y), loss)
    assert all(p.grad is None for p in net.parameters())
    hidden = torch.relu(net[0](x)).detach().requires_grad_()
    value = loss(net[4](net[3](net[2](hidden))), y)
    (slope,) = torch.autograd.grad(value, hidden)
    (weight,) = torch.autograd.grad(loss(net(x), y), net[0].weight)
    assert table.rows[0]["gradient"] == pytest.approx(float(slope.square().mean().sqrt()), rel=1e-4)
    assert table.rows[0]["weight gradient"] == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-4)


def test_running_statistics_and_the_mode_are_kept() -> None:
    net = nn.Sequential(nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert signal(net, batch(), loss).meta["verdict"] == "healthy"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "transformer", "lenet-300-100"])
def test_built_in_models_start_healthy(name: str) -> None:
    data = task("digits", model=name)
    torch.manual_seed(0)
    first = next(iter(data.batches("train", 0)))
    table = signal(data.build(), (first.inputs, first.targets), data.loss)
    assert table.meta["verdict"] == "healthy", table.rows


def test_what_cannot_be_followed() -> None:
    with pytest.raises(ModelError, match="no layer with weights"):
        signal(nn.Flatten(), batch(10), loss)
    frozen = nn.Linear(128, 10).requires_grad_(False)
    with pytest.raises(ModelError, match="trainable"):
        signal(frozen, batch(), loss)

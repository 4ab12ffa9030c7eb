"""The verdict on a model's scales: right for starts whose fate is known, silent on healthy ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from steelyard.errors import ModelError
from steelyard.explain.signal import signal
from steelyard.learn.task import Batch
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
    said = {r["verdict"]: r["cause and cure"] for r in reversed(flagged)}  # at the first layer of each verdict
    assert all("; " in words for words in said.values())  # type: ignore[operator]
    assert sum(r["cause and cure"] != "" for r in table.rows) == len(said)
    assert (table.meta["cause"] is None) is (verdict == "healthy")
    if verdict != "healthy":
        assert said[verdict] == f"{table.meta['cause']}; {table.meta['cure']}"


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


def mlp(start: float | None, act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 10))
    for layer in net[::2]:
        if start is not None:
            nn.init.constant_(layer.weight, start)
            nn.init.zeros_(layer.bias)
    return net


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("start", [0.0, 0.01, 0.1])
def test_constant_starts_are_symmetric(start: float, act: type[nn.Module]) -> None:
    table = signal(mlp(start, act), batch(), loss)
    assert (table.meta["verdict"], table.meta["first"]) == ("symmetric", "0")
    assert table.column("verdict")[:2] == ["symmetric", "symmetric"]
    assert signal(mlp(None, act), batch(), loss).meta["verdict"] == "healthy"


def test_equal_weights_with_different_gradients_are_not_symmetric() -> None:
    """A constant head tells its classes apart at once; a constant hidden layer never tells its units apart."""
    net = mlp(None, nn.Tanh)
    nn.init.constant_(net[4].weight, 0.1)
    assert signal(net, batch(), loss).meta["verdict"] == "healthy"
    nn.init.constant_(net[2].weight, 0.1)
    nn.init.zeros_(net[2].bias)
    table = signal(net, batch(), loss)
    assert (table.meta["verdict"], table.meta["first"]) == ("symmetric", "2")


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_symmetry_of_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    """Each gate may have a constant of its own; the units are still the same."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    net, given = Net(), (torch.randn(32, 5, 8), torch.randint(10, (32,)))
    assert signal(net, given, loss).meta["verdict"] == "healthy"
    with torch.no_grad():
        for parameter in net.rnn.parameters():
            parameter.copy_(
                0.1 * torch.arange(1, gates + 1).repeat_interleave(16).reshape(-1, *[1] * (parameter.ndim - 1))
            )
        net.head.weight.fill_(0.1)
    assert signal(net, given, loss).meta["verdict"] == "symmetric"


def test_units_of_an_embedding_and_of_a_transposed_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(9, 4), nn.ConvTranspose1d(4, 6, 2), nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.up(self.embed(x).transpose(1, 2))).mean(2))

    torch.manual_seed(0)
    net, given = Net(), (torch.randint(9, (32, 5)), torch.randint(10, (32,)))
    assert signal(net, given, loss).meta["verdict"] == "healthy"
    with torch.no_grad():
        net.up.weight.copy_(torch.randn(4, 1, 2))  # the same for every output
        net.up.bias.zero_()
        net.head.weight.fill_(0.1)
    assert (signal(net, given, loss).meta["first"]) == "up"
    with torch.no_grad():
        net.up.weight.fill_(0.1)
        net.embed.weight.copy_(torch.randn(9, 1))
    table = signal(net, given, loss)
    assert table.column("verdict") == ["symmetric", "symmetric", "healthy"]


class Block(nn.Module):
    """x + branch(norm(x)), the branch shut at the start in one of the ways that are in use."""

    def __init__(self, width: int, shut: str) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), {"ReZero": 0.0, "LayerScale": 1e-6}.get(shut, 1.0)))
        if shut == "Fixup":
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("head", [1.0, 0.0])
@pytest.mark.parametrize("shut", ["open", "Fixup", "ReZero", "LayerScale"])
def test_what_starts_shut_on_purpose_is_healthy(shut: str, head: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), *[Block(64, shut) for _ in range(6)], nn.Linear(64, 10))
    with torch.no_grad():
        net[-1].weight.mul_(head)
        net[-1].bias.mul_(head)
    table = signal(net, batch(), loss)
    assert table.column("verdict") == ["healthy"] * 14, table.rows


def test_low_rank_adapters_and_silent_gates_are_healthy() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(128, 64).requires_grad_(False)
            self.a, self.b = nn.Linear(128, 4, bias=False), nn.Linear(4, 64, bias=False)
            self.squeeze, self.excite, self.head = nn.Linear(64, 4), nn.Linear(4, 64), nn.Linear(64, 10)
            nn.init.zeros_(self.b.weight)
            nn.init.constant_(self.squeeze.bias, -100.0)  # every unit of the gate is dead, and nothing depends on it

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.base(x) + self.b(self.a(x)))
            return self.head(x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x)))))

    torch.manual_seed(0)
    table = signal(Adapted(), batch(), loss)
    found = dict(zip(table.column("layer"), table.column("verdict"), strict=True))
    assert found.pop("squeeze") == "dead"
    assert set(found.values()) == {"healthy"}


def test_a_normalisation_makes_up_for_any_scale_of_the_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    x, y = batch()
    for size in (1e-6, 1.0, 1e6):
        assert signal(net, (x * size, y), loss).meta["verdict"] == "healthy"


def test_what_does_not_depend_on_the_samples_is_not_judged() -> None:
    """Learned queries go through a layer before they meet the data."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.first = nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 16)
            self.keys, self.head = nn.Linear(128, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            q = self.first(self.queries.expand(len(x), -1, -1))
            return self.head((q * self.keys(x)[:, None]).mean(1))

    torch.manual_seed(0)
    assert signal(Queries(), batch(), loss).column("verdict") == ["healthy"] * 3


def test_a_layer_that_blocks_everything_is_to_blame_and_not_what_follows() -> None:
    net = deep(nn.init.kaiming_normal_, 6)
    net[4].bias = nn.Parameter(torch.full((128,), -100.0))
    table = signal(net, batch(), loss)
    assert (table.meta["verdict"], table.meta["first"]) == ("dead", "4")


def test_a_layer_that_is_called_many_times() -> None:
    class Shared(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.Linear(128, 128, bias=False), nn.Linear(128, 10)
            nn.init.normal_(self.layer.weight, std=gain / 128**0.5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(15):
                x = torch.relu(self.layer(x))
            return self.head(x)

    for gain, verdict in ((0.4, "vanishing signal"), (2**0.5, "healthy"), (3.0, "exploding signal")):
        table = signal(Shared(gain), batch(), loss)
        assert (table.meta["verdict"], table.rows[0]["calls"]) == (verdict, 15)
    assert table.meta["first"] == "layer"


def test_saturated_attention_is_seen_in_the_module_in_the_function_and_by_hand() -> None:
    class Attention(nn.Module):
        def __init__(self, how: str, size: float) -> None:
            super().__init__()
            self.how, self.q, self.k = how, nn.Linear(16, 16), nn.Linear(16, 16)
            self.module, self.head = nn.MultiheadAttention(16, 1, batch_first=True), nn.Linear(16, 10)
            with torch.no_grad():
                for weight in (self.q.weight, self.k.weight, self.module.in_proj_weight[:32]):
                    weight.normal_(std=size / 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            if self.how == "module":
                x = self.module(x, x, x, need_weights=False)[0]
            elif self.how == "function":
                x = functional.scaled_dot_product_attention(q, k, x, is_causal=True)
            else:
                x = (q @ k.transpose(1, 2) / 4).softmax(-1) @ x
            return self.head(x.mean(1))

    for how, layer in (("module", "module"), ("function", "q"), ("hand", "q")):
        for size, verdict in ((0.5, "healthy"), (10.0, "saturated")):
            torch.manual_seed(0)
            given = torch.randn(16, 9, 16), torch.randint(10, (16,))
            table = signal(Attention(how, size), given, loss)
            row = table.rows[table.column("layer").index(layer)]
            assert row["verdict"] == verdict, (how, size)
            assert (row["entropy"] < 0.2) is (verdict == "saturated")  # type: ignore[operator]


def test_the_entropy_is_that_of_the_attention() -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.randn(3, 5, 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    weights = layer.eval()(x, x, x, average_attn_weights=False)[1].detach()
    layer.train()
    entropy = -(weights * weights.log()).sum(-1).mean() / torch.tensor(5.0).log()
    table = signal(Net(), (x, torch.zeros(3, dtype=torch.long)), loss)
    assert table.rows[0]["entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_saturated_gates() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    net, given = Net(), (torch.randn(32, 5, 8), torch.randint(10, (32,)))
    assert signal(net, given, loss).rows[0]["saturated"] < 0.01  # type: ignore[operator]
    with torch.no_grad():
        net.rnn.weight_ih_l0.mul_(100)
    assert signal(net, given, loss).rows[0]["verdict"] == "saturated"


def test_the_steps_are_those_of_the_optimizers() -> None:
    for kind, column in ((torch.optim.SGD, "sgd step"), (torch.optim.Adam, "adam step")):
        net, (x, y) = deep(nn.init.kaiming_normal_, 2), batch()
        expected = signal(net, (x, y), loss, rate=0.01).column(column)
        before = [layer.weight.detach().clone() for layer in net[::2]]
        optimizer = kind(net.parameters(), lr=0.01)
        loss(net(x), y).backward()
        optimizer.step()
        found = [float((m.weight.detach() - w).norm() / w.norm()) for m, w in zip(net[::2], before, strict=True)]
        assert found == pytest.approx(expected, rel=1e-3)


def test_nothing_of_the_model_is_changed() -> None:
    """Not by dropout, running statistics, an embedding that renormalises its rows, a buffer that is replaced."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 16, max_norm=0.1), nn.BatchNorm1d(16)
            self.drop, self.head = nn.Dropout(0.5), spectral_norm(nn.Linear(16, 10))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.head(self.drop(self.norm((self.embed(x) * mask[..., None]).mean(1))))

    torch.manual_seed(0)
    net = Net()
    net.norm.eval()
    net.embed.weight.grad = torch.ones(9, 16)
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    before = {name: t.detach().clone() for name, t in tensors.items()}
    modes, random = [m.training for m in net.modules()], torch.get_rng_state()
    x, mask, y = torch.randint(9, (32, 5)), torch.ones(32, 5), torch.randint(10, (32,))
    random = torch.get_rng_state()
    one, two = (signal(net, (given, y), loss) for given in ((x, mask), {"x": x, "mask": mask}))
    assert one.rows == two.rows
    after = dict([*net.named_parameters(), *net.named_buffers()])
    assert all(after[name] is tensors[name] and torch.equal(after[name], t) for name, t in before.items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net.embed.weight.grad, torch.ones(9, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_examples_that_count_nothing_have_no_gradient() -> None:
    net, (x, y) = mlp(None, nn.Tanh), batch()
    half = Batch(x, y, (torch.arange(len(y)) < 100).float())
    weighed = signal(net, half, lambda outputs, targets: loss(outputs, targets, reduction="none"))
    alone = signal(net, (x[:100], y[:100]), loss)
    assert weighed.column("weight gradient") == pytest.approx(alone.column("weight gradient"))


def test_the_second_pass_of_a_checkpoint_is_not_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(None, nn.ReLU), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    table = signal(Net(), batch(), loss)
    assert table.column("calls") == [1] * 4
    assert all(table.column("gradient"))


def test_what_cannot_be_followed() -> None:
    with pytest.raises(ModelError, match="no layer with weights"):
        signal(nn.Flatten(), batch(10), loss)
    frozen = nn.Linear(128, 10).requires_grad_(False)
    with pytest.raises(ModelError, match="trainable"):
        signal(frozen, batch(), loss)
    net, (x, y) = nn.Linear(128, 10), batch()
    with pytest.raises(ModelError, match="all the same"):
        signal(net, (torch.zeros_like(x), y), loss)
    with pytest.raises(ModelError, match="not finite: mend the data"):
        signal(net, (x * float("nan"), y), loss)
    with pytest.raises(ModelError, match=r"Linear, called with the batch, fails.*RuntimeError"):
        signal(net, (x[:, :3], y), loss)
    with pytest.raises(ModelError, match="the loss fails"):
        signal(net, (x, y[:3]), loss)
    with pytest.raises(ModelError, match=r"is a Tensor, expected a pair: \(inputs, targets\)"):
        signal(net, x, loss)
    with pytest.raises(ModelError, match="no shape yet"):
        signal(nn.LazyLinear(10), (x, y), loss)
    with pytest.raises(ModelError, match="meta device"):
        signal(nn.Linear(128, 10, device="meta"), (x, y), loss)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


@pytest.mark.parametrize(
    ("batch", "loss", "message"),
    [
        (
            (BATCH[0][:0], BATCH[1][:0]),
            nn.functional.cross_entropy,
            r"the batch is empty, its inputs have the shape \(0, 8\)",
        ),
        (BATCH, lambda y, t: nn.functional.cross_entropy(y, t) * math.nan, "the loss is nan on this batch, though"),
        (BATCH, lambda y, t: nn.functional.cross_entropy(y, t) / 0, "the loss is inf on this batch, though"),
        (BATCH, lambda y, t: 1.0, "the loss returns a float, expected a tensor"),
    ],
)
def test_what_is_wrong_with_the_batch_or_the_loss_is_named(batch, loss, message):
    with pytest.raises(ModelError, match=message):
        signal(net(), batch, loss)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_a_rate_is_a_finite_number(rate):
    with pytest.raises(ModelError, match="expected a finite number"):
        signal(net(), BATCH, nn.functional.cross_entropy, rate=rate)


def test_a_single_sample_says_nothing_of_dead_units():
    table = signal(net(), (BATCH[0][:1], BATCH[1][:1]), nn.functional.cross_entropy)
    assert table.meta["verdict"] == "healthy"
    assert table.column("dead") == [None, None]
    assert signal(net(), BATCH, nn.functional.cross_entropy).column("dead")[0] is not None

"""What belongs together is found: a model without some units gives what the model with zeros in their place gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.graph.units import narrow_, units_of


class Residual(nn.Module):
    """Batch norm, a residual sum, a squeeze and excitation, a depthwise convolution, and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.depthwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.one(x)), inplace=True)
        x = functional.max_pool2d(functional.hardswish(self.depthwise(x + self.two(x)), inplace=True), 2)
        x = x * torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x.flatten(1))


class Joined(nn.Module):
    """A concatenation into a convolution in two groups, a transposed convolution, and a 1-D one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(10, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.e, self.head = nn.Conv1d(6, 6, 3, groups=3), nn.Linear(6 * 142, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.cat([self.a(x).relu(), self.b(x).relu()], 1)).relu()
        return self.head(self.e(self.d(x).relu().flatten(2)).flatten(1))


class Gated(nn.Module):
    """A gated linear unit, and equal parts of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 12), nn.Linear(6, 8), nn.Linear(4, 5), nn.Linear(9, 3)
        self.unused = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.b(functional.glu(self.a(x), -1)).chunk(2, -1)
        return self.head(torch.cat([torch.sigmoid(u) * v, functional.relu(self.c(x))], -1))


class Tied(nn.Module):
    """Tied embeddings around a bidirectional LSTM of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)
        self.project, self.head = nn.Linear(12, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.lstm(self.embed(x))[0]))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell, self.head = nn.GRU(3, 8, 2), nn.GRUCell(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.gru(x)
        return self.head(self.cell(states.mean(0) + last[-1]))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=True)
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 5)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


class Causal(nn.Module):
    """Attention with masks and with the weights of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 4, kdim=6, vdim=5, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(key.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        mixed, weights = self.attention(x, key, value, key_padding_mask=padding, attn_mask=mask)
        return self.head(mixed) + weights.sum((1, 2), keepdim=True)


class FixedHeads(nn.Module):
    """An attention whose code says how many heads there are: only its feed-forward units can go."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(self.up(x).relu())


class FreeHeads(FixedHeads):
    """The same, but their number follows from the weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Constant(nn.Module):
    """A flattening whose code says how many elements there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(64, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu().view(-1, 64)).relu())


class Shuffled(nn.Module):
    """Channels shuffled between two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.c, self.head = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(self.c(x).relu())


IMAGE, SEQUENCE = torch.randn(2, 3, 8, 8), torch.randn(2, 7, 3)
MODELS = {
    "residual": (Residual, (IMAGE,), {4, 8}),
    "joined": (Joined, (IMAGE,), {1, 2, 4}),
    "gated": (Gated, (torch.randn(2, 4),), {4, 5, 6}),
    "tied": (Tied, (torch.randint(0, 11, (2, 5)),), {6, 8}),
    "gru": (Gru, (SEQUENCE,), {6, 8}),
    "encoder": (Encoder, (SEQUENCE,), {4, 16, 32}),
    "time first": (lambda: Encoder(batch_first=False), (SEQUENCE,), {4, 16, 32}),
    "causal": (Causal, (torch.randn(2, 3, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 5)), {4, 8}),
    "fixed heads": (FixedHeads, (torch.randn(2, 3, 8),), {6}),
    "free heads": (FreeHeads, (torch.randn(2, 3, 8),), {2, 6}),
    "constant": (Constant, (IMAGE,), {6, 10}),
    "shuffled": (Shuffled, (IMAGE,), {2, 4}),
    "transformer": (
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True),
        (torch.randn(2, 3, 16), torch.randn(2, 4, 16)),
        {4, 32},
    ),
}


def built(name):
    torch.manual_seed(0)
    make, arguments, sizes = MODELS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, arguments, sizes


def half_of(units):
    """Every other unit of each family goes, if no mean is taken over it and the family has more than one."""
    alive = np.ones(units.count, bool)
    for family in units.families:
        if len(family.units) > 1 and not units.inexact[family.units].any():
            alive[family.units[::2]] = False
    return alive


def masked(model, units, alive):
    """A copy with zeros for every weight of what goes."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            for axis, kept in enumerate(units.kept(alive)[name]):
                gone = np.setdiff1d(np.arange(parameter.shape[axis]), kept)
                parameter.index_fill_(axis, torch.from_numpy(gone), 0)
    return copied


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_gives_what_the_one_with_zeros_gives(name):
    model, arguments, sizes = built(name)
    units = units_of(model, arguments)
    assert {len(family.units) for family in units.families} == sizes
    alive = half_of(units)
    assert not alive.all()
    small = narrow_(copy.deepcopy(model), units.kept(alive))
    with torch.no_grad():
        found, expected, before = (m(*arguments) for m in (small, masked(model, units, alive), model))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)  # and what went was of use
    names = [n for n, _ in model.named_parameters()]
    assert units.parameters(alive, names) == sum(p.numel() for p in small.parameters())
    assert units.parameters(np.ones(units.count, bool), names) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_all_families_can_go_down_to_one_unit(name):
    model, arguments, _ = built(name)
    units = units_of(model, arguments)
    alive = np.ones(units.count, bool)
    for family in units.families:
        alive[family.units[1:]] = False
    small = narrow_(copy.deepcopy(model), units.kept(alive))
    with torch.no_grad():
        assert small(*arguments).shape == model(*arguments).shape
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was_and_ties_stay_ties():
    model, arguments, _ = built("tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = units_of(model, arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small = narrow_(model, units.kept(half_of(units)))
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (11, 4)


def test_multiplications_are_those_of_hand_counts():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(288, 5))
    units = units_of(net.eval(), (IMAGE,))
    everything = np.ones(units.count, bool)
    assert units.multiplications(everything) == 3 * 8 * 9 * 64 + 8 * 9 * 36 + 288 * 5
    alive = half_of(units)
    assert units.multiplications(alive) == 3 * 4 * 9 * 64 + 4 * 9 * 36 + 144 * 5


def test_attention_counts_its_scores():
    model, arguments, _ = built("encoder")
    units = units_of(model, arguments)
    per_layer = 7 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 7 * 7 * 16
    assert units.multiplications(np.ones(units.count, bool)) == 7 * (3 * 16 + 16 * 5) + 2 * per_layer


def test_a_rule_that_is_wrong_is_found_out(monkeypatch):
    """If nothing said that the two sides of a sum belong together, each would lose other channels, and the model fail."""
    from steelyard.graph import rules

    model, arguments, sizes = built("residual")
    monkeypatch.setattr(rules, "broadcast", lambda state, inputs, shape: max(inputs, key=lambda a: [len(x) for x in a]))
    assert {len(family.units) for family in units_of(model, arguments).families} != sizes


def test_a_model_that_decides_by_values_is_named():
    class Deciding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(ModelError, match="Deciding cannot be followed on this batch"):
        units_of(Deciding(3, 3), (torch.ones(1, 3),))


def test_a_model_with_masks_must_release_them_first():
    net = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(ModelError, match="1 has parametrizations"):
        units_of(net, (torch.ones(1, 3),))


def test_an_operation_without_a_rule_keeps_what_it_reads():
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).sort(-1).values).relu())

    (family,) = units_of(Sorted(), (torch.ones(1, 3),)).families
    assert family.sites == (("b.weight", 0), ("b.bias", 0), ("c.weight", 1))

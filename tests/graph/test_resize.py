"""Layers of another width: what they become, what they cannot be, and that nothing is half done."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.graph.attention import NarrowAttention
from steelyard.graph.resize import resize_

LAYERS = [
    (nn.Linear(3, 8), nn.Linear(2, 5), torch.ones(1, 2)),
    (nn.Conv2d(4, 8, 3), nn.Conv2d(3, 5, 3), torch.ones(1, 3, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(3, 6, 3, groups=3), torch.ones(1, 3, 5, 5)),
    (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(6, 4, 3, groups=2), torch.ones(1, 6, 5, 5)),
    (nn.ConvTranspose2d(4, 8, 2), nn.ConvTranspose2d(3, 5, 2), torch.ones(1, 3, 5, 5)),
    (nn.ConvTranspose1d(4, 8, 2, groups=4), nn.ConvTranspose1d(3, 6, 2, groups=3), torch.ones(1, 3, 5)),
    (nn.BatchNorm2d(8), nn.BatchNorm2d(5), torch.rand(2, 5, 3, 3)),
    (nn.BatchNorm1d(8, affine=False), nn.BatchNorm1d(5, affine=False), torch.rand(2, 5)),
    (nn.GroupNorm(2, 8), nn.GroupNorm(2, 6), torch.rand(2, 6, 3)),
    (nn.LayerNorm(8), nn.LayerNorm(5), torch.rand(2, 5)),
    (nn.RMSNorm(8), nn.RMSNorm(5), torch.rand(2, 5)),
    (nn.Embedding(7, 8), nn.Embedding(7, 5), torch.tensor([3])),
    (nn.PReLU(8), nn.PReLU(5), -torch.rand(2, 5)),
    (nn.GRU(4, 8, 2, bidirectional=True), nn.GRU(3, 5, 2, bidirectional=True), torch.rand(6, 2, 3)),
    (nn.LSTM(4, 8), nn.LSTM(3, 5), torch.rand(6, 2, 3)),
    (nn.RNNCell(4, 8), nn.RNNCell(3, 5), torch.rand(2, 3)),
    (nn.Bilinear(3, 4, 5), nn.Bilinear(2, 3, 4), (torch.rand(1, 2), torch.rand(1, 3))),
]


def same(a, b):
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize(("layer", "other", "x"), LAYERS, ids=lambda v: type(v).__name__)
def test_a_layer_becomes_one_that_is_built_at_this_width(layer, other, x):
    layer, other = layer.eval(), other.eval()
    into_module(from_module(other), layer, resize=True)
    arguments = x if isinstance(x, tuple) else (x,)
    assert same(layer(*arguments), other(*arguments))
    plain = {k: v for k, v in vars(layer).items() if isinstance(v, (int, tuple)) and k != "training"}
    assert plain == {k: v for k, v in vars(other).items() if isinstance(v, (int, tuple)) and k != "training"}
    assert repr(layer) == repr(other)


BAD = [
    (nn.Linear(3, 8), {"weight": (5, 3)}, "'bias' has 8 elements for 5 channels"),
    (nn.Linear(3, 8), {"weight": (0, 3), "bias": (0,)}, "a layer cannot be empty"),
    (nn.Conv2d(4, 8, 3), {"weight": (8, 4, 5, 5)}, "only widths can change"),
    (nn.Conv2d(8, 8, 3, groups=2), {"weight": (5, 4, 3, 3), "bias": (5,)}, "5 channels cannot be divided"),
    (nn.GroupNorm(4, 8), {"weight": (6,), "bias": (6,)}, "6 channels cannot be divided evenly among 4 groups"),
    (nn.Embedding(7, 8), {"weight": (6, 8)}, "what a row stands for"),
    (nn.GRU(4, 8), {"weight_hh_l0": (15, 5)}, "expected"),
    (nn.LSTM(4, 8, proj_size=3), {"weight_ih_l0": (20, 4)}, "projected"),
    (nn.MultiheadAttention(8, 2), {"in_proj_weight": (18, 8)}, "heads"),
    (nn.Linear(3, 8), {"weight": (8, 3, 1)}, "2 axes, and 3 in the weights"),
]


@pytest.mark.parametrize(("layer", "shapes", "message"), BAD, ids=[m for *_, m in BAD])
def test_what_a_layer_cannot_be_is_named_and_nothing_changes(layer, shapes, message):
    net = nn.Sequential(nn.Linear(3, 4), layer)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        resize_(net, {"0.weight": (2, 3), "0.bias": (2,)} | {f"1.{leaf}": shape for leaf, shape in shapes.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net[0].out_features == 4


def test_loading_other_shapes_is_refused_unless_it_is_asked_for():
    small, large = nn.Linear(3, 4), nn.Linear(3, 8)
    with pytest.raises(ModelError, match=r"wrong shape.*resize=True"):
        into_module(from_module(small), large)
    assert large.weight.shape == (8, 3)
    table = into_module(from_module(small), large, resize=True)
    assert table.column("note") == ["resized", "resized"]
    assert torch.equal(large.weight, small.weight)


def test_a_missing_name_is_found_before_anything_is_resized():
    net = nn.Linear(3, 8)
    with pytest.raises(ModelError, match="missing 'bias'"):
        into_module(from_module(nn.Linear(3, 4)).select(lambda item: item.name == "weight"), net, resize=True)
    assert net.weight.shape == (8, 3)


def test_what_training_needs_is_kept():
    net = nn.Linear(3, 8).double()
    net.bias.requires_grad_(False)
    resize_(net, {"weight": (5, 3), "bias": (5,)})
    assert isinstance(net.weight, nn.Parameter)
    assert (net.weight.requires_grad, net.bias.requires_grad) == (True, False)
    assert net.weight.dtype == torch.float64
    net(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert net.weight.grad.shape == (5, 3)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_an_attention_of_all_heads_is_torchs_own(need_weights, batch_first, single):
    torch.manual_seed(1)
    own = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    ours = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    resize_(ours, {"in_proj_weight": (18, 8), "in_proj_bias": (18,), "out_proj.weight": (8, 6)})
    assert isinstance(ours, NarrowAttention)
    assert ours.num_heads == 3
    into_module(from_module(own), ours, resize=True)
    x = torch.randn(5, 8) if single else torch.randn(3, 5, 8)
    if not batch_first and not single:
        x = x.transpose(0, 1)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    for attn_mask, each in ((None, True), (mask, False)):
        found, expected = (
            m(x, x, x, need_weights=need_weights, attn_mask=attn_mask, average_attn_weights=each) for m in (ours, own)
        )
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            assert torch.allclose(found[1], expected[1], atol=1e-6)


FRESH = """
import sys
import torch
from torch import nn
from steelyard import formats
from steelyard.formats.module import into_module
torch.manual_seed(9)
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
net = nn.Sequential(nn.Linear(3, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)).eval()
into_module(formats.open(sys.argv[1]), net, resize=True)
print(net(torch.linspace(-1, 1, 42).view(2, 7, 3)).double().sum().item().hex())
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    from steelyard.learn.structured import prune_structured_

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.Sequential(nn.Linear(3, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)).eval()
    x = torch.linspace(-1, 1, 42).view(2, 7, 3)
    large = formats.write(from_module(net), tmp_path / "large.safetensors")
    prune_structured_(net, x, 0.6)
    path = tmp_path / "small.safetensors"
    assert formats.write(from_module(net), path) < 0.6 * large
    done = subprocess.run([sys.executable, "-c", FRESH, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == net(x).double().sum().item().hex()


def test_shapes_come_from_ties_as_well():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    resize_(net, Weights.of({"0.weight": torch.zeros(3, 3).numpy()}, {"1.weight": "0.weight"}))
    assert net[1].weight is net[0].weight
    assert (net[1].in_features, net[1].out_features) == (3, 3)

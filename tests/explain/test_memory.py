"""The gradient over time against Jacobians that automatic differentiation gives, and networks whose memory is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.explain.memory import memory
from steelyard.learn.models import model
from steelyard.learn.seeding import seeded
from steelyard.learn.task import Interface


def jacobian_norms(layer: nn.RNNBase, x: Tensor) -> list[float]:
    """||dh_T/ds_t|| / sqrt(units) by full Jacobians, one sample; x: (1, time, features)."""
    found = []
    lstm = isinstance(layer, nn.LSTM)
    for t in range(1, x.shape[1]):
        states = layer(x[:, :t])[1]
        parts = tuple(p.detach() for p in states) if lstm else (states.detach(),)

        def last(*parts: Tensor, t: int = t) -> Tensor:
            return layer(x[:, t:], parts if lstm else parts[0])[0][0, -1]

        blocks = torch.autograd.functional.jacobian(last, parts)
        found.append(math.sqrt(sum(float(b.square().sum()) for b in blocks) / layer.hidden_size))
    return [*found[::-1]]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_it_is_the_norm_of_the_jacobian(kind: type[nn.RNNBase]) -> None:
    with seeded(0):
        layer = kind(3, 6, batch_first=True).double()
        x = torch.randn(1, 9, 3).double()
    curve = memory(layer, x, probes=4000).column("gradient")
    assert curve[0] == pytest.approx(1, rel=0.05)
    assert curve[1:] == pytest.approx(jacobian_norms(layer, x), rel=0.05)


def test_an_identity_keeps_and_a_half_halves() -> None:
    layer = nn.RNN(2, 5, nonlinearity="relu", batch_first=True)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(layer.bias_ih_l0)
    nn.init.eye_(layer.weight_hh_l0)
    x = torch.zeros(20, 30, 2)
    table = memory(layer, x)
    assert table.column("gradient") == pytest.approx([table.rows[0]["gradient"]] * 30)
    assert table.meta["l0"] == {"per step": pytest.approx(1), "reach": None}
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    table = memory(layer, x)
    assert table.meta["l0"] == {"per step": pytest.approx(0.5), "reach": 7}
    assert table.rows[10]["gradient"] == pytest.approx(table.rows[0]["gradient"] / 2**10)


def test_levels_and_directions_are_layers_of_their_own_and_nothing_is_changed() -> None:
    with seeded(0):
        layer = nn.Sequential(nn.LSTM(3, 6, num_layers=2, bidirectional=True, batch_first=True))
        x = torch.randn(2, 7, 3)
    before = [p.clone() for p in layer.parameters()]
    table = memory(layer.train(), x)
    labels = ["0.l0", "0.l0_reverse", "0.l1", "0.l1_reverse"]
    assert list(dict.fromkeys(table.column("layer"))) == labels == list(table.meta)[:4]
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert layer.training
    assert all(p.grad is None for p in layer.parameters())
    with seeded(0):
        alone = nn.LSTM(3, 6, batch_first=True)
    alone.load_state_dict({n: layer[0].state_dict()[n.replace("l0", "l0_reverse")] for n in alone.state_dict()})
    curve = [row["gradient"] for row in table.rows if row["layer"] == "0.l0_reverse"]
    assert memory(alone, x.flip(1)).column("gradient") == pytest.approx(curve)


def test_a_chrono_start_remembers_longer() -> None:
    interface = Interface((80, 2), 1)
    reach = {}
    for name, options in {"torch": {"start": "torch"}, "one": {}, "chrono": {"memory": 80}}.items():
        with seeded(0):
            net = model("rnn", interface, hidden=32, **options)
            x = torch.rand(8, 80, 2)
        reach[name] = memory(net, x).meta["recurrent.l0"]["reach"] or 80
    assert reach["torch"] < 20 < reach["one"] < reach["chrono"] == 80


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_has_no_such_memory_is_said() -> None:
    with pytest.raises(ModelError, match="Linear has no recurrent layer"):
        memory(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(ModelError, match="projects its state"):
        memory(nn.LSTM(3, 6, proj_size=2), torch.zeros(4, 1, 3))
    with pytest.raises(ModelError, match="pass a padded tensor"):
        memory(nn.GRU(3, 6), nn.utils.rnn.pack_sequence([torch.zeros(4, 3)]))

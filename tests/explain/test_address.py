"""A connection is one number between two units, in every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain.address import connection


def test_a_dense_connection_is_set_and_moves_only_its_output() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    before = layer(x).detach()
    wire = connection(layer, "", 1, 2)
    old = wire.set(0.75)
    moved = layer(x).detach() - before
    assert wire.read() == 0.75 == float(layer.weight.detach()[1, 2])
    torch.testing.assert_close(moved[:, 1], (0.75 - old) * x[:, 2], atol=1e-6, rtol=1e-5)
    assert not moved[:, [0, 2]].any()


def test_a_grouped_convolution_counts_inputs_over_all_groups() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    connection(layer, "", 5, 3, (0, 2)).set(9.0)
    assert layer.weight[5, 1, 0, 2] == 9.0
    with pytest.raises(ModelError, match="input 0 is not connected to output 5"):
        connection(layer, "", 5, 0, (0, 2))
    assert connection(nn.Conv1d(1, 1, 3), "", 0, 0, 2).index == (0, 0, 2)


@pytest.mark.parametrize(
    ("layer", "part", "name", "row"),
    [
        (nn.LSTM(3, 4), "W_if", "weight_ih_l0", 4 + 1),
        (nn.LSTM(3, 4, num_layers=2), "W_ho_l1", "weight_hh_l1", 12 + 1),
        (nn.GRU(3, 4, bidirectional=True), "W_in_l0_reverse", "weight_ih_l0_reverse", 8 + 1),
        (nn.RNN(3, 4), "W_hh", "weight_hh_l0", 1),
    ],
)
def test_a_gate_is_named_as_in_the_documentation(layer: nn.RNNBase, part: str, name: str, row: int) -> None:
    connection(layer, "", 1, 2, part=part).set(0.5)
    assert getattr(layer, name)[row, 2] == 0.5


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}])
def test_projections_of_attention(widths: dict[str, int]) -> None:
    layer = nn.MultiheadAttention(6, 2, **widths)
    connection(layer, "", 1, 2, part="v").set(0.5)
    weight = layer.v_proj_weight if widths else layer.in_proj_weight[12:]
    assert weight[1, 2] == 0.5
    connection(layer, "", 0, 3, part="out").set(0.25)
    assert layer.out_proj.weight[0, 3] == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: connection(nn.Linear(4, 3), "", 3, 0), "axis 0 of its weight has 3 places, there is no 3"),
        (lambda: connection(nn.Linear(4, 3), "", 0, -1), "there is no -1"),
        (lambda: connection(nn.Linear(4, 3), "", 0, 0, 1), "expected no tap"),
        (lambda: connection(nn.Conv2d(1, 1, 3), "", 0, 0, 1), "expected a tap of 2 numbers"),
        (lambda: connection(nn.ReLU(), "", 0, 0), "does not connect"),
        (lambda: connection(nn.Embedding(3, 4), "", 0, 0), "does not connect"),
    ],
)
def test_units_that_are_not_there(call: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()  # type: ignore[operator]


def test_names_that_are_not_there() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    with pytest.raises(UnknownNameError, match="no layer 'O'"):
        connection(net, "O", 0, 0)
    with pytest.raises(UnknownNameError, match="'W_if'"):
        connection(net, "1", 0, 0, part="W_iff")
    with pytest.raises(UnknownNameError, match="'q'"):
        connection(net, "0", 0, 0, part="q")

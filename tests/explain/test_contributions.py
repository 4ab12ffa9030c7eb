"""Contributions add up to what the layer computed, in every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.explain import affine
from steelyard.explain.contributions import balance, contributions

IMAGES = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided, padded, grouped": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "dilated, uneven": nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_convolutions(name: str) -> None:
    assert balance(IMAGES[name], torch.randn(2, 4, 9, 8)).meta["worst"] < 1e-6


def test_convolution_over_time_and_space() -> None:
    assert balance(nn.Conv1d(3, 5, 4, stride=3), torch.randn(2, 3, 17)).meta["worst"] < 1e-6
    assert balance(nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 5, 3)).meta["worst"] < 1e-6


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}]
)
def test_gates(kind: type[nn.RNNBase], options: dict[str, object]) -> None:
    table = balance(kind(5, 4, **options), torch.randn(6, 3, 5))
    assert table.meta["worst"] < 1e-6
    levels = options.get("num_layers", 1) * (1 + ("bidirectional" in options))  # type: ignore[operator]
    assert len(table.rows) == levels * {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]


def test_gates_from_a_given_state_and_without_a_batch() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x, (torch.ones(1, x.shape[1], 4), torch.ones(1, x.shape[1], 4)))[0]

    assert balance(Started(), torch.randn(6, 3, 5)).meta["worst"] < 1e-6
    assert balance(nn.GRU(5, 4), torch.randn(6, 5)).meta["worst"] < 1e-6
    assert balance(nn.RNN(5, 4, nonlinearity="relu"), torch.randn(6, 3, 5)).meta["worst"] < 1e-6


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_gates_that_cannot_be_opened() -> None:
    with pytest.raises(ModelError, match="proj_size"):
        balance(nn.LSTM(5, 4, proj_size=2), torch.randn(6, 3, 5))
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    with pytest.raises(ModelError, match="padded"):
        contributions(nn.Sequential(nn.LSTM(5, 4)), packed, "0", 0, part="f")  # type: ignore[arg-type]


class _Masked(nn.Module):
    def __init__(self, mask: torch.Tensor | None, padding: torch.Tensor | None = None, **options: object):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.mask, self.padding = mask, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, key_padding_mask=self.padding, need_weights=False)[0]


@pytest.mark.parametrize(
    "model",
    [
        _Masked(None),
        _Masked(None, bias=False, batch_first=True),
        _Masked(nn.Transformer.generate_square_subsequent_mask(5)),
        _Masked(torch.ones(5, 5).triu(1).bool()),
        _Masked(None, torch.tensor([[False, False, True, False, True]] * 3)),
        _Masked(torch.randn(6, 5, 5)),
    ],
)
def test_attention(model: nn.Module) -> None:
    x = torch.randn(3, 5, 8) if model.attention.batch_first else torch.randn(5, 3, 8)  # type: ignore[union-attr]
    table = balance(model, x)
    assert table.meta["worst"] < 1e-6
    assert table.column("part") == ["q", "k", "v", "out"]


def test_attention_to_another_sequence_of_another_width() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.attention(q, key=k, value=v)[0]

    given = torch.randn(5, 3, 8), torch.randn(7, 3, 6), torch.randn(7, 3, 4)
    assert balance(Cross(), given).meta["worst"] < 1e-6
    with pytest.raises(ModelError, match="bias_k"):
        balance(
            nn.TransformerEncoderLayer(8, 2).self_attn.__class__(8, 2, add_bias_kv=True), (torch.randn(5, 3, 8),) * 3
        )


def test_an_encoder_in_evaluation_mode_is_seen_through_its_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    table = balance(encoder, torch.randn(3, 5, 8))
    assert table.meta["worst"] < 1e-6
    assert len(table.rows) == 2 * (4 + 2)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_balance_sees_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = affine._affine
    monkeypatch.setattr(affine, "_affine", lambda x, w, b, a: honest(x, w, b * 1.01, a))
    assert balance(nn.Linear(4, 3), torch.ones(2, 4)).meta["worst"] > 1e-4


def test_an_in_place_activation_does_not_change_what_was_recorded() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    assert balance(net, torch.randn(8, 4)).meta["worst"] < 1e-6


def test_a_ledger_is_ordered_and_adds_up() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 5, 5)
    table = contributions(conv, x, "", 1, sample=2, position=(0, 4))
    *products, bias = table.rows
    sizes = [abs(r["contribution"]) for r in products]  # type: ignore[arg-type]
    assert sizes == sorted(sizes, reverse=True)
    assert bias["term"] == "bias"
    assert sum(table.column("contribution")) == pytest.approx(float(conv(x)[2, 1, 0, 4].detach()), abs=1e-6)
    corner = next(r for r in products if r["term"] == "1[2,0]")
    assert corner["value"] == pytest.approx(float(x[2, 1, 1, 3]))
    assert table.meta["relative error"] < 1e-6


def test_what_is_left_out_is_where_the_sum_is_largest() -> None:
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 2, 5, 5)
    z = conv(x).detach()[1]
    table = contributions(conv, x, "", sample=1)
    assert table.meta["pre-activation"] == pytest.approx(float(z.max()))
    assert contributions(conv, x, "", 2, sample=1).meta["pre-activation"] == pytest.approx(float(z[2].max()))


def test_names_of_terms_and_wrong_places() -> None:
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    assert set(contributions(layer, x, "", 0, features=("age", "size")).column("term")) == {"age", "size", "bias"}
    for call, message in (
        (lambda: contributions(layer, x, "", 3), "3 outputs"),
        (lambda: contributions(layer, x, "", 0, sample=4), "no sample 4"),
        (lambda: contributions(layer, x, "", 0, position=1), "a position"),
        (lambda: contributions(layer, x, "", 0, features=("age",)), "1 feature names"),
        (lambda: contributions(nn.Sequential(nn.ReLU()), x, "0", 0), "no weighted sum"),
    ):
        with pytest.raises(ModelError, match=message):
            call()
    with pytest.raises(UnknownNameError, match="part of a Linear"):
        contributions(layer, x, "", 0, part="f")


def test_a_layer_that_does_not_run_is_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net.spare = nn.Linear(2, 2)
    net.forward = net[0].forward  # type: ignore[method-assign,assignment]
    with pytest.raises(ModelError, match="'spare' is not called"):
        contributions(net, torch.ones(1, 2), "spare", 0)


def test_the_mode_and_the_gradients_of_the_model_are_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    balance(net, torch.randn(8, 4))
    assert [m.training for m in net] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net[0].weight.grad is None

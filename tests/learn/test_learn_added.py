"""Parameters of no layer that are added to the signal: they get its scale, and what keeps its own is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.claims.architectures import noise
from steelyard.learn.added import SHARE
from steelyard.learn.auto import STREAM
from steelyard.learn.start import init_

X = noise(16, 6, 8)  # (samples, places, features)
SCHEMES = ["data", "auto"]


class Places(nn.Module):
    """A layer at every place, parameters `joined` to it, and a head on the mean."""

    def __init__(self, joined: Callable[[Places, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.body, self.head, self.joined = nn.Linear(8, 12), nn.Linear(12, 3), joined
        for name, values in parameters.items():
            self.register_parameter(name, nn.Parameter(values.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(self, self.body(x)).mean(1))


def tiny(*shape: int) -> Tensor:
    return 0.02 * noise(*shape)


def rows(model: nn.Module, scheme: str = "auto", x: Tensor = X) -> dict[str, dict[str, object]]:
    table = init_(model, scheme, x)
    return {row["layer"]: row for row in table.rows} | {"meta": table.meta}


WAYS: dict[str, tuple[Callable[[Places, Tensor], Tensor], dict[str, Tensor]]] = {
    "a sum": (lambda m, h: h + m.pos, {"pos": tiny(6, 12)}),
    "the other way round, a part": (lambda m, h: m.pos[:, :6] + h, {"pos": tiny(1, 9, 12)}),
    "in place": (lambda m, h: h.mul(1.0).add_(m.pos), {"pos": tiny(6, 12)}),
    "looked up": (lambda m, h: h + m.pos[torch.arange(6)], {"pos": tiny(6, 12)}),
    "after a factor": (lambda m, h: h + 3 * m.pos.transpose(0, 1), {"pos": tiny(12, 6)}),
    "rows and columns": (lambda m, h: h + (m.pos[:, None] + m.more).flatten(0, 1),
                         {"pos": tiny(2, 12), "more": tiny(3, 12)}),
    "a token": (lambda m, h: torch.cat([m.pos.expand(16, -1, -1), h], 1), {"pos": tiny(1, 1, 12)}),
    "a token that is repeated": (lambda m, h: torch.cat([m.pos.repeat(16, 1, 1), h], 1), {"pos": torch.zeros(1, 1, 12)}),
    "in the place of some": (lambda m, h: torch.where(torch.arange(6)[:, None] < 2, m.pos, h), {"pos": tiny(12)}),
    "zeros": (lambda m, h: h + m.pos, {"pos": torch.zeros(6, 12)}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_added_gets_the_scale_of_the_signal(way: str, scheme: str) -> None:
    joined, parameters = WAYS[way]
    model = Places(joined, **parameters)
    found = rows(model, scheme)
    with torch.no_grad():
        signal = model.body(X)
        together = joined(model, signal)
        model.body.weight.zero_(), model.body.bias.zero_()
        added = joined(model, torch.zeros_like(signal)) if "token" not in way else together[:, :1]
        added = added[:, :2] if way == "in the place of some" else added
    assert float(added.std(unbiased=False)) == pytest.approx(SHARE * float(signal.std(unbiased=False)), rel=0.03)
    assert found["pos"]["kind"] == "Parameter"
    assert found["pos"]["std"] == pytest.approx(SHARE, rel=1e-3)
    assert found["head"]["std"] == pytest.approx(1.0, rel=1e-4)  # what comes after meets it with its new scale
    assert "kept" not in found["meta"]
    assert scheme == "data" or (found["meta"]["proved"] and found["pos"]["target"] == found["pos"]["std"])


def test_a_pattern_is_kept_and_only_zeros_are_drawn() -> None:
    waves = torch.sin(torch.arange(72.0)).view(6, 12)
    model = Places(lambda m, h: h + m.pos, pos=1e-3 * waves)
    found = rows(model)
    assert torch.allclose(model.pos.detach() / model.pos.detach().norm(), waves / waves.norm(), atol=1e-6)
    assert found["pos"]["done"].startswith("its pattern kept")
    one, two, other = (Places(lambda m, h: h + m.pos, pos=torch.zeros(6, 12)) for _ in range(3))
    for model, seed in ((one, 0), (two, 0), (other, 1)):
        assert init_(model, "auto", X, seed=seed).rows[-1]["done"].startswith("drawn normal")
    assert torch.equal(one.pos, two.pos)
    assert not torch.equal(one.pos, other.pos)


class Scores(nn.Module):
    """Attention with a learned bias of its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.near = nn.Parameter(torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5 + self.near
        return self.head(scores.softmax(-1) @ x)


class Latents(nn.Module):
    """Learned queries that attention meets before anything is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(tiny(4, 8))
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return self.head(queries + self.mix(queries, x, x)[0])


def adapted(m: Places, h: Tensor) -> Tensor:
    return h + functional.linear(h, m.up @ m.down)


KEPT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "frozen": (lambda: frozen(Places(lambda m, h: h + m.pos, pos=tiny(6, 12))), "pos", "frozen"),
    "frozen and not to be written": (
        lambda: frozen(Places(lambda m, h: h + m.pos, pos=tiny(6, 12)), tiny(6, 1).expand(6, 12)),
        "pos",
        "frozen",
    ),
    "not linear": (lambda: Places(lambda m, h: h + torch.tanh(m.pos), pos=tiny(6, 12)), "pos", "changed before"),
    "also a factor": (lambda: Places(lambda m, h: h * (1 + m.pos) + m.pos, pos=tiny(6, 12)), "pos", "in another way"),
    "queries": (Latents, "queries", "in another way"),
    "a bias of units": (lambda: Places(lambda m, h: h + m.pos, pos=tiny(1, 12)), "pos", ""),
    "a bias of places": (lambda: Places(lambda m, h: h + m.bias, bias=torch.zeros(6, 12)), "bias", ""),
    "a gain": (lambda: Places(lambda m, h: h + m.gain * h, gain=tiny(6, 12)), "gain", ""),
    "of scores": (Scores, "near", ""),
    "low rank": (lambda: Places(adapted, up=torch.zeros(12, 2), down=tiny(2, 12)), "up", ""),
}


def frozen(model: nn.Module, values: Tensor | None = None) -> nn.Module:
    model.pos = nn.Parameter(model.pos.detach() if values is None else values, requires_grad=False)
    return model


@pytest.mark.parametrize("case", KEPT)
def test_what_keeps_its_scale_is_told_and_if_it_is_not_heard_nothing_is_proved(case: str) -> None:
    build, name, reason = KEPT[case]
    model = build()
    before = getattr(model, name).detach().clone()
    meta = rows(model)["meta"]
    assert torch.equal(getattr(model, name), before)
    assert name in meta["kept"]
    assert meta["proved"] == (not reason)
    if reason:
        assert f"the parameter {name!r} is added to a signal of" in meta["not proved because"]
        assert reason in meta["not proved because"]


def test_a_recurrent_signal_and_embedded_tokens_are_signals() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 9)
            self.before, self.after = nn.Parameter(tiny(6, 8)), nn.Parameter(tiny(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x) + self.before)[0] + self.after)

    model = Words()
    x = torch.randint(0, 9, (16, 6), generator=torch.Generator().manual_seed(0))
    found = rows(model, "auto", x)
    assert found["before"]["std"] == pytest.approx(SHARE, rel=1e-3)
    with torch.no_grad():
        states = model.rnn(model.embed(x) + model.before)[0]
    assert float(model.after.detach().std(unbiased=False)) == pytest.approx(
        SHARE * float(states.std(unbiased=False)), rel=1e-3
    )


def test_a_start_that_fails_after_the_sum_leaves_the_parameter_as_it_was() -> None:
    def failing(m: Places, h: Tensor) -> Tensor:
        h = h + m.pos
        raise RuntimeError(f"after {h.shape}")

    model = Places(failing, pos=torch.zeros(6, 12))
    with pytest.raises(Exception, match="after"):
        init_(model, "data", X)
    assert not model.pos.any()


class Stream(nn.Module):
    """Words, positions, and two residual branches; what else happens to the stream is `otherwise`."""

    def __init__(self, otherwise: str = "") -> None:
        super().__init__()
        self.otherwise = otherwise
        self.embed, self.places = nn.Embedding(9, 8), nn.Embedding(6, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.up, self.down = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(8, 9)
        self.register_buffer("waves", torch.sin(torch.arange(48.0)).view(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.places(torch.arange(x.shape[1]))
        h = h + self.waves if self.otherwise == "a buffer" else h
        h = torch.tanh(h) if self.otherwise == "an activation" else h
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            h = h + down(functional.gelu(up(h if self.otherwise == "a layer" else norm(h))))
        return self.head(h if self.otherwise == "the head" else self.norms[2](h))


@pytest.mark.parametrize("otherwise", ["", "a buffer", "an activation", "a layer", "the head"])
def test_a_stream_that_norms_alone_read_starts_smaller_and_gives_the_same(otherwise: str) -> None:
    model = Stream(otherwise)
    x = torch.randint(0, 9, (16, 6), generator=torch.Generator().manual_seed(0))
    found = rows(model, "auto", x)
    scale = 1.0 if otherwise else STREAM
    assert found["meta"]["proved"]
    assert found["embed"]["target"] == pytest.approx(scale)
    assert found["places"]["target"] == pytest.approx(SHARE * scale)
    assert found["down.0"]["target"] == pytest.approx(scale * 2**-0.5)
    assert found["up.0"]["target"] == 1
    assert ("norms alone read this stream" in found["down.0"]["why"]) == (not otherwise)
    before = model(x).detach()
    with torch.no_grad():
        for layer in (model.embed, model.places, *model.down):
            layer.weight *= 1 / STREAM
    assert torch.allclose(model(x), before, atol=0.02) == (not otherwise)  # norms add a little to a variance


def test_a_stream_that_begins_with_the_inputs_has_their_scale() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    assert rows(model)["layers.0.linear2"]["target"] == pytest.approx(4**-0.5)

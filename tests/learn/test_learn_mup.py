"""The maximal update parametrisation: the paper's tables, the same training as its other forms, and harmless errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.mup import mup
from steelyard.learn.queries import linear_in
from steelyard.learn.start import init_
from steelyard.learn.task import Batch

M = 4  # widths in multiples of the base
BASE, WIDTH = 16, 64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3 * width), nn.LayerNorm(3 * width), nn.Linear(3 * width, 5)
    )


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, width), kind(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Series(nn.Module):
    """Two recurrent layers right on the inputs: only the matrices of the second one that meet the first are hidden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, width, 2, batch_first=True, bidirectional=True), nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(20, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 20)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.hidden(self.embed(x))))


class Attention(nn.Module):
    """Two heads whose size grows; `packed`: one layer for queries, keys and values; `right`: scores over d."""

    def __init__(self, width: int, packed: bool = False, right: bool = False) -> None:
        super().__init__()
        self.embed, self.packed = nn.Embedding(20, width), packed
        self.scale = math.sqrt(BASE / 2) / (width / 2) if right else None
        if packed:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        parts = self.qkv(x).chunk(3, -1) if self.packed else (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


class Torchs(nn.Module):
    """torch's own attention; `heads` fixed, or of a fixed size."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 20)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width),
        nn.Conv2d(width, 2 * width, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        nn.Flatten(),
        nn.Linear(width * 64, 7),
    )


FACTORIES: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {
    "mlp": (mlp, noise(4, 8)),
    "cnn": (cnn, noise(4, 3, 8, 8)),
    "lstm": (Recurrent, words(4, 6)),
    "gru": (lambda width: Recurrent(width, nn.GRU), words(4, 6)),
    "series": (Series, noise(4, 6, 5)),
    "tied": (Tied, words(4, 6)),
    "attention": (Attention, words(4, 6)),
    "packed attention": (lambda width: Attention(width, packed=True), words(4, 6)),
    "torch's attention": (Torchs, words(4, 6)),
}


def rows(found: sy.Table) -> dict[str, dict]:
    return {row["parameter"]: row for row in found.rows}


def test_the_table_of_the_paper_worked_out_by_hand() -> None:
    found = mup(mlp, WIDTH, base=BASE)
    seen = {
        n: (r["kind"], r["fan in"], r["multiplier"], r["Adam rate"], r["SGD rate"])
        for n, r in rows(found.table).items()
    }
    assert seen == {
        "0.weight": ("input", 8, 1, 1, M),
        "0.bias": ("vector", None, 1, 1, M),
        "2.weight": ("hidden", WIDTH, 1, 1 / M, 1),
        "2.bias": ("vector", None, 1, 1, M),
        "3.weight": ("vector", None, 1, 1, M),
        "3.bias": ("vector", None, 1, 1, M),
        "4.weight": ("output", 3 * WIDTH, 1 / M, 1 / M, 1 / M),
        "4.bias": ("scalar", None, 1, 1, 1),
    }
    wide = mup(mlp, 1024, base=64)  # the standard deviations of He, and over m at the output
    std = {n: r["std"] for n, r in rows(wide.table).items()}
    assert std["0.weight"] == pytest.approx(math.sqrt(2 / 8), rel=0.03)
    assert std["2.weight"] == pytest.approx(math.sqrt(2 / 1024), rel=0.01)
    assert std["4.weight"] == pytest.approx(math.sqrt(2 / (3 * 64)) / 16, rel=0.03)


@pytest.mark.parametrize(
    "scheme", ["xavier", "he(mode='fan_out')", "normal(std=0.02)", "truncated_normal(std=0.1)", "lecun(gain=auto)"]
)
def test_any_scheme_has_its_own_scale_at_the_base_and_the_right_exponent_beyond(scheme: str) -> None:
    def net(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(300, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, 300))

    at_base, wide = (rows(mup(net, width, base=64, init=scheme).table) for width in (64, 512))
    for name, exponent in (("0.weight", 0), ("1.weight", -0.5), ("2.weight", -1)):
        assert wide[name]["std"] / at_base[name]["std"] == pytest.approx(8**exponent, rel=0.03), name


def test_orthogonal_matrices_stay_orthogonal() -> None:
    found = mup(
        lambda width: nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 2)),
        64,
        base=16,
        init="orthogonal",
    )
    weight = found.model[1].weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(64), atol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_at_the_base_width_it_is_the_standard_parametrisation_bit_for_bit(name: str) -> None:
    factory, batch = FACTORIES[name]
    found = mup(factory, 32, base=32, seed=3, batch=batch)
    same = copy.deepcopy(found.model)
    init_(same, "he", seed=3)
    for (n, a), b in zip(found.model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), n
    assert set(found.table.column("Adam rate")) == set(found.table.column("SGD rate")) == {1.0}
    assert found.table.meta["hooks"] == {}


@pytest.mark.parametrize("name", FACTORIES)
def test_one_model_alone_is_seen_as_the_factory_is(name: str) -> None:
    factory, batch = FACTORIES[name]
    torch.manual_seed(0)
    alone, from_factory = mup(factory(WIDTH), base=BASE, batch=batch), mup(factory, WIDTH, base=BASE)
    columns = ("parameter", "kind", "fan in", "Adam rate", "SGD rate")
    assert [[r[c] for c in columns] for r in alone.table.rows] == [
        [r[c] for c in columns] for r in from_factory.table.rows
    ]
    for (n, a), b in zip(alone.model.named_parameters(), from_factory.model.parameters(), strict=True):
        assert torch.allclose(a, b), n


def test_a_hidden_size_equal_to_that_of_the_inputs_is_told_apart() -> None:
    found = mup(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64)), base=16, batch=noise(2, 64)
    )
    assert found.table.column("kind")[::2] == ["input", "hidden", "output"]


def test_kinds_of_everything() -> None:
    kinds = {
        n: r["kind"]
        for name in ("cnn", "lstm", "torch's attention")
        for n, r in rows(mup(FACTORIES[name][0], WIDTH, base=BASE).table).items()
    }
    assert kinds["3.weight"] == "input"  # depthwise: one channel feeds each
    assert kinds["4.weight"] == kinds["6.weight"] == "hidden"
    assert kinds["8.weight"] == "output"
    assert kinds["1.weight"] == kinds["1.bias"] == "vector"
    assert kinds["embed.weight"] == "input"
    assert kinds["rnn.weight_ih_l0"] == kinds["rnn.weight_hh_l1"] == "hidden"
    assert kinds["rnn.bias_ih_l0"] == "vector"
    assert kinds["attention.in_proj_weight"] == kinds["attention.out_proj.weight"] == "hidden"
    assert kinds["attention.in_proj_bias"] == "vector"
    series = rows(mup(lambda width: nn.LSTM(5, width), WIDTH, base=BASE).table)
    assert series["weight_ih_l0"]["kind"] == "input"


def test_an_lstm_keeps_its_forget_gates_and_orthogonal_matrices() -> None:
    model = mup(Recurrent, WIDTH, base=BASE).model
    assert model.rnn.bias_ih_l0.detach().chunk(4)[1].tolist() == [1.0] * WIDTH
    for gate in model.rnn.weight_hh_l0.detach().chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(WIDTH), atol=1e-5)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 4) -> Tensor:
    """The outputs after some steps."""
    target = noise(*model(x).shape, seed=1).double()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model(x).detach()


SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
ADAM = (torch.optim.Adam, {"lr": 0.01, "eps": 1e-30})


@pytest.mark.parametrize(("kind", "options"), [SGD, ADAM], ids=["sgd", "adam"])
def test_training_is_that_of_the_form_with_a_multiplier_before_the_output(kind: type, options: dict) -> None:
    """Table 8: W / m at the output, with rates m for inputs, outputs and vectors under SGD, 1 / m for hidden under Adam."""

    class Divided(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)
            with torch.no_grad():
                self.net[-1].weight.mul_(M)

        def forward(self, x: Tensor) -> Tensor:
            return self.net[-1](self.net[:-1](x) / M)

    found = mup(mlp, WIDTH, base=BASE)
    absorbed, x = found.model.double(), noise(16, 8).double()
    explicit = Divided(absorbed)
    assert torch.allclose(absorbed(x), explicit(x))
    rates = {}
    for name, p in explicit.named_parameters():
        if kind is torch.optim.Adam:
            rates[p] = 1 / M if name == "net.2.weight" else 1
        else:
            rates[p] = 1 if name in ("net.2.weight", "net.4.bias") else M
    by_hand = kind([{"params": [p], "lr": options["lr"] * rate} for p, rate in rates.items()], **options)
    before = absorbed(x).detach()
    results = trained(absorbed, found.optimizer(kind)(**options), x), trained(explicit, by_hand, x)
    assert torch.allclose(*results, rtol=1e-8)
    assert (results[0] - before).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "options"), [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_over_the_square_root_of_d_trains_as_attention_over_d(
    packed: bool, kind: type, options: dict
) -> None:
    x = words(8, 6)
    ours = mup(lambda width: Attention(width, packed), WIDTH, base=BASE, batch=x)
    right = mup(lambda width: Attention(width, packed, right=True), WIDTH, base=BASE, batch=x)
    assert (right.table.meta["hooks"], set(right.table.column("multiplier"))) == ({}, {1.0, 0.25})
    assert ours.table.meta["hooks"] == ({"qkv": "output [0:64] times 0.5"} if packed else {})
    assert rows(ours.table)["qkv.weight" if packed else "query.bias"]["multiplier"] == (1 if packed else 0.5)
    for made in (ours, right):
        made.model.double()
    before = ours.model(x).detach()
    assert torch.allclose(before, right.model(x))
    results = [trained(made.model, made.optimizer(kind)(**options), x) for made in (ours, right)]
    assert torch.allclose(*results, rtol=1e-8)
    assert (results[0] - before).abs().max() > 0.1


def test_attention_that_no_layer_makes_is_said_to_be_left() -> None:
    class Bent(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            q, k, v = (
                f(part(x)).unflatten(-1, (2, -1)).transpose(1, 2)
                for f, part in ((torch.tanh, self.query), (torch.relu, self.key), (torch.relu, self.value))
            )
            return self.head(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    found = mup(Bent, WIDTH, base=BASE, batch=words(2, 3))
    (left,) = found.table.meta["not corrected"]
    assert left.startswith("call 1 of attention: its scores need a factor 0.5")
    assert rows(found.table)["query.weight"]["multiplier"] == 1


def test_torchs_attention_with_heads_that_grow_has_its_scores_over_d() -> None:
    found = mup(Torchs, WIDTH, base=BASE)
    assert found.table.meta["hooks"] == {"attention": "keys times 0.5"}
    assert mup(lambda width: Torchs(width, heads=width // 8), WIDTH, base=BASE).table.meta["hooks"] == {}
    x, layer = noise(2, 5, WIDTH), found.model.attention
    layer.in_proj_bias.data.normal_()
    q, k, v = functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    scale = math.sqrt(BASE / 2) / (WIDTH / 2)
    mixed = functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    for options in ({}, {"key": x}):
        given = (x,) if options else (x, x)
        assert torch.allclose(layer(*given, value=x, **options)[0], layer.out_proj(mixed), atol=1e-6)


def test_a_tied_output_is_divided_by_a_hook_that_is_there_once_and_copied() -> None:
    found = mup(Tied, WIDTH, base=BASE)
    assert found.table.meta["hooks"] == {"head": "input times 0.25"}
    assert found.model.head.weight is found.model.embed.weight
    assert rows(found.table)["embed.weight"]["Adam rate"] == 1
    assert rows(found.table)["embed.weight"]["std"] == pytest.approx(math.sqrt(2 / BASE), rel=0.05)  # as at the base
    x = noise(3, WIDTH)
    wanted = functional.linear(x / M, found.model.embed.weight, found.model.head.bias)
    assert torch.allclose(found.model.head(x), wanted)
    assert torch.allclose(copy.deepcopy(found.model).head(x), wanted)
    again = mup(found.model, base=BASE, batch=words(2, 3), init=None)
    assert torch.allclose(again.model.head(x), wanted)
    optimizer = again.optimizer("sgd")(again.model.parameters(), lr=1.0)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(set(map(id, again.model.parameters())))


def test_groups_keep_the_options_of_the_user() -> None:
    found = mup(mlp, WIDTH, base=BASE)
    model = found.model
    model[0].bias.requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        {"params": others, "weight_decay": 0.0, "lr": 0.5},
    ]
    made = found.optimizer(torch.optim.AdamW)(groups, lr=0.01)
    rate = {id(p): group for group in made.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in made.param_groups) == len(decayed) + len(others)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in rate
            continue
        factor = rows(found.table)[name]["Adam rate"]
        group = rate[id(p)]
        assert group["lr"] == pytest.approx(factor * (0.01 if p.ndim > 1 else 0.5))
        assert group["weight_decay"] * group["lr"] == pytest.approx(0.1 * 0.01 if p.ndim > 1 else 0)
        assert group["betas"] == ((0.8, 0.9) if p.ndim > 1 else (0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert schedule.get_last_lr()[0] == pytest.approx(0.005)
    named = found.optimizer("sgd")(model.named_parameters(), lr=0.1)
    assert {g["momentum"] for g in named.param_groups} == {0.9}
    assert {round(g["lr"], 9) for g in named.param_groups} == {0.1, 0.4, 0.025}
    with pytest.raises(ModelError, match="twice"):
        found.optimizer("adam")([decayed[0], decayed[0]], lr=0.1)
    with pytest.raises(ModelError, match="none of the model's"):
        found.optimizer("adam")(nn.Linear(2, 2).parameters(), lr=0.1)


def test_optimizers_that_are_not_torchs_need_a_rule() -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, params: object, lr: float) -> None:
            super().__init__(params, {"lr": lr})

    found = mup(mlp, WIDTH, base=BASE)
    with pytest.raises(ModelError, match="rule='sgd'"):
        found.optimizer(Mine)
    made = found.optimizer(Mine, rule="sgd")(lr=1.0)
    assert {g["lr"] for g in made.param_groups} == {4.0, 1.0, 0.25}
    with pytest.raises(UnknownNameError, match="there is no rule 'rms'"):
        found.optimizer(Mine, rule="rms")
    with pytest.raises(UnknownNameError, match="did you mean 'adam'"):
        found.optimizer("adan")


def test_training_takes_it_as_an_optimizer() -> None:
    task = sy.task("digits")
    found = mup(lambda width: sy.model("mlp", task.interface, widths=(width, width)), 128, base=64)
    run = sy.train(task, found.model, optimizer=found.optimizer("adamw"), rate=3e-3, epochs=4, progress=False)
    assert run.history().column("accuracy")[-1] > 0.8
    assert (
        len({round(group["lr"] / run.optimizer.param_groups[0]["lr"], 6) for group in run.optimizer.param_groups}) == 2
    )


def test_own_values_get_the_scale_that_they_have_at_the_base() -> None:
    def net(width: int) -> nn.Module:  # GPT-2's way: the same scale at every width
        model = nn.Sequential(
            nn.Linear(200, width), nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 200)
        )
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        nn.init.constant_(model[0].bias, 0.3)
        return model

    std = {n: r["std"] for n, r in rows(mup(net, 512, base=64, init="own").table).items()}
    assert std["0.weight"] == pytest.approx(0.02, rel=0.03)
    assert std["2.weight"] == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert std["3.weight"] == pytest.approx(0.02 / 8, rel=0.03)
    model = mup(net, 512, base=64, init="own").model
    assert torch.allclose(model[0].bias, torch.tensor(0.3))
    assert torch.equal(model[1].weight, torch.ones(512))
    same = mup(net, 64, base=64, init="own", seed=5).model
    with torch.random.fork_rng():
        again = mup(net, 64, base=64, init=None, seed=5).model
    assert all(map(torch.equal, same.parameters(), again.parameters()))


def test_what_shapes_cannot_tell_can_be_said() -> None:
    class Free(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, width), nn.Parameter(torch.ones(width, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.last

    assert rows(mup(Free, WIDTH, base=BASE).table)["last"]["kind"] == "vector"
    told = mup(Free, WIDTH, base=BASE, kinds={"la*": "output"}, multipliers={"first.*": 2.0})
    found = rows(told.table)
    assert (found["last"]["Adam rate"], found["last"]["SGD rate"]) == (1 / M, 1 / M)
    assert torch.allclose(told.model.last, torch.tensor(1 / M))
    assert (found["first.bias"]["Adam rate"], found["first.bias"]["SGD rate"]) == (2, 4 * M)
    assert found["first.weight"]["std"] == pytest.approx(2 * math.sqrt(2 / 4), rel=0.1)


def test_an_output_can_start_at_zero() -> None:
    model = mup(mlp, WIDTH, base=BASE, zero_output=True).model
    assert not model[4].weight.any()
    assert model[2].weight.any()


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("model", "options", "error", "says"),
    [
        (mlp, {}, RecipeError, r"needs a width"),
        (mlp, {"width": 0}, RecipeError, r"width=0: expected a positive whole number"),
        (mlp, {"width": 64, "base": 1.5}, RecipeError, r"base=1.5: expected"),
        (lambda width: mlp(8), {"width": 64}, ModelError, r"nothing grows with width"),
        (lambda width: "net", {"width": 64}, ModelError, r"gives a str for the width 64, expected a torch.nn.Module"),
        (lambda width: 1 / 0, {"width": 64}, ModelError, r"the factory, called with the width 64, fails.*ZeroDivision"),
        (
            lambda w: nn.Sequential(*(nn.Linear(w, w) for _ in range(w // 16))),
            {"width": 64},
            ModelError,
            r"never depth",
        ),
        (lambda w: nn.Conv1d(w, w, w), {"width": 64}, ModelError, r"axis 2 of 'weight' grows with width.*kernel"),
        (lambda w: nn.Linear(w, 2 if w < 200 else 3), {"width": 256}, ModelError, r"'weight' is 2 at two widths and 3"),
        (mlp, {"width": 64, "kinds": {"7.*": "input"}}, RecipeError, r"'7\.\*' fits no parameter"),
        (mlp, {"width": 64, "kinds": {"0.*": "inputs"}}, UnknownNameError, r"no kind 'inputs'; did you mean 'input'"),
        (mlp, {"width": 64, "kinds": {"0.bias": "hidden"}}, RecipeError, r"'0.bias' cannot be 'hidden'"),
        (mlp, {"width": 64, "init": "hee"}, UnknownNameError, r"did you mean 'he'"),
        (mlp(64), {}, RecipeError, r"seen on a batch"),
        (mlp(64), {"batch": noise(2, 8), "init": "own"}, RecipeError, r"init='own' compares"),
        (mlp(64), {"batch": noise(2, 9)}, ModelError, r"Sequential, called with the batch, fails"),
        (nn.Linear(8, 2), {"batch": noise(2, 8)}, ModelError, r"no hidden layer"),
        (mlp(64).to("meta"), {"batch": noise(2, 8)}, ModelError, r"on the meta device"),
        (Fails(), {"batch": noise(2, 4)}, ModelError, r"ValueError: no"),
    ],
)
def test_errors_are_one_line_and_harmless(model: object, options: dict, error: type, says: str) -> None:
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=says) as caught:
        mup(model, **{"base": BASE, **options})
    assert "\n" not in str(caught.value)
    if isinstance(model, nn.Module) and not next(model.parameters()).is_meta:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_call_attention_more_often_when_they_are_wider_are_refused() -> None:
    class More(Attention):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.out.in_features // 32):
                super().forward(x)
            return super().forward(x)

    with pytest.raises(ModelError, match="called 1 times at the base width and 3 times"):
        mup(More, WIDTH, base=BASE, batch=words(2, 3))


def test_what_is_frozen_keeps_its_values() -> None:
    model = mlp(64)
    model[4].requires_grad_(False)
    before = model[4].weight.clone()
    mup(model, base=BASE, batch=Batch(noise(2, 8), torch.zeros(2)))
    assert torch.equal(model[4].weight, before)
    assert not model[4].weight.requires_grad


def test_what_queries_are_linear_in() -> None:
    layer, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    x, turned = noise(2, 4), noise(4)
    assert {id(p) for p in linear_in(norm(layer(x)))} == {id(norm.weight), id(norm.bias)}
    rotated = layer(x) * turned + torch.cat((-layer(x)[:, 2:], layer(x)[:, :2]), 1) * turned
    assert {id(p) for p in linear_in(rotated)} == {id(layer.weight), id(layer.bias)}
    assert linear_in(nn.PReLU()(layer(x))) == linear_in(layer(x) * layer(x)) == linear_in(layer(x) + x) == []

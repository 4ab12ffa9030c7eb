"""Faults planted in a training are named with the right layer; a healthy one is silent; looks measure what they say."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import steelyard as sy
from steelyard.learn.watch import faults as rules
from steelyard.learn.watch.looks import Noise, spread
from steelyard.learn.watch.taps import Layer


def mlp(depth=3, width=16, act=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    layers = [module for i in range(depth) for module in (nn.Linear(8 if i == 0 else width, width), act())]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def batches(steps, size=16, seed=3):
    """Four blobs in eight dimensions."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=random)
    for _ in range(steps):
        y = torch.randint(4, (size,), generator=random)
        yield centres[y] + torch.randn(size, 8, generator=random), y


class Attention(nn.Module):
    def __init__(self, width=16, vocabulary=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        mixed = functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        return self.head(x + mixed)


def words(steps, known=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.stack([torch.randperm(known, generator=random)[:9] for _ in range(8)])
        yield x[:, :-1], x[:, 1:]


def train(model, optimizer=None, steps=20, data=None, event=None, **options):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=2e-3)
    with sy.watch(model, optimizer, **options) as log:
        for step, (x, y) in enumerate(data or batches(steps)):
            if event:
                event(step)
            optimizer.zero_grad()
            x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
            loss = functional.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
    return log


def named(log):
    return [(row["fault"], row["where"]) for row in log.table("faults").rows]


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_a_healthy_training_is_silent(act):
    assert named(train(mlp(act=act), steps=200)) == []


def test_a_healthy_transformer_is_silent_although_its_layers_start_as_copies():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Embedding(12, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 12))
    assert named(train(model, data=words(40))) == []


def test_dead_relus():
    model = mlp()
    with torch.no_grad():
        model[2].bias[:12] = -100
    told = []
    log = train(model, tell=told.append)
    (row,) = log.table("faults").rows
    assert (row["fault"], row["where"], row["step"], row["severity"]) == ("dead ReLU", "2", 2, "warning")
    assert row["evidence"].startswith("12 of 16 units are zero") or row["evidence"].startswith("13 of 16")
    assert str(told[0]).startswith("step 2: dead ReLU in 2: 1")
    assert str(told[0]).endswith(f"3 batches; {row['remedy']}")
    layers = [r for r in log.table("layers").rows if r["layer"] == "2"]
    assert layers[0]["dead"] >= 12 / 16
    assert {r["step"] for r in layers} == {0, 1, 2, 4, 8, 16}


@pytest.mark.parametrize(("scale", "word"), [(0.02, "vanishing"), (50.0, "exploding")])
def test_signals_that_vanish_or_explode(scale, word):
    model = mlp(6)
    with torch.no_grad():
        for layer in model[2:-1:2]:
            layer.weight *= scale
    found = named(train(model, torch.optim.SGD(model.parameters(), lr=1e-12), steps=4))
    assert found[0][0].startswith(word)
    assert found[0][1] in ("0", "2", "4")


@pytest.mark.parametrize("how", ["optimizer", "detached", "rate"])
def test_frozen_layers(how):
    model = mlp()
    groups = [{"params": list(model[i].parameters())} for i in (0, 2, 4, 6)]
    if how == "optimizer":
        del groups[1]
    if how == "rate":
        groups[1]["lr"] = 0.0
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    if how == "detached":
        model[2].register_forward_hook(lambda m, a, out: functional.linear(a[0], m.weight.detach(), m.bias.detach()))
    (row,) = train(model, optimizer).table("faults").rows
    assert (row["fault"], row["where"], row["severity"]) == ("frozen", "2", "error")
    because = {"optimizer": "does not hold it", "detached": "no gradient", "rate": "rate of its group is zero"}[how]
    assert because in row["evidence"]
    assert row["remedy"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-5),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    ],
)
def test_a_layer_that_its_decay_alone_moves_is_frozen(make):
    model = mlp()
    for p in model[2].parameters():
        p.register_hook(lambda g: g * 0)
    (row,) = train(model, make(model.parameters()), steps=30).table("faults").rows
    assert (row["fault"], row["where"], row["step"]) == ("frozen", "2", 9)
    assert "its decay alone in 10 steps, others have learned: its gradient is zero" in row["evidence"]


def test_what_gets_a_gradient_now_and_then_is_not_frozen():
    model = mlp()
    for p in model[2].parameters():
        p.register_hook(lambda g, count=[0]: g * (count.append(0) or len(count) % 4 == 0))
    assert named(train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), steps=60)) == []


def test_a_layer_that_is_frozen_on_purpose_is_no_fault():
    model = mlp()
    model[2].requires_grad_(False)
    assert named(train(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3))) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_with_its_first_layer(value):
    model = mlp()
    model.insert(2, nn.BatchNorm1d(16))
    model.append(nn.Dropout(0.0))

    def event(step):
        if step == 7:
            with torch.no_grad():
                model[3].weight[1, 2] = value

    state = []
    log = train(model, event=event, tell=lambda fault: state.append(model[2].num_batches_tracked.item()))
    (row,) = log.table("faults").rows
    assert (row["fault"], row["where"], row["step"]) == ("NaN", "3", 7)
    assert row["evidence"] == "its weight holds numbers that are not finite"
    assert state == [8]  # running the model again left its statistics alone


def test_nan_of_inputs_of_a_loss_and_of_a_function_on_the_way_back():
    data = list(batches(5))
    data[3][0][0, 0] = math.nan
    assert named(train(mlp(), data=data)) == [("NaN", "inputs")]

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.gain * torch.sqrt(x * 0)

    model = mlp()
    model.insert(3, Root())  # its own gradient is finite: it breaks those before it
    model.insert(4, nn.Dropout(0.1, inplace=True))
    log = train(model, steps=2)
    assert named(log) == [("NaN", "3")]
    assert "on the way back" in log.table("faults").rows[0]["evidence"]

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(torch.sqrt(self.first(x) * 0))  # a function of no layer

    assert named(train(Between(), steps=2)) == [("NaN", "first")]

    class Lost(Between):
        def forward(self, x):
            return self.second(torch.log(-1 - self.first(x).square()))

    (row,) = train(Lost(), steps=2).table("faults").rows
    assert (row["fault"], row["where"]) == ("NaN", "first")
    assert "its outputs are finite, and what second is given, which runs next, is not" in row["evidence"]

    class Early(Between):
        def forward(self, x):
            return self.second(self.first(torch.log(-1 - x.square())))

    (row,) = train(Early(), steps=2).table("faults").rows
    assert (row["fault"], row["where"]) == ("NaN", "first")
    assert "what the model does before it made them so" in row["evidence"]

    model = nn.Sequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sy.watch(model, optimizer) as log:
        (model(torch.ones(1, 8)).sum() * math.inf).backward()
        optimizer.step()
    assert named(log) == [("NaN", "loss")]


def test_a_step_that_overflows():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[2].weight.grad *= 10
    with sy.watch(model, optimizer) as log:
        optimizer.step()
    assert named(log) == [("rate too high", "model"), ("NaN", "2")]
    assert "from a finite gradient" in log.table("faults").rows[1]["evidence"]


@pytest.mark.parametrize(("rate", "word"), [(0.3, "rate too high"), (2e-5, "rate too low")])
def test_rates_that_are_far_off(rate, word, monkeypatch):
    model = mlp()
    found = named(train(model, torch.optim.Adam(model.parameters(), lr=rate), steps=160))
    assert (word, "model") in found


def test_a_rate_is_too_low_while_the_loss_falls_although_gradients_are_all_noise():
    for falls, expected in ((True, ["rate too low"]), (False, [])):  # a training that is at its end goes nowhere
        faults = rules.Faults(["a.weight"], ["a"], np.array([True]))
        random, one = np.random.default_rng(0), np.ones(1)
        faults.agreed(32, -0.1, 1.0)
        for step in range(160):
            faults.noted(2.0 - 0.001 * step * falls + 0.05 * random.normal())
            list(faults.stepped(step, 1e-4, one, 2e-4 * one, one > 0, [""]))
        assert [f.fault for f in faults.found] == expected


def test_a_rate_that_is_warming_up_is_not_too_low():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)

    def event(step):
        optimizer.param_groups[0]["lr"] = 2e-5 * min(step + 1, 100) / 100

    assert named(train(model, optimizer, steps=200, event=event)) == []


def test_shuffled_labels():
    random = torch.Generator().manual_seed(9)
    data = [(x, y[torch.randperm(len(y), generator=random)]) for x, y in batches(160)]
    model = mlp()
    with torch.no_grad():
        model[-1].weight *= 0.1
    assert named(train(model, data=data)) == [("loss as of shuffled labels", "model")]


def regression(pairs, steps=160, start=None, rate=2e-3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with sy.watch(model, optimizer) as log:
        for _, (x, y) in zip(range(steps), pairs, strict=False):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
    return log, model


def test_shuffled_targets_of_a_regression_and_one_that_has_converged():
    random = torch.Generator().manual_seed(9)
    mean = torch.randn(8, generator=random)
    pairs = []
    for _ in range(500):
        x = torch.randn(16, 8, generator=random)
        pairs.append((x, (x @ mean).unsqueeze(1) + 0.3 * torch.randn(16, 1, generator=random)))
    shuffled = [(x, y[torch.randperm(16, generator=random)]) for x, y in pairs]
    log, _ = regression(shuffled)
    assert named(log) == [("loss as of shuffled labels", "model")]
    assert "the outputs vary by" in log.table("faults").rows[0]["evidence"]
    log, model = regression(pairs, steps=500, rate=1e-2)
    assert named(log) == []
    log, _ = regression(pairs, start=model.state_dict(), rate=1e-2)  # the loss does not fall any more
    losses = log.table("notes").column("value")
    assert sum(losses[-25:]) > 0.9 * sum(losses[:25])
    assert named(log) == []


def test_units_are_dead_at_several_looks_and_not_by_half():
    layers = [Layer("a", "Linear", dead=frozenset(dead), units=10) for dead in
              (range(7), range(3, 10), range(7), range(7), range(7), range(1, 7))]  # fmt: skip
    faults = rules.Faults(["a.weight"], ["a"], np.array([True]))
    told = [bool(list(faults.looked(step, [layer]))) for step, layer in enumerate(layers)]
    assert told == [
        False,
        False,
        False,
        False,
        True,
        False,
    ]  # four are dead at the first three looks, seven at three more
    assert faults.found[0].evidence.startswith("7 of 10 units")


def test_updates_lost_in_bfloat16():
    model = mlp().to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    found = named(train(model, optimizer))
    assert {("lost updates", name) for name in "0246"} <= set(found)
    assert {fault for fault, _ in found} <= {"lost updates", "frozen"}
    quick = mlp().to(torch.bfloat16)
    assert named(train(quick, torch.optim.Adam(quick.parameters(), lr=1e-2))) == []


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_ties_that_break(when):
    torch.manual_seed(0)
    model = Attention()
    model.head.weight = model.embed.weight

    def untie():
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())

    if when == "at the start":
        untie()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    log = train_words(model, optimizer, event=lambda step: untie() if step == 3 and when == "later" else None)
    assert named(log) == [("untied", "head")]


def train_words(model, optimizer, steps=20, event=None, known=12):
    with sy.watch(model, optimizer) as log:
        for step, (x, y) in enumerate(words(steps, known)):
            if event:
                event(step)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
    return log


def test_attention_at_a_single_key():
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.query.weight *= 100
        model.key.weight *= 100
    (row,) = train_words(model, torch.optim.Adam(model.parameters(), lr=2e-3)).table("faults").rows
    assert row["fault"] == "saturated softmax"
    assert row["where"] in ("query", "key")


def test_attention_of_torch_at_a_single_key():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = Model()
    with torch.no_grad():
        model.attention.in_proj_weight[:32] *= 100
    log = train_words(model, torch.optim.Adam(model.parameters(), lr=2e-3))
    assert ("saturated softmax", "attention") in named(log)


def test_statistics_that_drift():
    model = mlp()
    model.insert(2, nn.BatchNorm1d(16, momentum=0.0))
    model[2].running_mean += 5
    log = train(model, steps=101, every=20)
    assert named(log) == [("batch-norm drift", "2")]
    rows = [r for r in log.table("layers").rows if r["layer"] == "2"]
    assert {r["drift"] is not None for r in rows} == {True}
    assert {r["verdict"] for r in rows if r["drift"] >= 0.5 and r["step"] >= 32} == {"batch-norm drift"}
    assert {r["verdict"] for r in rows if r["drift"] < 0.5 or r["step"] < 32} <= {"healthy"}
    fine = mlp()
    fine.insert(2, nn.BatchNorm1d(16))
    assert named(train(fine, steps=101, every=20)) == []


def test_rows_that_are_never_looked_up():
    torch.manual_seed(0)
    model = Attention(vocabulary=12)
    log = train_words(model, torch.optim.Adam(model.parameters(), lr=2e-3), known=9)
    (row,) = log.table("faults").rows
    assert (row["fault"], row["where"]) == ("dead embedding rows", "embed")
    assert "3 of 12 rows were never looked up" in row["evidence"]
    assert row["evidence"].endswith("9, 10, 11")


def test_rare_rows_are_no_fault():
    faults = rules.Faults(["a.weight"], ["a"], np.array([True]))
    assert not faults.unseen(9, "a", range(7), 75, 5000)
    assert faults.unseen(9, "a", range(8), 75, 5000)


def test_other_faults_beside_do_not_hide_shuffled_labels():
    random = torch.Generator().manual_seed(9)
    data = [
        (x, y.flatten()[torch.randperm(y.numel(), generator=random)].view(y.shape)) for x, y in words(160, known=10)
    ]
    torch.manual_seed(0)
    model = Attention(vocabulary=12)
    log = train(model, data=data)
    assert [fault for fault, _ in named(log)] == ["dead embedding rows", "loss as of shuffled labels"]


def test_every_fault_has_a_remedy():
    assert {word for word, remedy in rules.REMEDIES.items() if not remedy} == {"frozen"}
    for why in (rules.NOT_HELD, rules.NO_GRADIENT, rules.ZERO_GRADIENT, rules.ZERO_RATE, rules.TOO_SMALL):
        assert rules._cure(why)


def test_the_spread_of_values():
    x = torch.arange(100_001.0)
    lowest, *middle, highest, zeros, broken = spread(x)
    assert (lowest, highest, broken) == (0, 100_000, 0)
    assert zeros == pytest.approx(0, abs=1e-3)
    assert middle == pytest.approx([1000, 25_000, 50_000, 75_000, 99_000], abs=10)
    assert spread(torch.full((3,), math.nan)) == (*(None,) * 8, 1.0)
    assert spread(torch.empty(0)) == (None,) * 9
    log = train(mlp(), steps=3)
    rows = [r for r in log.table("values").rows if (r["step"], r["tensor"]) == (0, "0.weight")]
    assert [r["what"] for r in rows] == ["weight", "gradient"]
    assert rows[0]["min"] < rows[0]["median"] < rows[0]["max"]


def test_the_noise_scale_is_that_of_gaussian_gradients():
    random = torch.Generator().manual_seed(0)
    mean, examples, noise = torch.full((50,), 0.2), 10, Noise(keep=0.999)
    deviations = torch.full((50,), 2.0)
    for _ in range(3000):
        pair = [mean + deviations * torch.randn(50, generator=random) / math.sqrt(examples) for _ in range(2)]
        noise.first({"w": pair[0]})
        scale = noise.second({"w": pair[1]}, examples)[2]
    assert scale == pytest.approx(50 * 4 / (50 * 0.04), rel=0.2)


def test_noise_counts_the_examples_of_all_forward_passes_of_a_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sy.watch(model, optimizer) as log:
        for _ in range(2):
            for x, y in batches(3, size=5):
                functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                model(torch.ones(7, 8))
            optimizer.step()
    (row,) = log.table("noise").rows
    assert (row["step"], row["examples"]) == (1, 15)
    assert row["variance"] is not None


def test_looks_change_nothing():
    def run(watched):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))
        net.extend([nn.Flatten(), nn.Linear(64, 16), nn.Unflatten(1, (2, 8))])
        net.append(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True))
        net.extend([nn.Flatten(), nn.Linear(16, 4)])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses = []

        def loop():
            for x, y in batches(12, size=6):
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(x.repeat(1, 5)[:, :36].reshape(-1, 1, 6, 6)), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())

        if watched:
            with sy.watch(net, optimizer, every=1) as log:
                loop()
            assert {r["kind"] for r in log.table("layers").rows} >= {"Conv2d", "BatchNorm2d", "MultiheadAttention"}
        else:
            loop()
        return losses, list(net.state_dict().values())

    (plain, weights), (observed, others) = run(False), run(True)
    assert plain == observed
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_model_that_fails_while_it_is_looked_at_leaves_nothing_behind():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sy.watch(model, optimizer):
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 3))
        assert torch.overrides._get_current_function_mode() is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks

"""The alarm: each cause is found at the layer that has it, and what is healthy, or meant to be so, is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from steelyard.errors import ModelError, TrainingWarning
from steelyard.learn import gauges
from steelyard.learn.alarm import Alarm, Found
from steelyard.learn.run import Run, train
from steelyard.learn.tasks import task

STEPS = 20


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def mlp(depth: int = 4, gain: float = 2**0.5, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Layers of 64 units called 0, 2, 4, ..., the last of them the head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=gain / 8)
        nn.init.zeros_(layer.bias)
        layers += [layer, act()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 64, generator=random)
    for _ in range(STEPS + 2):
        y = torch.randint(10, (32,), generator=random)
        yield centres[y] + torch.randn(32, 64, generator=random), y


def alarms(
    net: nn.Module,
    rate: float = 0.01,
    kind: type[torch.optim.Optimizer] = torch.optim.SGD,
    trained: Callable[[nn.Module], list[nn.Parameter]] = lambda net: list(net.parameters()),
    cast: torch.dtype = torch.float32,
) -> list[Found]:
    """What an alarm finds in the first steps of an ordinary loop."""
    optimizer = kind(trained(net), lr=rate)
    found: list[Found] = []
    alarm = Alarm(net, optimizer, say=found.append)
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(net(x.to(cast)).float(), y).backward()
        optimizer.step()
    assert alarm.found == found
    assert not alarm._handles
    return found


def first(found: list[Found]) -> tuple[str, str]:
    return found[0].verdict, found[0].layer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("depth", [10, 30])
def test_default_starts_of_deep_nets_are_found_and_he_is_not(kind: type[torch.optim.Optimizer], depth: int) -> None:
    default = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 10))
    found = alarms(default, 1e-3, kind)
    assert found[0].verdict == "vanishing signal"
    assert found[0].step <= 3
    assert alarms(mlp(depth), 1e-3, kind) == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("act", "depth"), [(nn.Tanh, 10), (nn.Tanh, 30), (nn.SELU, 30), (nn.GELU, 10), (nn.Sigmoid, 10)]
)
def test_default_starts_with_other_activations(
    act: type[nn.Module], depth: int, kind: type[torch.optim.Optimizer]
) -> None:
    """Of 10 layers of tanh signal and gradient are 200 times smaller each: neither is lost, but both together are."""
    net = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(64, 64), act())), nn.Linear(64, 10))
    found = alarms(net, 0.001, kind)
    assert found[0].step <= STEPS
    assert found[0].verdict in ("vanishing signal", "vanishing gradient")


@pytest.mark.parametrize(("act", "depth"), [(nn.Tanh, 4), (nn.SELU, 10), (nn.ReLU, 3)])
def test_default_starts_that_train_raise_no_alarm(act: type[nn.Module], depth: int) -> None:
    net = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(64, 64), act())), nn.Linear(64, 10))
    assert not alarms(net, 0.001, torch.optim.Adam)


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.3, "vanishing signal"), (8.0, "exploding signal"), (1e9, "not finite")]
)
def test_the_scale_of_the_signal(gain: float, verdict: str) -> None:
    found = alarms(mlp(8, gain), 1e-12)
    assert found[0].verdict == verdict
    assert found[0].step <= 3


def test_the_layer_to_blame_is_the_one_that_shrinks() -> None:
    net = mlp(6)
    with torch.no_grad():
        net[4].weight.mul_(1e-5)
    assert first(alarms(net, 1e-6)) == ("vanishing signal", "4")
    assert alarms(net, 0.01) == []  # its own steps open it at once


def test_a_gradient_that_vanishes_while_the_signal_does_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            x = torch.relu(self.two(x.detach() + (x - x.detach()) * 1e-6))
            return self.three(x)

    assert first(alarms(Net())) == ("vanishing gradient", "one")


def test_a_rate_that_is_too_high_is_an_explosion_or_the_end_of_the_numbers() -> None:
    assert alarms(mlp(4), 1e4)[0].verdict in ("exploding signal", "not finite")


def test_weights_that_are_not_finite() -> None:
    net = mlp(4)
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    found = alarms(net)
    assert (found[0].step, *first(found)) == (1, "not finite", "2")


def test_a_dead_layer() -> None:
    net = mlp(4)
    nn.init.constant_(net[2].bias, -100.0)
    assert first(alarms(net)) == ("dead", "2")


@pytest.mark.parametrize("value", [0.0, 0.05])
def test_units_that_are_one_unit(value: float) -> None:
    net = mlp(3, act=nn.Tanh)
    for layer in net[::2]:
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
    assert first(alarms(net, 0.1)) == ("symmetric", "0")


def test_a_layer_that_the_optimizer_was_not_given() -> None:
    found = alarms(mlp(4), trained=lambda net: [*net[0].parameters(), *net[6:].parameters()])
    assert first(found) == ("frozen", "2")
    assert "give them to the optimizer" in str(found[0])


def test_layers_before_a_detach() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(2), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).detach())

    assert first(alarms(Net(), 0.1)) == ("frozen", "body.0")


def test_steps_that_are_too_small_for_the_number_format() -> None:
    """To bfloat16 weights of 1, steps of a thousandth are nothing; those of the head are smaller and move."""
    net = mlp(1)
    with torch.no_grad():
        net[0].weight.sign_()
    found = alarms(net.bfloat16(), 1e-3, torch.optim.Adam, cast=torch.bfloat16)
    assert first(found) == ("frozen", "0")


class Block(nn.Module):
    """A residual block whose branch is shut at the start in one of the ways that are in use."""

    def __init__(self, shut: str):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.full((64,), {"ReZero": 0.0, "LayerScale": 1e-6}.get(shut, 1.0)))
        if shut == "Fixup":
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("head", [1.0, 0.0])
@pytest.mark.parametrize("shut", ["open", "Fixup", "ReZero", "LayerScale"])
def test_what_starts_shut_on_purpose_raises_no_alarm(shut: str, head: float, kind: type[torch.optim.Optimizer]) -> None:
    net = nn.Sequential(nn.Linear(64, 64), *[Block(shut) for _ in range(6)], nn.Linear(64, 10))
    with torch.no_grad():
        net[-1].weight.mul_(head)
        net[-1].bias.mul_(head)
    assert alarms(net, 1e-3, kind) == []


def test_what_is_frozen_or_unused_on_purpose_raises_no_alarm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.body, self.head = nn.Linear(64, 64), mlp(2), nn.Linear(10, 10)
            self.teacher, self.unused, self.pooler = nn.Linear(64, 10), nn.Linear(3, 3), nn.Linear(10, 10)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.teacher(x)
            x = self.body(self.frozen(x))
            self.pooler(x)
            return self.head(x)

    assert alarms(Net()) == []


def test_a_way_on_which_nothing_is_lost_is_enough() -> None:
    """Small queries and keys beside values: their gradients are small by nature."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            for layer in (self.q, self.k):
                nn.init.normal_(layer.weight, std=1e-3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.unflatten(1, (8, 8))
            return self.head(functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))

    assert alarms(Net(), 1e-4) == []


def test_a_cell_learns_from_its_late_calls() -> None:
    """The gradient fades on its way back through time, and the weights are those of all times."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(64, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for _ in range(30):
                state = self.cell(x, state)
            return self.head(state[0])

    assert alarms(Net()) == []


def test_a_normalisation_makes_up_for_any_scale_of_the_inputs() -> None:
    for size in (1e-6, 1e6):
        net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64, eps=1e-30), *mlp(3))
        with torch.no_grad():
            net[0].weight.mul_(size)
        assert alarms(net, 1e-15) == []  # the steps would bring a small one back at once


def test_a_gate_whose_units_are_all_dead_is_no_loss() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
            self.squeeze, self.excite = nn.Linear(64, 4), nn.Linear(4, 64)
            nn.init.constant_(self.squeeze.bias, -100.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x)))))

    assert alarms(Net()) == []


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_a_group_with_rate_zero_is_at_rest(cast: torch.dtype) -> None:
    net = mlp(4).to(cast)
    groups = [{"params": net[:4].parameters(), "lr": 0.0}, {"params": net[4:].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    alarm = Alarm(net, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(net(x.to(cast)).float(), y).backward()
        optimizer.step()
    assert alarm.found == []


def test_only_passes_of_training_count() -> None:
    """Not evaluation, not the second pass of a checkpoint, not a pass whose step is left out."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(3), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    alarm = Alarm(net, optimizer)
    for x, y in batches():
        for factor in (float("inf"), 1.0, 1.0):  # a step left out for its overflow, and two that accumulate
            optimizer.zero_grad()
            (functional.cross_entropy(net(x), y) * factor).backward()
        seen = len(alarm._passage.calls)
        with torch.no_grad():
            net(torch.zeros_like(x))
        assert len(alarm._passage.calls) == seen
        optimizer.step()
    assert alarm.found == []


def test_weights_that_are_computed_are_not_computed_once_more() -> None:
    """A look at a spectral norm would move its iteration."""
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = mlp(2)
        spectral_norm(net[2])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        alarm = Alarm(net, optimizer) if watched else None
        for x, y in batches():
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert alarm is None or not alarm.found
        states.append(net.state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "transformer"])
def test_built_in_models_raise_no_alarm_and_train_to_the_same_bits(name: str) -> None:
    data = task("digits", model=name)
    plain = train(data, epochs=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(data, epochs=2)
        alarm = Alarm(run.model, run.optimizer)
        for _ in run:
            pass
    assert alarm.found == []
    assert alarm.step == STEPS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert [row["loss"] for row in run.log] == [row["loss"] for row in plain.log]
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True))


def test_the_alarm_is_a_warning_in_one_line() -> None:
    net = mlp(8, 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as said, Alarm(net, optimizer) as alarm:
        warnings.simplefilter("always")
        for x, y in batches():
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert [w.category for w in said] == [TrainingWarning]
    assert len(said) == len(alarm.found) == 1
    text = str(said[0].message)
    assert text.startswith(f"step 1: vanishing signal, first at the layer {alarm.found[0].layer!r}: each layer shrinks")
    assert "; start with He" in text
    assert "\n" not in text


def test_the_gauge() -> None:
    data = task("digits", model="mlp")
    found: list[Found] = []
    run = train(data, mlp_of_digits(0.0), epochs=1, gauges=[gauges.alarm(say=found.append)], progress=False)
    assert [f.verdict for f in found] == ["symmetric"]
    assert [row["alarms"] for row in run.log] == [0, 0] + [1] * (len(run.log) - 2)
    assert found[0].step == 3


def mlp_of_digits(value: float) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), *mlp(2))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, value)
    return net


def test_passes_that_nobody_goes_back_through_are_let_go() -> None:
    """Evaluation with gradients on, as it happens: its graphs are not held."""
    net = mlp(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with Alarm(net, optimizer) as alarm:
        for x, _ in batches():
            net(x)
        assert alarm._passage.calls
        assert not alarm._passage._ends


def test_nothing_to_watch() -> None:
    net = nn.PReLU()
    with pytest.raises(ModelError, match="no layer with weights"):
        Alarm(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ModelError, match="no shape yet"):
        Alarm(nn.Sequential(nn.LazyLinear(3)), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    net = mlp(1)
    with pytest.raises(ModelError, match=r"is a list, expected a torch\.optim\.Optimizer"):
        Alarm(net, list(net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="at least one step"):
        Alarm(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=1e-30)


def test_inputs_that_are_not_finite_are_no_matter_of_scales() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found: list[Found] = []
    Alarm(net, optimizer, say=found.append)
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(net(torch.full((4, 64), torch.nan)), torch.arange(4)).backward()
        optimizer.step()
    assert [(f.step, f.verdict, f.layer) for f in found] == [(1, "inputs not finite", "0")]
    assert "mend the data" in str(found[0])


def test_an_optimizer_that_holds_nothing_of_the_model() -> None:
    net, other = mlp(), mlp()
    with pytest.raises(ModelError, match="holds no parameter of this Sequential"):
        Alarm(net, torch.optim.SGD(other.parameters(), lr=0.1))
    Alarm(net, torch.optim.SGD(net[0].parameters(), lr=0.1)).close()
    assert not any(layer._forward_hooks for layer in net.modules())

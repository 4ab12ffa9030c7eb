"""Every built-in model on its interface; sequence models see no future; names and options that are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn import MODELS
from steelyard.learn.models import model
from steelyard.learn.seeding import seeded
from steelyard.learn.sequence import angles, rotated
from steelyard.learn.task import Interface

IMAGE, TABLE, TEXT = Interface((1, 8, 8), 10), Interface((6,), 3), Interface((12,), 20, 20)
TAKES = {name: [IMAGE] for name in MODELS}
TAKES |= {"linear": [IMAGE, TABLE], "mlp": [IMAGE, TABLE], "lenet-300-100": [IMAGE, TABLE]}
TAKES |= {name: [IMAGE, TABLE, TEXT, Interface((5, 4), 3)] for name in ("rnn", "transformer")}
TAKES["lenet-5"] = [IMAGE, Interface((1, 28, 28), 10), Interface((3, 32, 32), 10)]
TAKES["cnn"] = [IMAGE, Interface((3, 32, 32), 10), Interface((1, 28, 28), 10), Interface((2, 5, 7), 4)]
ROWS = [(name, interface) for name, found in TAKES.items() for interface in found]


@pytest.mark.parametrize(("name", "interface"), ROWS, ids=[f"{n}-{i.shape}" for n, i in ROWS])
def test_every_model_runs_on_its_interface_and_ends_in_a_head(name: str, interface: Interface) -> None:
    with seeded(0):
        net = model(name, interface)
        x = torch.rand(3, *interface.shape)
    x = (x * interface.vocabulary).long() if interface.vocabulary else x
    outputs = net(x)
    positions = interface.shape if interface.vocabulary else ()
    assert outputs.shape == (3, *positions, interface.outputs)
    assert list(dict(net.named_children()))[-1] == "head"
    outputs.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "interface", "count"),
    [
        ("linear", IMAGE, 650),
        ("lenet-300-100", Interface((1, 28, 28), 10), 266_610),
        ("lenet-5", Interface((1, 28, 28), 10), 431_080),
    ],
)
def test_parameters_are_as_many_as_published(name: str, interface: Interface, count: int) -> None:
    assert sum(p.numel() for p in model(name, interface).parameters()) == count


def test_the_cnn_of_the_digits_is_small_and_starts_at_he_scale() -> None:
    with seeded(0):
        net = model("cnn", IMAGE)
    assert sum(p.numel() for p in net.parameters()) < 200_000
    for layer, tolerance in ((net.conv1, 0.2), (net.conv2, 0.05), (net.fc1, 0.02)):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=tolerance)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    "options",
    [{"cell": "rnn"}, {"cell": "lstm", "layers": 2}, {"cell": "gru", "tied": True}, {}, {"positions": "rotary"}],
)
def test_sequence_models_see_no_future(options: dict) -> None:
    net = model("rnn" if "cell" in options else "transformer", TEXT, **options).eval()
    x = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 20
    difference = (net(x) - net(changed)).abs().sum((0, 2))
    assert torch.all(difference[:7] == 0)
    assert torch.all(difference[7:] > 0)


def test_the_lstm_starts_with_an_open_forget_gate() -> None:
    net = model("rnn", TEXT, hidden=8)
    assert net.recurrent.bias_ih_l0.tolist() == [0] * 8 + [1] * 8 + [0] * 16
    recurrent = net.recurrent.weight_hh_l0[:8]
    assert torch.allclose(recurrent @ recurrent.T, torch.eye(8), atol=1e-5)


def test_recurrent_starts() -> None:
    with seeded(0):
        irnn = model("rnn", TABLE, hidden=30, cell="rnn-relu", start="identity").recurrent
        chrono = {c: model("rnn", TEXT, hidden=400, cell=c, memory=50).recurrent for c in ("lstm", "gru")}
    assert torch.equal(irnn.weight_hh_l0, torch.eye(30))
    assert irnn.weight_ih_l0.std().item() == pytest.approx(0.001, rel=0.2)
    assert irnn.nonlinearity == "relu"
    for cell, keeps in (("lstm", 1), ("gru", 1)):
        gates = chrono[cell].bias_ih_l0.view(-1, 400)
        steps = gates[keeps].exp()  # uniform in [1, 49]
        assert 1 <= steps.min() < 3 < 47 < steps.max() <= 49
        assert steps.mean().item() == pytest.approx(25, abs=2)
        assert not chrono[cell].bias_hh_l0.any()
    assert torch.equal(gates[0], torch.zeros(400))  # the reset gate of a GRU
    lstm = chrono["lstm"].bias_ih_l0.view(4, 400)
    assert torch.equal(lstm[0], -lstm[1])
    assert not lstm[2:].any()
    with seeded(0):
        theirs = nn.LSTM(1, 8, batch_first=True)
    with seeded(0):
        ours = model("rnn", TABLE, hidden=8, start="torch").recurrent
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["rnn", "transformer"])
def test_a_tied_head_is_the_embedding(name: str) -> None:
    net = model(name, TEXT, tied=True)
    assert net.head.weight is net.embed.weight
    assert net.head.weight.std().item() == pytest.approx(net.head.weight.shape[1] ** -0.5, rel=0.2)
    with pytest.raises(ModelError, match="the task gives numbers: leave it out"):
        model(name, TABLE, tied=True)
    with pytest.raises(ModelError, match="gives 20 tokens and 7 outputs"):
        model(name, Interface((12,), 7, 20), tied=True)


def test_positions_are_rotary_for_tokens_unless_told() -> None:
    assert model("transformer", TEXT).positions is None
    assert model("transformer", TEXT, positions="learned").positions is not None
    assert model("transformer", IMAGE).positions is not None  # whose rows are at places of their own
    assert model("transformer", TEXT, width=6, heads=2).positions is not None  # a head of 3 has no pairs to turn


def test_rotary_positions_know_distances_alone() -> None:
    turns = angles(40, 8, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 40, 8)
    scores = (rotated(q, turns) @ rotated(k, turns).mT)[0, 0]
    for distance in (0, 3, 17):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-5)
    assert scores.diagonal(0).mean().item() == pytest.approx(float((q * k)[0, 0, 0].sum()), abs=1e-5)
    assert (scores.diagonal(3).mean() - scores.diagonal(-3).mean()).abs() > 0.1  # before is not after
    net = model("transformer", TEXT, positions="rotary")
    assert net.positions is None
    assert net(torch.zeros(1, 50, dtype=torch.long)).shape == (1, 50, 20)  # longer than it was built for


def test_dropout_is_on_the_embedding_between_layers_and_before_the_head() -> None:
    for name, options in (("rnn", {"layers": 1}), ("transformer", {})):
        net = model(name, TEXT, dropout=0.5, **options)
        x = torch.zeros(1, 12, dtype=torch.long)
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


def test_the_tables_import_no_torch() -> None:
    code = "import sys, steelyard.learn as l, steelyard.learn.tasks; list(l.MODELS), list(l.TASKS); print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_wrong_names_and_options_say_what_is_right() -> None:
    with pytest.raises(UnknownNameError, match="no model 'transfomer'; did you mean 'transformer'"):
        model("transfomer", TEXT)
    with pytest.raises(
        UnknownNameError, match=r"no model 'mlp\(widths=3\)'; its options are arguments: model\('mlp', "
    ):
        model("mlp(widths=3)", TABLE)
    with pytest.raises(RecipeError, match="mlp has no option 'width'; did you mean 'widths'"):
        model("mlp", TABLE, width=3)
    with pytest.raises(UnknownNameError, match="no cell 'lstn'; did you mean 'lstm'"):
        model("rnn", TEXT, cell="lstn")
    with pytest.raises(UnknownNameError, match="no start 'identty'; did you mean 'identity'"):
        model("rnn", TEXT, start="identty")
    with pytest.raises(UnknownNameError, match="no kind of positions 'rotory'; did you mean 'rotary'"):
        model("transformer", TEXT, positions="rotory")
    with pytest.raises(ModelError, match="a head has 3 of width=6: choose an even"):
        model("transformer", TEXT, positions="rotary", width=6, heads=2)
    for options in ({"cell": "rnn", "memory": 9}, {"memory": 2}, {"memory": "long"}):
        with pytest.raises(ModelError, match="expected a number of steps, 3 or more, and the cell"):
            model("rnn", TEXT, **options)
    with pytest.raises(ModelError, match="no multiple of heads=3"):
        model("transformer", TEXT, heads=3)
    with pytest.raises(ModelError, match="use rnn or transformer"):
        model("mlp", TEXT)
    with pytest.raises(ModelError, match="needs images"):
        model("cnn", TABLE)
    with pytest.raises(ModelError, match="1 to 3 axes"):
        model("rnn", Interface((1, 2, 3, 4), 2))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mlp", {"widths": (0,)}, r"widths=\(0,\): expected a list of positive whole numbers"),
        ("mlp", {"widths": "a"}, "widths='a'"),
        ("mlp", {"widths": 8}, "widths=8"),
        ("mlp", {"widths": (8, 2.5)}, "widths="),
        ("mlp", {"dropout": 1.0}, "dropout=1.0: expected a probability"),
        ("mlp", {"dropout": float("nan")}, "dropout=nan"),
        ("cnn", {"channels": (True,)}, "channels="),
        ("cnn", {"hidden": -1}, "hidden=-1: expected a positive whole number"),
        ("cnn", {"dropout": -0.1}, "dropout=-0.1"),
        ("rnn", {"hidden": 0}, "hidden=0"),
        ("rnn", {"layers": 0}, "layers=0"),
        ("rnn", {"dropout": "much"}, "dropout='much'"),
        ("transformer", {"width": "64"}, "width='64'"),
        ("transformer", {"layers": 1.5}, "layers=1.5"),
        ("transformer", {"heads": 0}, "heads=0"),
        ("transformer", {"dropout": 2}, "dropout=2"),
    ],
)
def test_values_of_options_that_cannot_be_are_named(name: str, options: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=f"^{said}"):
        model(name, IMAGE, **options)


def test_the_users_own_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_models.py").write_text(
        "from torch import nn\n"
        "def plain(width=4): return nn.Linear(6, width)\n"
        "def fitted(interface, *, bias=True): return nn.Linear(*interface.shape, interface.outputs, bias)\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(6, 2)\n"
        "def wrong(): return 3\n"
    )
    Path("own_broken.py").write_text("x = 1\n1 / 0\n")
    assert model("own_models:plain", TABLE, width=5).out_features == 5
    assert model("own_models:fitted", TABLE, bias=False).bias is None
    assert isinstance(model("own_models:Net", TABLE), nn.Linear)
    with pytest.raises(ModelError, match="returns a int"):
        model("own_models:wrong", TABLE)
    with pytest.raises(ModelError, match="no 'plan' in it; did you mean 'plain'"):
        model("own_models:plan", TABLE)
    with pytest.raises(ModelError, match="there is no module 'own_modles'"):
        model("own_modles:plain", TABLE)
    with pytest.raises(ModelError, match=r"own_broken.py:2: ZeroDivisionError"):
        model("own_broken:x", TABLE)
    with pytest.raises(RecipeError, match="no option 'widht'; did you mean 'width'"):
        model("own_models:plain", TABLE, widht=5)
    with pytest.raises(ModelError, match="expected a function"):
        model("math:pi", TABLE)

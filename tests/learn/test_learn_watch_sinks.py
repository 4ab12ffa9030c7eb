"""Trackers get the totals of every step, notes, faults, and the norms of each tensor at looks; without being installed."""

from __future__ import annotations

import io
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import steelyard as sy
from steelyard.errors import MissingExtraError, ModelError, UnknownNameError, WeightsError
from steelyard.learn.watch.sinks import SINKS, Sink, terminal
from steelyard.learn.watch.sinks.terminal import Terminal


class Kept(Sink):
    """A sink of the user's own."""

    def __init__(self):
        self.rows, self.faults, self.closed = [], [], 0

    def numbers(self, step, values):
        self.rows.append((step, dict(values)))

    def fault(self, step, text):
        self.faults.append((step, text))

    def close(self):
        self.closed += 1


def train(*to, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sy.watch(model, optimizer, to=to) as log:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1]))
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
    return log


def test_what_a_sink_gets():
    sink = Kept()
    log = train(sink)
    totals = [values for _, values in sink.rows if "rate" in values]
    assert [step for step, values in sink.rows if "rate" in values] == [0, 1, 2, 3]
    assert [values["gradient norm"] for values in totals] == log.table("steps").column("gradient norm")
    losses = [(step, values["loss"]) for step, values in sink.rows if "loss" in values]
    assert losses == list(zip(range(4), log.table("notes").column("value"), strict=True))
    assert "weight norm/0.weight" in totals[2]
    assert "weight norm/0.weight" not in totals[3]  # step 3 is no look
    assert totals[0]["update ratio/2.weight"] == log.table("norms", tensor="2.weight").rows[0]["update ratio"]
    assert [text.split(":")[0] for _, text in sink.faults] == ["dead ReLU in 0"]
    assert sink.closed == 1


def test_an_error_in_the_loop_closes_the_sinks():
    sink, model = Kept(), nn.Linear(2, 2)

    def fail():
        with sy.watch(model, torch.optim.SGD(model.parameters()), to=[sink]):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sink.closed == 1


def test_a_log_that_cannot_be_made_closes_the_sinks(tmp_path):
    sink, model = Kept(), nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="is a folder: name a file in it"):
        sy.watch(model, torch.optim.SGD(model.parameters()), to=[sink], path=tmp_path)
    assert sink.closed == 1


def test_tensorboard(monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(("folder", folder))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def add_text(self, name, text, step):
            calls.append((name, text, step))

        def flush(self): ...

        def close(self):
            calls.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = train("tensorboard:runs/first")
    assert (calls[0], calls[-1]) == (("folder", "runs/first"), ("close",))
    assert ("loss", log.table("notes").rows[3]["value"], 3) in calls
    assert any(call[0] == "faults" and call[2] == 2 for call in calls)


@pytest.mark.parametrize("current", [True, False])
def test_wandb(monkeypatch, current):
    logged, alerts, done = [], [], []
    run = SimpleNamespace(
        define_metric=lambda *a, **k: None,
        log=logged.append,
        alert=lambda title, text: alerts.append(text),
        finish=lambda: done.append(True),
    )
    module = ModuleType("wandb")
    module.run, module.init = (run if current else None), lambda project: run
    monkeypatch.setitem(sys.modules, "wandb", module)
    train("wandb:mine")
    assert [row["watch/step"] for row in logged if "watch/rate" in row] == [0, 1, 2, 3]
    assert len(alerts) == 1
    assert done == ([] if current else [True])


@pytest.mark.parametrize("current", [True, False])
def test_mlflow(monkeypatch, current):
    calls = []
    module = ModuleType("mlflow")
    module.active_run = lambda: object() if current else None
    for name in ("set_experiment", "start_run", "end_run", "log_metrics", "set_tag"):
        setattr(module, name, lambda *a, _name=name, **k: calls.append((_name, a, k)))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    train("mlflow:mine")
    names = [call[0] for call in calls]
    assert ("start_run" in names, "end_run" in names, "set_experiment" in names) == (not current,) * 3
    metrics = [(k["step"], a[0]) for name, a, k in calls if name == "log_metrics"]
    assert [step for step, values in metrics if "rate" in values] == [0, 1, 2, 3]
    assert "weight norm of 0.weight" in next(values for step, values in metrics if "rate" in values)
    assert ("set_tag", "fault 1") in [(name, a[0]) for name, a, _ in calls if a]


@pytest.mark.parametrize("name", [name for name, row in SINKS._own.items() if row.extra])
def test_what_is_not_installed_says_how_to_install_it(name, monkeypatch):
    for module in ("tensorboard", "wandb", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'steelyard\[{name}\]'"):
        train(name)


def screen(rows="12", terminal=True):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    return Terminal(rows, console), console.file


def test_a_live_view_on_a_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS", 0.0)
    view, file = screen("2")
    log = train(view)
    last = file.getvalue().split("step 3")[-1]
    assert f"loss {log.table('notes').rows[-1]['value']:.4g}" in last
    assert "0.weight" in last
    assert "2.weight" not in last
    assert "and 2 more tensors" in last
    assert "step 2: dead ReLU in 0" in last


def test_no_view_where_there_is_no_terminal():
    view, file = screen(terminal=False)
    train(view)
    assert file.getvalue() == ""


def test_numbers_that_are_not_finite_are_drawn(monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS", 0.0)
    view, file = screen()
    view.numbers(0, {"loss": math.nan, "update ratio/w": math.inf, "weight norm/w": 0.0})
    view.numbers(1, {"loss": 1.0, "update ratio/w": 0.0})
    view.close()
    assert "×▁" in file.getvalue()
    assert terminal.place(0.0).startswith("●")
    assert terminal.place(7.0).endswith("●")


def test_wrong_names():
    with pytest.raises(ModelError, match="such as terminal:12"):
        train("terminal:many")
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        train("wandbs")
    with pytest.raises(ModelError, match="expected names such as"):
        train(3)

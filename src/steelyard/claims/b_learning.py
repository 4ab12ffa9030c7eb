"""Chapter B, learning: training lowers the loss by backpropagation, and what was learned is kept in the weights."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steelyard import formats
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits, inputs_of, trained
from steelyard.explain.gradients import check_gradients
from steelyard.explain.signal import signal
from steelyard.formats.module import from_module, into_module
from steelyard.learn.alarm import Found
from steelyard.learn.evaluate import outcomes
from steelyard.learn.gauges import alarm
from steelyard.learn.models import model
from steelyard.learn.run import Run, train
from steelyard.learn.seeding import generator, seeded
from steelyard.learn.task import Task, build_seeded, first_batch
from steelyard.learn.watch.session import watch


def _training() -> Mapping[str, float]:
    task = digits()
    net = build_seeded(task, 0)
    for parameter in net.get_submodule("fc2").parameters():
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    start = float(outcomes(net, task, "train")["loss"].mean())
    train(task, net, epochs=3, progress=False)
    end = float(outcomes(net, task, "train")["loss"].mean())
    moved = {name: not torch.equal(before[name], p) for name, p in net.named_parameters()}
    frozen = [n for n in moved if n.startswith("fc2.")]
    still = [n for n in moved if n not in frozen and not moved[n]]
    return {
        "loss after / before": end / start,
        "trainable tensors that stayed": len(still),
        "frozen tensors that moved": sum(moved[n] for n in frozen),
        "loss before": start,
        "loss after": end,
    }


B1 = Check(
    "B1",
    "training adjusts weights to reduce error",
    "an MLP on digits with one frozen layer, 3 epochs: training loss, and every tensor compared bit by bit",
    (
        Bar("loss after / before", "<", 1),
        Bar("trainable tensors that stayed", "==", 0),
        Bar("frozen tensors that moved", "==", 0),
    ),
    _training,
)


class _First(nn.Module):
    """A layer that returns (outputs, state) as one that returns outputs; attention looks at its own input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        first: Tensor = found[0]
        return first


class _Halved(torch.autograd.Function):
    """The identity with a wrong backward pass: half of the gradient."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


class _Wrong(nn.Linear):
    """A dense layer whose weights get a wrong gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, _Halved.apply(self.weight), self.bias)


def _layer_types() -> dict[str, nn.Module]:
    """One small model for each type of layer; they take images (examples, 8, 8) and end in 10 classes."""

    def ending(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))

    return {
        "Linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)),
        "Conv1d": ending(nn.Conv1d(8, 4, 3), nn.Tanh()),
        "Conv2d": ending(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.GELU()),
        "ConvTranspose2d": ending(nn.Unflatten(1, (1, 8)), nn.ConvTranspose2d(1, 2, 3), nn.Sigmoid()),
        "RNN": ending(_First(nn.RNN(8, 6, batch_first=True))),
        "LSTM": ending(_First(nn.LSTM(8, 6, batch_first=True))),
        "GRU": ending(_First(nn.GRU(8, 6, batch_first=True))),
        "MultiheadAttention": ending(_First(nn.MultiheadAttention(8, 2, batch_first=True))),
        "LayerNorm": ending(nn.Linear(8, 6), nn.LayerNorm(6), nn.SiLU()),
        "BatchNorm1d": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 10)),
        "PReLU": ending(nn.Linear(8, 6), nn.Softplus(), nn.Linear(6, 6), nn.PReLU()),
    }


def _gradients() -> Mapping[str, float]:
    task = digits()
    x, y = inputs_of(task, "test")[:6, 0], next(iter(task.batches("test", 0))).targets[:6]
    with seeded(0):
        models = _layer_types()
        wrong = nn.Sequential(nn.Flatten(), _Wrong(64, 8), nn.Tanh(), nn.Linear(8, 10))
        for net in models.values():
            net(x)  # lazy layers learn their shapes
    errors = {name: check_gradients(net, (x, y), task.loss, tries=8).meta["worst"] for name, net in models.items()}
    caught = check_gradients(wrong, (x, y), task.loss, tries=8).meta["worst"]
    return {"worst of the types": max(errors.values()), "types": len(errors), "a wrong layer": caught} | errors


B2 = Check(
    "B2",
    "by backpropagation",
    "gradients against central differences in float64 on digits, by type of layer; a wrong backward pass is seen",
    (Bar("worst of the types", "<=", 1e-5), Bar("types", ">=", 10), Bar("a wrong layer", ">=", 0.1)),
    _gradients,
)


def _tweaks() -> Mapping[str, float]:
    logged, exact, losses = [], [], []
    for watched in (False, True):
        run = Run(digits(), seed=0, epochs=3, keep="last")
        with watch(run) if watched else nullcontext() as log, run:
            before = {n: p.detach().double() for n, p in run.model.named_parameters()}
            for step in run:
                losses.append((watched, step.loss))
                for name, p in run.model.named_parameters() if watched else ():
                    size, after = before[name].norm(), p.detach().double()
                    if size > 0:
                        exact.append(float((after - before[name]).norm() / size))
                    before[name] = after
        if log is not None:
            logged = [ratio for ratio in log.table("norms").column("update ratio") if ratio is not None]
    pairs = zip(logged, exact, strict=True)
    plain, observed = ([loss for which, loss in losses if which is wanted] for wanted in (False, True))
    return {
        "relative error of a ratio": max(abs(ours - ratio) / ratio for ours, ratio in pairs),
        "losses that watching changed": sum(a != b for a, b in zip(plain, observed, strict=True)),
        "ratios": len(exact),
        "median ratio": statistics.median(exact),
    }


B4 = Check(
    "B4",
    "weights are tweaked slightly after each batch",
    "an MLP on digits, every tensor watched: logged ratios against ||dW|| / ||W|| in float64, losses with and without",
    (
        Bar("relative error of a ratio", "<=", 1e-12),
        Bar("losses that watching changed", "==", 0),
        Bar("median ratio", "<", 0.1),
    ),
    _tweaks,
)


def random_labels(task: Task, seed: int = 0) -> Task:
    """The task with its training labels drawn at random: only memory can predict them."""
    data: Any = task.batches
    targets = torch.randint(len(task.classes), data.targets["train"].shape, generator=generator(seed, "labels"))
    return replace(task, batches=replace(data, targets={**data.targets, "train": targets}))


def _memory() -> Mapping[str, float]:
    task = digits("cnn")
    net, other = trained(task, epochs=3), build_seeded(task, 7)
    x = inputs_of(task, "test")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        formats.write(from_module(net), path)
        into_module(formats.open(path), other)
    with torch.no_grad():
        difference = float((net.eval()(x) - other.eval()(x)).abs().max())
    noise = random_labels(digits(batch_size=128))
    assert noise.interface is not None
    with seeded(0):
        large = model("mlp", noise.interface, widths=(512, 256))
    train(noise, large, epochs=80, rate=5e-3, weight_decay=0.0, keep="last", progress=False)
    learned = outcomes(large, noise, "train")["accuracy"]
    return {
        "largest logit difference": difference,
        "accuracy on random labels": float(learned.mean()),
        "bits memorised": len(learned) * math.log2(len(noise.classes)) if learned.all() else 0.0,
    }


B11 = Check(
    "B11",
    "weights are the memory of the model",
    "a CNN through a safetensors file into a net of another start; an MLP trained on digits with random labels",
    (Bar("largest logit difference", "==", 0), Bar("accuracy on random labels", "==", 1)),
    _memory,
)


def of_value(value: float | None) -> nn.Module:
    """Two hidden layers of 64 and 32 ReLU units for the digits: every weight the same, or (None) started by He."""
    task = digits()
    assert task.interface is not None
    with seeded(0):
        net = model("mlp", task.interface, widths=(64, 32))
    if value is not None:
        for parameter in net.parameters():
            nn.init.constant_(parameter, value if parameter.ndim > 1 else 0.0)
    return net


def hidden_rank(net: nn.Module, x: Tensor) -> int:
    """The rank of the last hidden layer over examples, to a thousandth: how many units it really has."""
    caught: list[Tensor] = []
    handle = net.get_submodule("head").register_forward_pre_hook(lambda _layer, args: caught.append(args[0].detach()))
    with torch.no_grad():
        net(x)
    handle.remove()
    return int(torch.linalg.matrix_rank(caught[0], rtol=1e-3))


def _static() -> Mapping[str, float]:
    task = digits()
    x, batch = inputs_of(task, "test"), first_batch(task, "train")
    found: dict[str, float] = {}
    for name, value in (("constant", 0.05), ("random", None)):
        net = of_value(value)
        verdict = signal(net, batch, task.loss).meta["verdict"]
        alarms: list[Found] = []
        train(task, net, epochs=15, gauges=[alarm(say=alarms.append)], progress=False)
        found[f"{name} start, called symmetric"] = float(verdict == "symmetric")
        found[f"{name} start, alarms of symmetry"] = sum(a.verdict == "symmetric" for a in alarms)
        found[f"{name} start, hidden rank"] = hidden_rank(net, x)
        found[f"{name} start, accuracy"] = float(outcomes(net, task)["accuracy"].mean())
    softmax = train(digits("linear"), epochs=15, progress=False).model
    found["softmax regression, accuracy"] = float(outcomes(softmax, task)["accuracy"].mean())
    found["constant above softmax regression"] = (
        found["constant start, accuracy"] - found["softmax regression, accuracy"]
    )
    empty = of_value(0.0)
    train(task, empty, epochs=2, progress=False)
    found["weights that zeros turned into"] = sum(int(p.count_nonzero()) for p in empty.parameters() if p.ndim > 1)
    return found


B10 = Check(
    "B10",
    "without weights the net is static; with equal weights it cannot learn",
    "an MLP on digits whose weights are all the same, and all zero, beside He's start: verdict, alarm, rank, accuracy",
    (
        Bar("constant start, called symmetric", "==", 1),
        Bar("constant start, alarms of symmetry", "==", 1),
        Bar("constant start, hidden rank", "==", 1),
        Bar("constant above softmax regression", "<=", 0),
        Bar("weights that zeros turned into", "==", 0),
        Bar("random start, called symmetric", "==", 0),
        Bar("random start, alarms of symmetry", "==", 0),
    ),
    _static,
)

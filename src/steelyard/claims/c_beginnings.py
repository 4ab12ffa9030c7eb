"""Chapter C, beginnings: the start decides whether a signal survives the depth."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from steelyard.claims.architectures import ZOO, standard_deviations
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.core.table import Table
from steelyard.explain.signal import signal
from steelyard.explain.starts import compare_starts
from steelyard.formats.module import from_module, into_module
from steelyard.init import start
from steelyard.learn.alarm import Alarm, Found
from steelyard.learn.seeding import seeded
from steelyard.learn.start import init_

DEPTHS = (2, 6, 16)

COMPARED = {
    "torch's default": "default",
    "Xavier": "xavier",
    "He": "he",
    "LeCun": "lecun",
    "orthogonal": "orthogonal",
    "by data": "data",
    "too small": "normal(std=0.02)",
    "too large": "normal(std=1)",
    "constant": "constant(value=0.1)",
}


def plain_net(depth: int) -> nn.Module:
    """Dense layers of 32 ReLU units, and a head for 10 classes."""
    layers = [part for i in range(depth) for part in (nn.Linear(32 if i else 64, 32), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 10))


def _ranked() -> Mapping[str, float]:
    options = {"model": plain_net, "examples": 48, "seeds": 1, "train": 120, "rate": 3e-3, "progress": False}
    table = compare_starts(digits(), COMPARED, DEPTHS, **options)
    tau = table.meta["tau-b of score and result"]
    found = {"tau-b": math.nan if tau is None else tau}
    for depth in DEPTHS:
        rows = [row for row in table.rows if row["depth"] == depth]
        first = max(rows, key=lambda row: row["score"])
        best = max(row["accuracy"] for row in rows)
        found[f"lost by the first start, {depth} layers"] = best - first["accuracy"]
    return found


C1 = Check(
    "C1",
    "initial values matter",
    "9 starts x 3 depths on digits: the ranking by one batch beside the accuracy after 120 steps; ties count as ties",
    (Bar("tau-b", ">=", 0.6),),
    _ranked,
)


DEPTH, WIDTH = 30, 512

STARTS = {
    "torch's default": "he(slope=2.23606797749979, distribution=uniform)",
    "Xavier": "xavier",
    "He": "he",
}


def deep_net() -> nn.Module:
    """30 dense layers of 512 ReLU units without biases, and a head for 10 classes."""
    layers: list[tuple[str, nn.Module]] = []
    for i in range(1, DEPTH + 1):
        layers += [(f"fc{i}", nn.Linear(WIDTH, WIDTH, bias=False)), (f"relu{i}", nn.ReLU())]
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(WIDTH, 10))]))


def started_signal(net: nn.Module, scheme: str, seed: int = 0) -> Table:
    """The signal of one standard normal batch through `net` after a start."""
    into_module(start(from_module(net), STARTS[scheme], seed), net)
    random = torch.Generator().manual_seed(seed)
    batch = torch.randn(64, WIDTH, generator=random), torch.randint(10, (64,), generator=random)
    return signal(net, batch, nn.functional.cross_entropy)


def _starts() -> Mapping[str, float]:
    net, found = deep_net(), {}
    for scheme in STARTS:
        table = started_signal(net, scheme)
        found[f"{scheme} flagged"] = float(table.meta["verdict"] != "healthy")
        found[f"{scheme} rms"] = table.column("rms")[DEPTH - 1]
    return found


C2 = Check(
    "C2",
    "poor starts vanish or explode",
    "30 layers of 512 ReLU units, one standard normal batch: the verdict of the signal for three starts",
    (Bar("torch's default flagged", "==", 1), Bar("Xavier flagged", "==", 1), Bar("He flagged", "==", 0)),
    _starts,
)


STEPS, SEEDS = 20, 10
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}


def first_steps(scheme: str, optimizer: str, seed: int) -> tuple[list[Found], float]:
    """What the alarm finds in 20 steps of 10 ReLU layers of 128 units on digits; and the fall of the loss over them."""
    task = digits(seed=seed)
    batches = [*task.batches("train", 0), *task.batches("train", 1)][:STEPS]
    with seeded(seed):
        layers = [m for i in range(10) for m in (nn.Linear(128 if i else 64, 128), nn.ReLU())]
        net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))
    if scheme != "default":
        init_(net, scheme, batches[0].inputs if scheme == "data" else None, seed=seed)
    steps = OPTIMIZERS[optimizer](net.parameters())
    losses = []
    with Alarm(net, steps, say=[].append) as alarm:
        for batch in batches:
            steps.zero_grad()
            loss = nn.functional.cross_entropy(net(batch.inputs), batch.targets)
            loss.backward()
            steps.step()
            losses.append(loss.item())
    return alarm.found, losses[0] - losses[-1]


def _alarmed() -> Mapping[str, float]:
    runs = {
        scheme: [first_steps(scheme, name, seed) for name in OPTIMIZERS for seed in range(SEEDS)]
        for scheme in ("default", "he", "data")
    }
    bad, good = runs["default"], [*runs["he"], *runs["data"]]
    found = [alarms[0] for alarms, _ in bad if alarms]
    return {
        "default starts without an alarm": len(bad) - len(found),
        "false alarms": sum(bool(alarms) for alarms, _ in good),
        "healthy runs": len(good),
        "smallest fall of their loss": min(fall for _, fall in good),
        "default starts": len(bad),
        "latest step of an alarm": max((alarm.step for alarm in found), default=0),
    }


C3 = Check(
    "C3",
    "poor starts stall training",
    "an alarm in the first 20 steps on digits, 10 ReLU layers, SGD and Adam: torch's default start; He's and by data",
    (
        Bar("default starts without an alarm", "==", 0),
        Bar("false alarms", "==", 0),
        Bar("healthy runs", ">=", 40),
        Bar("smallest fall of their loss", ">=", 0.1),
    ),
    _alarmed,
)


LAYERS = 50
ACTIVATIONS = ("relu", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "tanh", "sigmoid")
ACTIVATIONS = (*ACTIVATIONS, "hardswish")


class Plain(nn.Module):
    """Layers of one activation in series, without norms; or with each layer and its activation a residual branch."""

    def __init__(self, activation: str, residual: bool = False, width: int = 128):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.last, self.head = nn.Identity(), nn.Linear(width, 10)
        self.function: Callable[[Tensor], Tensor] = getattr(nn.functional, activation)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = (
                x + layer(self.function(x))
                if self.residual
                else layer(x if layer is self.layers[0] else self.function(x))
            )
        return self.head(self.function(self.last(x)))


def _depth() -> Mapping[str, float]:
    """Standard deviations of sums at the last layer, on inputs that the start has not seen."""
    random = torch.Generator().manual_seed(0)
    batch, others = (torch.randn(128, 128, generator=random) for _ in range(2))
    kept, streams, absolute = [], [], []
    for activation in ACTIVATIONS:
        for residual in (False, True):
            model = Plain(activation, residual)
            init_(model, "auto", batch)
            sums: list[float] = []
            for layer in (model.layers[0], model.last):
                layer.register_forward_hook(lambda _layer, _args, out, sums=sums: sums.append(float(out.std())))
            with torch.no_grad():
                model(others)
            if residual:
                streams.append(sums[-1])
            else:
                kept.append(sums[-1] / sums[0])
                absolute.append(sums[-1])
    return {
        "smallest": min(kept),
        "largest": max(kept),
        "stream, smallest": min(streams),
        "stream, largest": max(streams),
        "smallest by itself": min(absolute),
        "activations": len(ACTIVATIONS),
    }


C4 = Check(
    "C4",
    "Xavier and He set the right scale for depth and activation",
    "started by 'auto': standard deviation at layer 50 over layer 1, 12 activations; after 50 residual branches",
    (
        Bar("smallest", ">=", 0.5),
        Bar("largest", "<=", 2),
        Bar("stream, smallest", ">=", 0.5),
        Bar("stream, largest", "<=", 2),
    ),
    _depth,
)


def _by_data() -> Mapping[str, float]:
    away, passes = [], []
    for build, batch in ZOO.values():
        torch.manual_seed(0)
        model = build()
        passes.append(init_(model, "data", batch).meta["passes"])
        away += [abs(std - 1) for std in standard_deviations(model, batch).values()]
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(256, 256), nn.ReLU())]
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    table = init_(nn.Sequential(*layers), "data", x)
    return {
        "furthest from 1": max(away),
        "forward passes": max(passes),
        "gradient, largest over smallest": table.meta["gradient scale, largest over smallest"],
        "layers": len(away),
    }


C5 = Check(
    "C5",
    "stable gradient flow from the outset",
    "a start by data: standard deviations of every layer of 12 architectures; the gradient through 50 layers",
    (
        Bar("furthest from 1", "<=", 0.02),
        Bar("forward passes", "<=", 2),
        Bar("gradient, largest over smallest", "<=", 10),
    ),
    _by_data,
)

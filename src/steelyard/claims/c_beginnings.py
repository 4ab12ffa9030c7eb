"""Chapter C, beginnings: the start decides whether a signal survives the depth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from steelyard.claims.architectures import ZOO, standard_deviations
from steelyard.claims.check import Bar, Check
from steelyard.core.table import Table
from steelyard.explain.signal import signal
from steelyard.formats.module import from_module, into_module
from steelyard.init import start
from steelyard.learn.start import init_

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


LAYERS = 50


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

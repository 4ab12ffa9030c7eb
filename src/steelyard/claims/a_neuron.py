"""Chapter A, the neuron: a weight is a connection, inputs are multiplied and summed, sums pass an activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits, inputs_of, trained
from steelyard.explain.address import connection
from steelyard.explain.contributions import balance, contributions
from steelyard.explain.signal import signal
from steelyard.explain.signed import signed
from steelyard.learn.seeding import seeded
from steelyard.learn.tasks import task


def _output_of(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer is given and what it returns, seen by a hook of this check's own."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, a, out: seen.append((a[0].clone(), out.clone()))
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def _connections() -> Mapping[str, float]:
    x = inputs_of(digits(), "test")[:64]
    random = torch.Generator().manual_seed(0)
    worst, spilled, unread, tried = 0.0, 0.0, 0, 0
    for name, layer, size in (("mlp", "fc1", None), ("mlp", "head", None), ("cnn", "conv2", 3)):
        model = trained(digits(name), epochs=2)
        shape = model.get_submodule(layer).weight.shape
        for _ in range(20):
            i, j = (int(torch.randint(n, (), generator=random)) for n in shape[:2])
            tap = None if size is None else tuple(torch.randint(size, (2,), generator=random).tolist())
            wire = connection(model, layer, i, j, tap)
            given, before = _output_of(model, layer, x)
            value = float(torch.randn((), generator=random))
            old = wire.set(value)
            after = _output_of(model, layer, x)[1]
            unread += wire.read() != value
            wire.set(old)
            moved = (after - before).double()
            expected = (value - old) * (given[:, j] if tap is None else _shifted(given[:, j], tap)).double()
            scale = max(before.abs().max(), after.abs().max())
            worst = max(worst, float((moved[:, i] - expected).abs().max() / scale))
            moved[:, i] = 0
            spilled = max(spilled, float(moved.abs().max()))
            tried += 1
    return {"error": worst, "change elsewhere": spilled, "values read back wrongly": unread, "connections": tried}


def _shifted(plane: Tensor, tap: tuple[int, ...]) -> Tensor:
    """What a tap of a 3x3 kernel with padding 1 sees at each position: (examples, height, width)."""
    height, width = plane.shape[1:]
    return nn.functional.pad(plane, (1, 1, 1, 1))[:, tap[0] : tap[0] + height, tap[1] : tap[1] + width]


A1 = Check(
    "A1",
    "a weight is the strength of one connection",
    "set 60 connections w[i,j] of trained networks to v, on digits: output i moves by (v - w) x_j, nothing else",
    (Bar("error", "<=", 1e-6), Bar("change elsewhere", "==", 0), Bar("values read back wrongly", "==", 0)),
    _connections,
)


def _sums() -> Mapping[str, float]:
    task = digits()
    x = inputs_of(task, "test")[:64]
    rows = x[:, 0]  # images as sequences of 8 rows of 8 pixels
    with seeded(0):
        attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        lstm, gru = nn.LSTM(8, 12, num_layers=2, batch_first=True), nn.GRU(8, 12, bidirectional=True, batch_first=True)
    models = {"linear": trained(task, epochs=2), "convolution": trained(digits("cnn"), epochs=2)}
    found = {name: balance(model, x).meta["worst"] for name, model in models.items()}
    for name, model in (("attention", attention), ("LSTM", lstm), ("GRU", gru)):
        found[name] = balance(model, rows).meta["worst"]
    found["ledger"] = max(_ledger(models["linear"], "fc1", x, u) for u in range(0, 128, 16))
    return found


def _ledger(model: nn.Module, layer: str, x: Tensor, unit: int) -> float:
    """The error of the ledgers of one unit on eight images, against a hook of this check's own."""
    actual = _output_of(model, layer, x)[1][:, unit]
    totals = [sum(contributions(model, x, layer, unit, sample=s).column("contribution")) for s in range(8)]
    return float((torch.tensor(totals) - actual[:8].double()).abs().max() / actual.abs().max())


A2 = Check(
    "A2",
    "inputs are multiplied by weights and summed",
    "products + bias against the layer's pre-activation, on digits, for every unit, position, gate and head",
    tuple(Bar(n, "<=", 1e-6) for n in ("linear", "convolution", "attention", "LSTM", "GRU", "ledger")),
    _sums,
)


def _dead() -> Mapping[str, float]:
    data = digits()
    x, y = inputs_of(data, "train"), torch.cat([b.targets for b in data.batches("train", 0)])
    with seeded(0):
        model = data.build()
    random = torch.Generator().manual_seed(0)
    planted, dead = set(), set()
    with torch.no_grad():
        for i in (1, 2):
            bias = model.get_submodule(f"fc{i}").bias
            units = torch.randperm(len(bias), generator=random)[: round(0.3 * len(bias))]
            bias[units] = -1e4
            planted |= {(f"fc{i}", u) for u in units.tolist()}
            silent = (_output_of(model, f"relu{i}", x)[1] == 0).all(0)  # planted, and those that died of it
            dead |= {(f"fc{i}", u) for u in silent.nonzero().flatten().tolist()}
    units_by_layer = signal(model, (x, y), data.loss).meta["dead units"]
    found = {(layer, u) for layer, units in units_by_layer.items() for u in units}
    return {
        "precision": len(found & dead) / len(found) if found else 0.0,
        "recall": len(found & dead) / len(dead),
        "planted units missed": len(planted - found),
        "planted": len(planted),
        "dead": len(dead),
    }


A3 = Check(
    "A3",
    "the sum passes through an activation",
    "plant 30 % dead ReLUs in both hidden layers of a network on digits; compare those reported with a hook's",
    (Bar("precision", "==", 1), Bar("recall", "==", 1), Bar("planted units missed", "==", 0)),
    _dead,
)


def _signs() -> Mapping[str, float]:
    tumours = task("breast-cancer")
    linear = trained(tumours, epochs=5)
    x = inputs_of(tumours, "test")
    straight = min(signed(linear, x, k).meta["agreement"] for k in range(2))
    images = digits()
    deep = trained(images, epochs=5)
    x = inputs_of(images, "test")[:200]
    bent = [signed(deep, x, k).meta["agreement"] for k in range(10)]
    return {"linear": straight, "MLP": sum(bent) / len(bent), "MLP, worst class": min(bent)}


A8 = Check(
    "A8",
    "a negative weight acts in the opposite direction",
    "sign of the reported effect against the finite difference of 0.1 std, held-out samples x inputs x classes",
    (Bar("linear", "==", 1), Bar("MLP", ">=", 0.95)),
    _signs,
)

"""Can training leave exact zeros? LeNet-300-100 by proximal steps, and linear models beside their own solvers.

    pip install --no-deps --target peer group-lasso==1.5.0
    python bench/penalties/run.py --data FOLDER [--seeds 4] [--strength 2.5e-4] [--peer peer]

Writes results/DATE.json. LeNet-300-100 on 10,000 images of MNIST (8,000 to train, 2,000 to prove): Adam at two rates,
Adam with L1 in the loss, and Adam with proximal steps of the same strength, all for the same number of steps.
Linear: objective, support and processor time against scikit-learn's saga (L1, elastic net) and group-lasso (groups of
three features) on breast_cancer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy

STRENGTH, BATCH = 2.5e-4, 50
EPOCHS, MORE = 20, 6  # with the penalty; then without it, what is zero held at zero
RATES = {"none": 1e-3, "none, twice the rate": 2e-3, "in the loss": 3e-3, "proximal": 3e-3}
LAYERS = (0, 2, 4)


def images(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with np.load(data / "mnist10k.npz") as found:
        arrays = [found[name] for name in found.files]
    x, y = sorted(arrays, key=lambda a: -a.ndim)[:2]
    x = torch.from_numpy(x.reshape(len(y), -1).astype(np.float32)) / 255
    y = torch.from_numpy(y.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:8000], order[8000:]
    return x[train], y[train], x[test], y[test]


def lenet(seed: int, mode: str, data: tuple[Tensor, Tensor, Tensor, Tensor], strength: float) -> dict[str, Any]:
    """One training; the penalised ones average gradients over 100 steps: noise lifts fewer weights off zero."""
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    matrices = [net[i].weight for i in LAYERS]
    start = time.process_time()
    first = [sy.L1(strength)] if mode == "proximal" else []
    if mode.startswith("none"):
        phase(net, x, y, RATES[mode], 0.9, EPOCHS + MORE, [])
    else:
        phase(net, x, y, RATES[mode], 0.99, EPOCHS, first, strength if mode == "in the loss" else 0.0)
        held = {f"{i}.weight": torch.where(net[i].weight == 0, math.inf, 0.0).detach() for i in LAYERS}
        phase(net, x, y, RATES[mode], 0.9, MORE, [sy.L1(1.0, factors=held)])
    with torch.no_grad():
        right = float((net(test_x).argmax(1) == test_y).double().mean())
    count = sum(w.numel() for w in matrices)
    zeros = sum(int((w == 0).sum()) for w in matrices) / count
    seconds = time.process_time() - start
    return {"seed": seed, "mode": mode, "accuracy": right, "zeros": zeros, "CPU seconds": seconds}


def phase(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    rate: float,
    momentum: float,
    epochs: int,
    penalties: list[Any],
    plain: float = 0,
) -> None:
    """Some epochs of Adam with a cosine schedule; plain: the strength of an L1 that is only part of the loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(momentum, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(y) // BATCH)
    with sy.penalize(net, optimizer, *penalties):
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(BATCH):
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(x[rows]), y[rows])
                if plain:
                    loss = loss + plain * sum(p.abs().sum() for p in net.parameters() if p.ndim == 2)
                loss.backward()
                optimizer.step()
                schedule.step()


def tumours() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    x = (found.data - found.data.mean(0)) / found.data.std(0)
    return torch.tensor(x), torch.tensor(found.target[:, None], dtype=torch.float64)


def ours(penalty: Any, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> tuple[Any, float]:
    start = time.process_time()
    layer = nn.Linear(x.shape[1], 1, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.99, 0.999))
    sy.penalize(layer, optimizer, penalty)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(layer(x), y).backward()
        optimizer.step()
    return layer, time.process_time() - start


def score(layer: nn.Linear, penalty: Any, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    with torch.no_grad():
        return float(loss(layer(x), y) + penalty.value(layer))


def layer_of(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(np.asarray(weight).size, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(np.asarray(weight).reshape(1, -1)))
        layer.bias.copy_(torch.as_tensor(np.asarray(bias).reshape(1)))
    return layer


def beside_saga(steps: int = 3000) -> list[dict[str, Any]]:
    from sklearn.linear_model import LogisticRegression

    x, y = tumours()
    loss, rows = functional.binary_cross_entropy_with_logits, []
    for strength in (0.005, 0.02, 0.05):
        for ratio in (1.0, 0.5):
            penalty = sy.ElasticNet(strength, ratio)
            start = time.process_time()
            peer = LogisticRegression(
                solver="saga",
                l1_ratio=ratio,
                penalty="elasticnet",
                C=1 / (strength * len(x)),
                tol=1e-10,
                max_iter=10**5,
            ).fit(x.numpy(), y[:, 0].numpy())
            seconds = time.process_time() - start
            theirs = layer_of(peer.coef_, peer.intercept_)
            layer, spent = ours(penalty, x, y, loss, steps)
            rows.append(_row("saga", f"elastic net {strength:g}, {ratio:g}", layer, theirs, penalty, x, y, loss) | {
                "CPU seconds": spent, "peer's CPU seconds": seconds})  # fmt: skip
    return rows


def beside_group_lasso(folder: str, steps: int = 3000) -> list[dict[str, Any]]:
    sys.path.insert(0, folder)
    from group_lasso import GroupLasso

    x, y = tumours()
    x, y = x[:, 2:29], x[:, :1]  # least squares: the radius from the other measurements, nine groups of three
    rows = []

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return (z - target).square().mean() / 2

    for strength in (0.01, 0.05, 0.1):
        start = time.process_time()
        peer = GroupLasso(
            groups=np.repeat(np.arange(9), 3), group_reg=strength, l1_reg=0, scale_reg="group_size", n_iter=20000,
            tol=1e-12, supress_warning=True, fit_intercept=True,
        ).fit(x.numpy(), y.numpy())  # fmt: skip
        seconds = time.process_time() - start
        theirs = layer_of(peer.coef_, peer.intercept_)
        for factor in (1.0, 0.5, 2.0):  # its loss is scaled differently: the factor that fits is found
            penalty = sy.GroupL1(strength * factor, "inputs", size=3)
            layer, spent = ours(penalty, x, y, loss, steps)
            row = _row("group-lasso", f"groups of three {strength:g} x {factor:g}", layer, theirs, penalty, x, y, loss)
            rows.append(row | {"CPU seconds": spent, "peer's CPU seconds": seconds})
    return rows


def _row(peer: str, what: str, layer: Any, theirs: Any, penalty: Any, x: Any, y: Any, loss: Any) -> dict[str, Any]:
    a, b = layer.weight.detach()[0], theirs.weight.detach()[0]
    return {
        "peer": peer,
        "penalty": what,
        "zeros": int((a == 0).sum()),
        "peer's zeros": int((b == 0).sum()),
        "supports differ in": int(((a == 0) != (b == 0)).sum()),
        "objective - peer's": score(layer, penalty, x, y, loss) - score(theirs, penalty, x, y, loss),
        "weights differ by": float((a - b).abs().max()),
    }


def interval(values: list[float]) -> dict[str, float]:
    from steelyard.learn.intervals import student

    low, high = student(np.array(values))
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="the folder of mnist10k.npz")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--peer", help="a folder that holds group-lasso")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = images(told.data)
    runs = [lenet(seed, mode, data, told.strength) for seed in range(told.seeds) for mode in RATES]
    for run in runs:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()})
    by = {mode: [run for run in runs if run["mode"] == mode] for mode in RATES}
    summary = {
        **{
            f"points lost by proximal against {mode}": interval(
                [(a["accuracy"] - b["accuracy"]) * 100 for a, b in zip(by[mode], by["proximal"], strict=True)]
            )
            for mode in ("none", "none, twice the rate")
        },
        **{f"zeros, {mode}": interval([run["zeros"] for run in by[mode]]) for mode in RATES},
        **{f"accuracy, {mode}": interval([run["accuracy"] for run in by[mode]]) for mode in RATES},
        "CPU seconds, proximal over none": math.fsum(r["CPU seconds"] for r in by["proximal"])
        / math.fsum(r["CPU seconds"] for r in by["none"]),
    }
    linear = beside_saga() + (beside_group_lasso(told.peer) if told.peer else [])
    for row in linear:
        print(row)
    print(json.dumps(summary, indent=1))
    result = {
        "strength": told.strength,
        "epochs": [EPOCHS, MORE],
        "rates": RATES,
        "lenet": runs,
        "summary": summary,
        "linear": linear,
    }
    target = Path(__file__).parent / "results" / f"{date.today():%Y-%m-%d}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

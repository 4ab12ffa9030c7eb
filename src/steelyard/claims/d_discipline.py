"""Chapter D, discipline: penalties, decay, and the weights of examples and features, held against their formulas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.claims import weighting
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.learn.data import Examples
from steelyard.learn.decay import Decay
from steelyard.learn.examples import class_weights
from steelyard.learn.groups import by_group, group_dro, just_train_twice, refit_head
from steelyard.learn.intervals import student
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.parameters import decay_groups
from steelyard.learn.path import regularization_path
from steelyard.learn.penalize import penalize
from steelyard.learn.penalties import L1, L2, GroupL1, Penalty
from steelyard.learn.run import train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.seeding import generator, seeded
from steelyard.learn.task import Interface, Split, Task

STRENGTH = 0.02  # of the penalties on breast_cancer, per example: half of the 30 weights or more vanish
STEPS = 3000

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.99, nesterov=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.1, betas=(0.99, 0.999)),
}


def tumours() -> tuple[Tensor, Tensor]:
    """Standardised measurements (569, 30) and whether each is benign (569, 1), float64."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    x = (found.data - found.data.mean(0)) / found.data.std(0)
    return torch.tensor(x), torch.tensor(found.target[:, None], dtype=torch.float64)


def zeroed(features: int) -> nn.Linear:
    """One output, float64, all zeros."""
    layer = nn.Linear(features, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


def fit(optimizer: str, penalty: Penalty, x: Tensor, y: Tensor, steps: int = STEPS) -> nn.Linear:
    """A logistic regression by full-batch steps of a torch optimizer."""
    layer = zeroed(x.shape[1])
    made = OPTIMIZERS[optimizer](layer.parameters())
    with penalize(layer, made, penalty):
        for _ in range(steps):
            made.zero_grad()
            functional.binary_cross_entropy_with_logits(layer(x), y).backward()
            made.step()
    return layer


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, strength: float) -> float:
    """Mean logistic loss + strength * sum |w|."""
    data = functional.binary_cross_entropy_with_logits(x @ weight[:, None] + bias, y)
    return float(data + strength * weight.abs().sum())


def _zeros() -> Mapping[str, float]:
    from sklearn.linear_model import LogisticRegression

    x, y = tumours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `penalty` is on its way out, older releases ask for it
        saga = LogisticRegression(
            penalty="elasticnet", l1_ratio=1.0, solver="saga", C=1 / (STRENGTH * len(x)), tol=1e-12, max_iter=10**5
        ).fit(x.numpy(), y[:, 0].numpy())
    theirs = torch.tensor(saga.coef_[0])
    lowest = objective(theirs, torch.tensor(saga.intercept_), x, y, STRENGTH)
    found: dict[str, float] = {"weights kept or dropped otherwise": 0, "objective gap": 0.0}
    for name in OPTIMIZERS:
        layer = fit(name, L1(STRENGTH), x, y)
        ours = layer.weight.detach()[0]
        gap = objective(ours, layer.bias.detach(), x, y, STRENGTH) - lowest
        found["weights kept or dropped otherwise"] += float(((ours == 0) != (theirs == 0)).sum())
        found["objective gap"] = max(found["objective gap"], abs(gap))
        found[f"exact zeros, {name}"] = float((ours == 0).sum())
    grouped = fit("Adam", GroupL1(STRENGTH, "inputs", size=3), x, y)
    found |= {"distance from a minimum by groups": _stationarity(grouped, x, y)}
    found |= {"groups of three that vanished": float((grouped.weight.view(10, 3) == 0).all(1).sum())}
    return found


def _stationarity(layer: nn.Linear, x: Tensor, y: Tensor) -> float:
    """How far 0 is from the subgradient of loss + STRENGTH sqrt(3) sum of norms of groups of three."""
    loss = functional.binary_cross_entropy_with_logits(layer(x), y)
    gradient = torch.autograd.grad(loss, layer.weight)[0].view(10, 3)
    groups, pull = layer.weight.detach().view(10, 3), STRENGTH * math.sqrt(3)
    norm = groups.norm(dim=1, keepdim=True)
    kept = (gradient + pull * groups / norm.where(norm > 0, 1.0)).norm(dim=1)
    dropped = (gradient.norm(dim=1) - pull).clamp_min(0)
    return float(torch.where(norm[:, 0] > 0, kept, dropped).max())


D1 = Check(
    "D1",
    "L1 discourages weights",
    "logistic regression on breast_cancer by SGD and Adam, against scikit-learn's saga; GroupL1 against its conditions",
    (
        Bar("weights kept or dropped otherwise", "==", 0),
        Bar("objective gap", "<=", 1e-6),
        Bar("exact zeros, SGD", ">=", 15),
        Bar("distance from a minimum by groups", "<=", 1e-5),
        Bar("groups of three that vanished", ">=", 1),
    ),
    _zeros,
)


def _ridge() -> Mapping[str, float]:
    x, _ = tumours()
    y, x = x[:, :1], torch.cat([x[:, 4:12], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    strength = 0.3
    closed = torch.linalg.solve(x.T @ x / len(x) + strength * torch.eye(x.shape[1]).double(), x.T @ y / len(x))
    layer = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    with penalize(layer, optimizer, L2(strength)):
        for _ in range(800):
            optimizer.zero_grad()
            ((layer(x) - y).square().mean() / 2).backward()
            optimizer.step()
    with seeded(0):
        net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    decaying = torch.optim.AdamW(decay_groups(net, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    decaying.step()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in net.named_parameters()}
    return {
        "from the closed form": float((layer.weight.detach()[0] - closed[:, 0]).abs().max()),
        "moved without a gradient: norm, bias, embedding": max(d for n, d in moved.items() if n != "2.weight"),
        "moved without a gradient: matrix": moved["2.weight"],
    }


D2 = Check(
    "D2",
    "L2 discourages large weights",
    "ridge regression by SGD and L2 against the closed form; one step of AdamW on decay_groups with zero gradients",
    (
        Bar("from the closed form", "<=", 1e-6),
        Bar("moved without a gradient: norm, bias, embedding", "==", 0),
        Bar("moved without a gradient: matrix", ">=", 1e-3),
    ),
    _ridge,
)

PATH = (0.0, 3e-4, 1e-3, 3e-3, 1e-2)
PATH_SEEDS = 6


def _overfitting() -> Mapping[str, float]:
    gained, rises, chosen = [], 0, []
    for seed in range(PATH_SEEDS):
        task = digits(model="linear", seed=seed, shots=20, batch_size=200)
        path = regularization_path(task, PATH, seed=seed, epochs=150, optimizer="adam", rate=0.1, test=True)
        norms, accuracy = path.column("norm"), path.column("test accuracy")
        rises += sum(b >= a for a, b in pairwise(norms))
        best = PATH.index(path.meta["best"])
        gained.append(accuracy[best] - accuracy[0])
        chosen.append(best)
    error = np.std(gained, ddof=1) / math.sqrt(PATH_SEEDS)
    return {
        "test accuracy gained": float(np.mean(gained)),
        "steps at which the norm does not fall": float(rises),
        "gain in standard errors": float(np.mean(gained) / max(error, 1e-12)),
        "seeds that choose no penalty": float(chosen.count(0)),
    }


D3 = Check(
    "D3",
    "to reduce overfitting",
    "L2 path on 200 digits, the strength chosen by validation loss: accuracy on the test split against none, 6 seeds",
    (
        Bar("test accuracy gained", ">=", 0.005),
        Bar("steps at which the norm does not fall", "==", 0),
        Bar("gain in standard errors", ">=", 2),
    ),
    _overfitting,
)

RATE, DECAY, TURNS = 0.2, 0.1, 12
FORMULAS: Mapping[str, Callable[[float], float]] = {  # rate of the step -> factor
    "rate": lambda rate: 1 - rate * DECAY,
    "schedule": lambda rate: 1 - rate / RATE * DECAY,
    "step": lambda _rate: 1 - DECAY,
    "corrected": lambda rate: 1 - rate * rate / RATE * DECAY,
}
SCHEDULERS: Mapping[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, TURNS),
    "one cycle": lambda made: torch.optim.lr_scheduler.OneCycleLR(made, RATE, total_steps=TURNS),
    "warm-up": lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, (step + 1) / 5)),
}


def _decays() -> Mapping[str, float]:
    worst, steps = 0.0, 0
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        for schedule in SCHEDULERS.values():
            for per, formula in FORMULAS.items():
                layer = nn.Linear(4, 3, dtype=torch.float64)
                optimizer = kind(layer.parameters(), lr=RATE)
                scheduler = schedule(optimizer)
                penalize(layer, optimizer, Decay(DECAY, per))  # type: ignore[arg-type]
                for _ in range(TURNS - 1):
                    expected = formula(optimizer.param_groups[0]["lr"])
                    before = layer.weight.detach().clone()
                    for p in layer.parameters():
                        p.grad = torch.zeros_like(p)
                    optimizer.step()
                    scheduler.step()
                    worst = max(worst, float((layer.weight.detach() / before - expected).abs().max()))
                    steps += 1
    return {"factor of a step - formula": worst, "steps": steps}


D4 = Check(
    "D4",
    "weight decay",
    "the factor of every step against its formula: three optimizers, three schedules, four formulas",
    (Bar("factor of a step - formula", "<=", 1e-7), Bar("steps", ">=", 100)),
    _decays,
)


def _features() -> Mapping[str, float]:
    x, y = tumours()
    factors = torch.exp(torch.linspace(-1, 1, x.shape[1], dtype=torch.float64))
    penalised = fit("SGD", L1(STRENGTH, factors=factors), x, y).weight.detach()[0]
    scaled = fit("SGD", L1(STRENGTH), x / factors, y).weight.detach()[0] / factors
    plain = fit("SGD", L1(STRENGTH), x, y).weight.detach()[0]
    return {
        "difference of weights": float((penalised - scaled).abs().max()),
        "weights kept or dropped otherwise": float(((penalised == 0) != (scaled == 0)).sum()),
        "difference without factors": float((penalised - plain).abs().max()),
    }


D6 = Check(
    "D6",
    "upweighting features",
    "L1 on breast_cancer with a factor f for each feature, against the same penalty on columns divided by f",
    (
        Bar("difference of weights", "<=", 1e-6),
        Bar("weights kept or dropped otherwise", "==", 0),
        Bar("difference without factors", ">=", 0.01),
    ),
    _features,
)

PAIRED_SEEDS = 20


def spurious(seed: int, sizes: Mapping[Split, int] | None = None) -> Task:
    """Two classes, a weak cause and a strong companion that deserts it in 5 % of the training examples.

    Features: three that show the class, each with noise of 1 standard deviation; one that shows the companion
    three times as large and almost without noise; twelve of noise. Groups: 2 * class + companion; equally many of
    each to validate and test.
    """
    random = generator(seed, "spurious")
    inputs: dict[Split, Tensor] = {}
    targets: dict[Split, Tensor] = {}
    groups: dict[Split, Tensor] = {}
    for split, size in (sizes or {"train": 600, "valid": 240, "test": 2000}).items():
        y = torch.arange(size) % 2
        deserted = torch.rand(size, generator=random) < (0.05 if split == "train" else 0.5)
        companion = torch.where(deserted, 1 - y, y)
        noise = torch.randn(size, 16, generator=random)
        cause = (2.0 * y - 1)[:, None] + noise[:, :3]
        inputs[split] = torch.cat([cause, (6.0 * companion - 3)[:, None] + 0.3 * noise[:, 3:4], noise[:, 4:]], 1)
        targets[split], groups[split] = y, 2 * y + companion
    return Task(
        "spurious",
        partial(build, "mlp", Interface((16,), 2), widths=(16,)),
        Examples(inputs, targets, 100, seed, groups=groups),
        cross_entropy,
        {"accuracy": accuracy},
        Interface((16,), 2),
    )


def worst(model: nn.Module, task: Task) -> float:
    """The accuracy of the worst group of the test split."""
    return float(by_group(model, task).meta["worst group"])


def _groups(seeds: int) -> Mapping[str, float]:
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        task = spurious(seed)
        data: Any = task.batches
        groups = data.groups["train"]
        even = replace(task, batches=replace(data, weight={"train": class_weights(groups)[groups]}))
        sampled = replace(task, batches=replace(data, balance=groups))
        options: RunOptions = {"epochs": 10, "rate": 0.01, "seed": seed, "weight_decay": 0.1, "keep": "last"}
        plain = train(task, progress=False, **options).model
        trained = {
            "ERM": plain,
            "weights": train(even, progress=False, **options).model,
            "sampling": train(sampled, progress=False, **options).model,
            "JTT": just_train_twice(task, first_epochs=6, upweight=20.0, **options).model,
            "GroupDRO": group_dro(task, step=0.1, **options).model,
        }
        for name, model in trained.items():
            found.setdefault(name, []).append(worst(model, task))
        refit_head(plain, task, draws=4, steps=150, seed=seed)
        found.setdefault("DFR", []).append(worst(plain, task))
    measured = {f"worst group, {name}": float(np.mean(values)) for name, values in found.items()}
    for name in [name for name in found if name != "ERM"]:
        gain = np.subtract(found[name], found["ERM"])
        measured[f"{name} over ERM, low"] = student(gain)[0]
    return measured


def upweighting(seeds: int = PAIRED_SEEDS) -> Mapping[str, float]:
    """The measurement of D5."""
    gradients = 0.0
    for name in weighting.LOSSES:
        case = weighting.case(name)
        gradients = max(gradients, float((weighting.of_weights(case) - weighting.of_copies(case)).abs().max()))
    measured = _groups(seeds)
    lows = [value for name, value in measured.items() if name.endswith("low")]
    return {"gradient of weight k - of k copies": gradients, "least gain over ERM": min(lows)} | dict(measured)


D5 = Check(
    "D5",
    "upweighting examples",
    "8 losses with weights 0 to 3 against copies; five ways to raise the worst group where a feature is spurious, "
    "20 paired seeds: the lower end of the 95 % interval of the gain",
    (Bar("gradient of weight k - of k copies", "<=", 1e-6), Bar("least gain over ERM", ">=", 0.02)),
    upweighting,
)

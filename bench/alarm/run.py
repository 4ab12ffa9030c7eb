"""The alarm of the first 20 steps on handwritten digits, without normalisation: what it finds, and what it imagines.

Bad starts are torch's defaults at 10 layers of ReLU, tanh, GELU and sigmoid, and at 30 of these and of SELU. Healthy
runs are those of the list below that end at 95 % on held-out digits or more; an alarm in one of them is a false one.
Runs with torch's default start at other depths are counted apart, and so are 10 layers of tanh and SELU trained to the
end: some of them train in spite of their start. The alarm changes nothing of a training, so that --reuse takes the
accuracies of runs that the newest result has from there, and trains these for 20 steps only. The cost of the alarm is a
ratio of processor seconds of 20 steps with and without it, in pairs, one after the other.

    python bench/alarm/run.py [--seeds 5] [--epochs 30] [--pairs 15] [--reuse]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.learn.alarm import Alarm
from steelyard.learn.start import init_
from steelyard.learn.tasks import task

HERE = Path(__file__).parent
STEPS = 20

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd 0.003": lambda p: torch.optim.SGD(p, lr=0.003, momentum=0.9),
    "sgd 0.01": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd 0.03": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "sgd 0.1": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam 0.0003": lambda p: torch.optim.Adam(p, lr=3e-4),
    "adam 0.001": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adam 0.003": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adam 0.01": lambda p: torch.optim.Adam(p, lr=1e-2),
    "rmsprop 0.001": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def mlp(depth: int, act: type[nn.Module] = nn.ReLU, width: int = 128) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(1 if i == 0 else 16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))


class Residual(nn.Module):
    """Blocks x + branch(x), whose last layer starts at zero or not; the head may start at zero, too."""

    def __init__(self, blocks: int, zero: bool, head: bool):
        super().__init__()
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(blocks)
        )
        for layer in [b[2] for b in self.blocks] * zero + [self.head] * head:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Rows(nn.Module):
    """An image is read row by row by a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn, self.head = kind(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def started(model: nn.Module, scheme: str, seed: int, x: Tensor) -> nn.Module:
    """`scheme`: 'default' leaves torch's values."""
    if scheme != "default":
        init_(model, scheme, x if scheme == "data" else None, seed=seed)
    return model


def bad() -> list[tuple[str, Callable[[], nn.Module], str, str]]:
    """(name, model, start, optimizer) of starts that are to be found."""
    chosen = (
        "sgd 0.003",
        "sgd 0.01",
        "sgd 0.1",
        "adam 0.0003",
        "adam 0.001",
        "adam 0.003",
        "adam 0.01",
        "rmsprop 0.001",
    )
    found = [(10, act) for act in (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid)]
    found += [(30, act) for act in (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SELU)]
    return [
        (
            f"{depth} {act.__name__} layers",
            lambda d=depth, a=act: mlp(d, a),
            "default",
            name,
        )
        for depth, act in found
        for name in chosen
    ]


def healthy() -> list[tuple[str, Callable[[], nn.Module], str, str]]:
    """(name, model, start, optimizer) of starts that should train."""
    found: list[tuple[str, Callable[[], nn.Module], str, str]] = []
    for depth in (3, 10, 20):
        for scheme in ("he", "data"):
            for name in ("sgd 0.01", "adam 0.001"):
                found.append(
                    (
                        f"{depth} ReLU layers",
                        lambda depth=depth: mlp(depth),
                        scheme,
                        name,
                    )
                )
    found.append(("30 ReLU layers", lambda: mlp(30), "data", "adam 0.0003"))
    found.append(("30 ReLU layers", lambda: mlp(30), "he", "adam 0.0003"))
    for act in (
        nn.Tanh,
        nn.GELU,
        nn.SiLU,
        nn.ELU,
        nn.LeakyReLU,
        nn.SELU,
        nn.Mish,
        nn.Sigmoid,
    ):
        for depth in (4, 10):
            found.append(
                (
                    f"{depth} {act.__name__} layers",
                    lambda d=depth, a=act: mlp(d, a),
                    "data",
                    "adam 0.001",
                )
            )
    found.append(("10 Tanh layers", lambda: mlp(10, nn.Tanh), "xavier", "sgd 0.03"))
    for depth in (2, 6):
        found.append((f"{depth} convolutions", lambda depth=depth: cnn(depth), "he", "sgd 0.03"))
        found.append(
            (
                f"{depth} convolutions",
                lambda depth=depth: cnn(depth),
                "data",
                "adam 0.003",
            )
        )
    for zero in (False, True):
        for head in (False, True):
            words = f"8 residual blocks{', shut' * zero}{', head 0' * head}"
            for name in ("sgd 0.03", "adam 0.001"):
                found.append((words, lambda z=zero, h=head: Residual(8, z, h), "default", name))
    for kind in (nn.LSTM, nn.GRU):
        found.append((kind.__name__, lambda kind=kind: Rows(kind), "default", "adam 0.01"))
        found.append((kind.__name__, lambda kind=kind: Rows(kind), "xavier", "adam 0.003"))
    found.append(
        (
            "transformer",
            task("digits", model="transformer").build,
            "default",
            "adam 0.003",
        )
    )
    found.append(("cnn of the library", task("digits").build, "default", "adam 0.001"))
    found.append(("lenet-5", task("digits", model="lenet-5").build, "default", "adam 0.001"))
    found.append(
        (
            "lenet-300-100",
            task("digits", model="lenet-300-100").build,
            "default",
            "sgd 0.03",
        )
    )
    for depth in (1, 2, 3):
        found.append(
            (
                f"{depth} ReLU layers",
                lambda depth=depth: mlp(depth),
                "default",
                "adam 0.003",
            )
        )
    return found


def in_spite() -> list[tuple[str, Callable[[], nn.Module], str, str]]:
    """Torch's default start at depths at which some runs train all the same."""
    names = ("sgd 0.01", "sgd 0.1", "adam 0.0003", "adam 0.001", "adam 0.003")
    ten = [
        (f"10 {act.__name__} layers", lambda a=act: mlp(10, a), "default", name)
        for act in (nn.Tanh, nn.SELU)
        for name in names
    ]
    return ten + [
        (f"{depth} ReLU layers", lambda depth=depth: mlp(depth), "default", name)
        for depth in (4, 6, 8)
        for name in ("sgd 0.03", "adam 0.001")
    ]


def trained(
    kind: str,
    of: tuple[str, Callable[[], nn.Module], str, str],
    seed: int,
    epochs: int,
    known: dict[Any, float],
) -> dict[str, Any]:
    """One run: 20 steps under the alarm, and the rest of the epochs for its accuracy on held-out digits.

    A bad start is not trained on; one whose accuracy is `known` takes it from there.
    """
    name, build, scheme, optimizer_name = of
    data = task("digits", seed=seed, augment=False)
    torch.manual_seed(seed)
    first = next(iter(data.batches("train", 0)))
    model = started(build(), scheme, seed, first.inputs)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    alarm = Alarm(model, optimizer, steps=STEPS, say=[].append)
    enough = kind == "bad" or (name, scheme, optimizer_name, seed) in known
    for epoch in range(epochs):
        for batch in data.batches("train", epoch):
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            if alarm.step == STEPS and enough:
                break
        if alarm.step == STEPS and enough:
            break
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(b.inputs).argmax(1) == b.targets for b in data.batches("test", 0)])
    found = [(f.step, f.layer, f.verdict) for f in alarm.found]
    return {
        "kind": kind, "model": name, "start": scheme, "optimizer": optimizer_name, "seed": seed,
        "accuracy": known.get((name, scheme, optimizer_name, seed), round(float(right.float().mean()), 4)),
        "alarms": found,
    }  # fmt: skip


def cost(pairs: int) -> dict[str, float]:
    """Processor seconds of 20 steps with the alarm over without, median of pairs, on two nets."""
    ratios: dict[str, list[float]] = {}
    for name, build in (
        ("10 ReLU layers", lambda: mlp(10)),
        ("cnn of the library", task("digits").build),
    ):
        data = task("digits", augment=False)
        batches = list(data.batches("train", 0))[:STEPS]
        found = []
        for _ in range(pairs):
            taken = []
            for watched in (False, True):
                torch.manual_seed(0)
                model = started(build(), "he", 0, batches[0].inputs)
                optimizer = OPTIMIZERS["adam 0.001"](model.parameters())
                start = time.process_time()
                alarm = Alarm(model, optimizer, say=[].append) if watched else None
                for batch in batches:
                    optimizer.zero_grad()
                    functional.cross_entropy(model(batch.inputs), batch.targets).backward()
                    optimizer.step()
                taken.append(time.process_time() - start)
                if alarm is not None:
                    alarm.close()
            found.append((taken[1] - taken[0]) / STEPS * 1e3)
            ratios.setdefault(name, []).append(taken[1] / taken[0])
        ratios[f"{name}, ms a step more"] = found
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--reuse", action="store_true", help="accuracies that the newest result has")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    newest = max((HERE / "results").glob("*.json"), default=None) if told.reuse else None
    kept = [row for row in json.loads(newest.read_text())["runs"] if row["kind"] != "bad"] if newest else []
    known = {(row["model"], row["start"], row["optimizer"], row["seed"]): row["accuracy"] for row in kept}
    for kind, runs, seeds in (
        ("bad", bad(), told.seeds),
        ("healthy", healthy(), min(told.seeds, 2)),
        ("in spite", in_spite(), min(told.seeds, 2)),
    ):
        for of in runs:
            for seed in range(seeds):
                rows.append(trained(kind, of, seed, told.epochs, {} if kind == "bad" else known))
                print(rows[-1], flush=True)
    by = {kind: [row for row in rows if row["kind"] == kind] for kind in ("bad", "healthy", "in spite")}
    good = [row for row in by["healthy"] if row["accuracy"] >= 0.95]
    spite = [row for row in by["in spite"] if row["accuracy"] >= 0.95]
    missed = [row for row in by["bad"] if not row["alarms"]]
    ten = [row for row in by["in spite"] if row["model"].startswith("10 ")]
    shallow = [row for row in spite if row not in ten]
    figures: dict[str, Any] = {
        "bad starts": len(by["bad"]),
        "bad starts missed": [f"{row['model']}, {row['optimizer']}, seed {row['seed']}" for row in missed],
        "bad starts found": sum(bool(row["alarms"]) for row in by["bad"]),
        "latest step of an alarm": max(row["alarms"][0][0] for row in by["bad"] if row["alarms"]),
        "runs meant to be healthy": len(by["healthy"]),
        "of these at 95 % or more": len(good),
        "false alarms among these": sum(bool(row["alarms"]) for row in good),
        "alarms among the others": sum(bool(row["alarms"]) for row in by["healthy"] if row not in good),
        "default starts of 4 to 8 layers at 95 % or more": len(shallow),
        "alarms among these": sum(bool(row["alarms"]) for row in shallow),
        **{
            f"10 {act} layers, default: accuracies, at 95 % or more, alarms": [
                sorted(row["accuracy"] for row in ten if act in row["model"]),
                sum(row["accuracy"] >= 0.95 for row in ten if act in row["model"]),
                sum(bool(row["alarms"]) for row in ten if act in row["model"]),
            ]
            for act in ("Tanh", "SELU")
        },
        "cost of 20 steps, with over without": cost(told.pairs),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    machine = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "options": vars(told),
    }
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{result['date']}.json"
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a line for each run
    path.write_text(f'{json.dumps(result | {"figures": figures}, indent=1)[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()

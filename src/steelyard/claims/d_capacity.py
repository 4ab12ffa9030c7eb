"""Chapter D, discipline: the weights of trained nets tell which of them will do worse on unseen examples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.core.table import Table
from steelyard.explain.capacity import capacity, rank_gaps
from steelyard.formats.module import from_module
from steelyard.learn.models import model
from steelyard.learn.pool import label_noise
from steelyard.learn.run import Run
from steelyard.learn.task import build_seeded

MODELS, WRONG = 30, 0.4  # nets, and the largest share of wrong labels that one of them learns
LEARNED, LONGEST = 0.05, 100  # the training loss at which a net is done; epochs at most
CHOICES: Mapping[str, Sequence[float]] = {
    "width": (32, 64, 128),
    "depth": (1, 2, 3),
    "rate": (0.005, 0.01),
    "batch": (50, 200),
    "decay": (0.0, 0.3, 1.0),
}
SAID = {"norm": "spectral product", "margin": "normalised margin", "sharpness": "random weights, by magnitude"}


def measured(seed: int, wrong: float = WRONG) -> Table:
    """`capacity` of one net of random size, training and share of wrong labels, once it knows its 200 digits."""
    random = np.random.default_rng([seed, 0xCA9])
    c = {name: random.choice(values) for name, values in CHOICES.items()}
    task = label_noise(digits(shots=20, batch_size=int(c["batch"])), float(random.uniform(0, wrong)), seed=seed)
    assert task.interface is not None
    widths = (int(c["width"]),) * int(c["depth"])
    task = task.with_model(partial(model, "mlp", task.interface, widths=widths))
    net = build_seeded(task, seed)
    start = from_module(copy.deepcopy(net))
    run = Run(task, net, epochs=LONGEST, rate=float(c["rate"]), schedule="constant", weight_decay=float(c["decay"]),
              seed=seed, keep="last")  # fmt: skip
    batches = 200 // int(c["batch"])
    with run:
        for step in run:
            last = run.log[-batches:]
            if (step.index + 1) % batches == 0 and sum(row["loss"] for row in last) < LEARNED * batches:
                break
    return capacity(net, task, start=start, draws=3)


def _capacities() -> Mapping[str, float]:
    tables = [measured(seed) for seed in range(MODELS)]
    ranked = {str(row["measure"]): row for row in rank_gaps(tables).rows}
    found = {f"{family}: {x}": float(ranked[name][x]) for family, name in SAID.items() for x in ("tau", "low")}  # type: ignore[arg-type]
    found |= {f"{family}: high": float(ranked[name]["high"]) for family, name in SAID.items()}  # type: ignore[arg-type]
    found["models"] = len(tables)
    gaps = [next(row["value"] for row in table.rows if row["measure"] == "gap in accuracy") for table in tables]
    found |= {"smallest gap": float(min(gaps)), "largest gap": float(max(gaps))}  # type: ignore[type-var, arg-type]
    others = {name: row["tau"] for name, row in ranked.items() if name not in SAID.values()}
    return found | {f"tau of {name}": float(tau) for name, tau in others.items()}  # type: ignore[arg-type]


D7 = Check(
    "D7",
    "weights determine the capacity to generalise",
    "30 MLPs of random width, depth, rate, batch, decay and share of wrong labels (0 to 40 %), trained until they know "
    "200 digits: Kendall's tau of a norm, a margin and a sharpness with the test gap, and lower ends of 95 % intervals",
    (
        *(Bar(f"{family}: low", ">=", 0.05) for family in SAID),
        Bar("models", ">=", 30),
    ),
    _capacities,
)

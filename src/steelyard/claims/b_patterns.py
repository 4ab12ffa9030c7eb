"""Chapter B, learning: what the layers come to know, and what of it holds for inputs that were never seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from steelyard.claims.b_learning import random_labels
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.explain.probes import INPUTS, Probes
from steelyard.explain.ranking import spearman
from steelyard.learn.intervals import student
from steelyard.learn.models import model
from steelyard.learn.run import train
from steelyard.learn.task import Task

NARROW = (16, 16, 16)  # units: so few that a layer at random lets much of the image go
SEEDS, EPOCHS = 5, (0, 1, 2, 4, 8)


def narrow(seed: int) -> Task:
    """Digits for a net of three narrow layers."""
    task = digits(seed=seed)
    assert task.interface is not None
    return task.with_model(partial(model, "mlp", task.interface, widths=NARROW))


def known(task: Task, labelled: Task, seed: int) -> dict[str, list[float]]:
    """What each layer knows of `task` at `EPOCHS` while it is trained on `labelled`."""
    probes = Probes(task, at=EPOCHS)
    train(labelled, epochs=EPOCHS[-1], seed=seed, rate=0.01, keep="last", gauges=[probes], progress=False)
    found: dict[str, list[float]] = {}
    for row in probes.table().rows:
        found.setdefault(str(row["layer"]), []).append(float(row["known"]))  # type: ignore[arg-type]
    return found


def _patterns() -> Mapping[str, float]:
    runs = [(known(narrow(seed), narrow(seed), seed), known(narrow(seed), random_labels(narrow(seed)), seed))
            for seed in range(SEEDS)]  # fmt: skip
    layers = [layer for layer in runs[0][0] if layer != INPUTS]
    rises = {layer: np.array([true[layer][-1] - true[layer][0] for true, _ in runs]) for layer in layers}
    noise = {layer: np.array([drawn[layer][-1] - drawn[layer][0] for _, drawn in runs]) for layer in layers}
    means = {layer: np.mean([true[layer] for true, _ in runs], 0) for layer in layers}
    found = {
        "least rise of a layer, low": min(student(rise)[0] for rise in rises.values()),
        "least order in time": min(spearman(np.array(EPOCHS), mean) for mean in means.values()),
        "least rise over random labels, low": min(student(rises[layer] - noise[layer])[0] for layer in layers),
        "rise of the inputs": max(abs(true[INPUTS][-1] - true[INPUTS][0]) for true, _ in runs),
    }
    return found | {f"{layer}, {when}": float(mean[i]) for layer, mean in means.items()
                    for i, when in ((0, "start"), (-1, "end"))}  # fmt: skip


B12 = Check(
    "B12",
    "each batch progressively encodes useful patterns",
    "linear probes on held-out digits after 0 to 8 epochs of a narrow net, 5 seeds: the lower end of the 95 % interval "
    "of each layer's rise, its order in time, and its rise over that of training with random labels",
    (
        Bar("least rise of a layer, low", ">=", 0.02),
        Bar("least order in time", ">=", 0.7),
        Bar("least rise over random labels, low", ">=", 0.02),
        Bar("rise of the inputs", "==", 0),
    ),
    _patterns,
)

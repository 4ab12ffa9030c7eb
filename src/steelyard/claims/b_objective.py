"""Chapter B, learning: what is minimised is what is printed, and it is the same in one batch or in many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from steelyard.claims import weighting
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.learn.penalties import L1, L2, L2SP, ElasticNet, GroupL1, Spectral
from steelyard.learn.run import Run
from steelyard.learn.task import Batch, Split

STRENGTH, DECAY = 1e-3, 1e-2


def _data_term(weights: Mapping[str, np.ndarray], batch: Batch) -> float:
    """The mean cross-entropy of the linear model, in numpy."""
    x, y = batch.arguments[0].flatten(1).numpy(), batch.targets.numpy()
    z = x @ weights["head.weight"].T + weights["head.bias"]
    z = z - z.max(1, keepdims=True)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean())


def _penalties(w: np.ndarray, start: np.ndarray) -> float:
    """The penalties of `_objective` on the matrix, from their definitions."""
    parts = [
        np.abs(w).sum(),
        np.square(w).sum() / 2,
        0.5 * np.abs(w).sum() + 0.5 * np.square(w).sum() / 2,
        math.sqrt(w.shape[0]) * np.sqrt(np.square(w).sum(0)).sum(),
        np.square(w - start).sum() / 2,
        np.linalg.svd(w, compute_uv=False)[0] ** 2 / 2,
    ]
    return float(STRENGTH * sum(parts) + DECAY * np.square(w).sum() / 2)


def _values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def _objective() -> Mapping[str, float]:
    plain = digits(model="linear")

    def batches(split: Split, epoch: int) -> Iterable[Batch]:
        return [Batch(b.arguments[0].double(), b.targets) for b in plain.batches(split, epoch)]

    task = replace(plain, build=lambda: plain.build().double(), batches=batches)
    penalties = [L1(STRENGTH), L2(STRENGTH), ElasticNet(STRENGTH), GroupL1(STRENGTH, "inputs")]
    penalties += [L2SP(STRENGTH, where="*.weight"), Spectral(STRENGTH)]
    worst, differences = 0.0, []
    with Run(task, epochs=2, optimizer="sgd", rate=0.05, weight_decay=DECAY, penalties=penalties) as run:
        start = before = _values(run.model)
        for step in run:
            expected = _data_term(before, step.batches[0]) + _penalties(before["head.weight"], start["head.weight"])
            worst = max(worst, abs(step.objective - expected))
            differences.append(step.objective - step.loss)
            before = _values(run.model)
    printed = run.table().column("objective")
    return {
        "printed - recomputed": worst,
        "steps": len(printed),
        "least share of the penalties": min(differences),
    }


B7 = Check(
    "B7",
    "the loss is minimised",
    "the objective that a run prints, against data term + six penalties + the decay of the optimizer, in numpy",
    (Bar("printed - recomputed", "<=", 1e-7), Bar("steps", ">=", 20), Bar("least share of the penalties", ">=", 1e-3)),
    _objective,
)


def _apart(found: Tensor, name: str) -> float:
    return float((found - weighting.of_copies(weighting.case(name))).abs().max())


def _batches() -> Mapping[str, float]:
    processes = weighting.of_processes()
    parts = {n: max(_apart(weighting.of_parts(weighting.case(n), k), n) for k in (1, 2, 8)) for n in weighting.LOSSES}
    return {
        "1, 2 and 8 parts": max(parts.values()),
        "2 processes": max(_apart(found, name) for name, found in processes.items()),
        "losses": len(processes),
        "a mean of means": _apart(_mean_of_means(weighting.case("cross_entropy")), "cross_entropy"),
    }


def _mean_of_means(case: weighting.Case) -> Tensor:
    """What is done elsewhere: the means of two halves of the batch, averaged."""
    model = case.model()
    for rows in (slice(0, 15), slice(15, weighting.EXAMPLES)):
        (case.loss.mean(case.outputs(model, rows), case.y[rows], case.weight[rows]) / 2).backward()
    return weighting.flat(model)


B8 = Check(
    "B8",
    "over many batches",
    "gradients of 8 losses with weights of examples and of classes: accumulated, and in two processes, against copies "
    "in one batch",
    (
        Bar("1, 2 and 8 parts", "<=", 1e-6),
        Bar("2 processes", "<=", 1e-6),
        Bar("losses", ">=", 8),
        Bar("a mean of means", ">=", 1e-3),
    ),
    _batches,
)

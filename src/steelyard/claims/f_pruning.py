"""Chapter F, what networks have too much of: redundant dimensions, and weights that can go."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from steelyard import formats
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits, inputs_of, trained
from steelyard.core.transform import on
from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.edit.nm import PruneNM
from steelyard.edit.prune import Prune
from steelyard.edit.sparsegpt import SparseGPT
from steelyard.explain.redundancy import redundancy, truncated
from steelyard.formats.module import from_module, into_module
from steelyard.learn.evaluate import evaluating, mean_outcomes
from steelyard.learn.evidence import score
from steelyard.learn.models import model as build
from steelyard.learn.sparse import train_sparse
from steelyard.learn.structured import prune_structured_
from steelyard.learn.task import Interface, Task, build_seeded, first_batch

MATRICES = where(min_ndim=2, kind="float")
LOST = 0.002  # a fifth of a percentage point
ERROR = 0.001  # of the squares of the outputs of each layer


def accuracy(data: Task, model: nn.Module, weights: Weights | None = None) -> float:
    """On the test split, with other weights if there are any."""
    if weights is not None:
        model = copy.deepcopy(model)
        into_module(weights, model)
    return mean_outcomes(model, data, "test")[data.headline]


def _small_cnn() -> nn.Module:
    return build("cnn", Interface((1, 8, 8), 10), channels=(16, 32), hidden=64)


def _redundant() -> Mapping[str, float]:
    """Nets of two kinds and three seeds, each matrix cut at the rank that is reported for so little of its outputs."""
    lost, redundant, effective = [], [], []
    for data in (digits("lenet-300-100"), digits().with_model(_small_cnn)):
        for seed in range(3):
            model = trained(data, epochs=8, seed=seed)
            weights, evidence = from_module(model), score(model, data, "hessian")
            table = redundancy(weights, evidence, error=ERROR)
            ranks = dict(zip(table.column("name"), table.column("rank"), strict=True))
            cut = truncated(weights, ranks, evidence)
            lost.append(accuracy(data, model) - accuracy(data, model, cut))
            redundant.append(table.meta["redundant"])
            sides = zip(table.column("effective rank"), table.column("outputs"), table.column("inputs"), strict=True)
            effective += [rank / min(m, n) for rank, m, n in sides]
    return {
        "lost by cutting at the rank": float(np.mean(lost)),
        "redundant weights": float(np.mean(redundant)),
        "lost at most": max(lost),
        "effective rank over full rank": float(np.mean(effective)),
    }


F1 = Check(
    "F1",
    "networks hold redundant parameters",
    "rank at which each layer's outputs lose 0.1 % of their squares; six nets on digits cut there; held-out accuracy",
    (Bar("lost by cutting at the rank", "<=", LOST), Bar("redundant weights", ">=", 0.25)),
    _redundant,
)


def output_error(weights: Weights, pruned: Weights, evidence: Weights) -> float:
    """tr(D H D^T) over tr(W H W^T), summed over the matrices."""
    lost = whole = 0.0
    for name, item in weights.select(MATRICES).items():
        h = evidence[name].array()[0].astype(np.float64)
        w, p = (x.astype(np.float64).reshape(len(x), -1) for x in (item.array(), pruned[name].array()))
        lost, whole = lost + float(np.trace((p - w) @ h @ (p - w).T)), whole + float(np.trace(w @ h @ w.T))
    return lost / whole


def cpu_ratio(small: nn.Module, large: nn.Module, x: torch.Tensor, rounds: int = 15) -> float:
    """The processor time of one forward pass: the median of interleaved pairs, on one thread."""
    threads, ratios = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with evaluating(small), evaluating(large):
            for _ in range(rounds + 2):
                times = []
                for model in (small, large):
                    start = time.thread_time()
                    for _ in range(3):
                        model(x)
                    times.append(time.thread_time() - start)
                ratios.append(times[0] / times[1])
    finally:
        torch.set_num_threads(threads)
    return median(ratios[2:])


def _narrowed(data: Task) -> Mapping[str, float]:
    """A CNN with half of its parameters: through a file into the original code."""
    model = trained(data, epochs=6)
    small, again = copy.deepcopy(model), build_seeded(data, 9)
    prune_structured_(small, first_batch(data, "train"), 0.65, budget="multiplications")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "narrow.safetensors"
        size = formats.write(from_module(small), path)
        before = formats.write(from_module(model), Path(folder) / "whole.safetensors")
        into_module(formats.open(path), again, resize=True)
    x = inputs_of(data, "test")[:256]
    with evaluating(small), evaluating(again):
        difference = float((small(x) - again(x)).abs().max())
    count = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
    return {
        "structured: parameters left": count[0] / count[1],
        "structured: bytes left": size / before,
        "structured: processor time left": cpu_ratio(again, model, x),
        "structured: difference after reload": difference,
    }


def _pruned() -> Mapping[str, float]:
    data = digits("lenet-300-100")
    model = trained(data, epochs=15)
    weights, evidence = from_module(model), score(model, data, "hessian")
    dense = accuracy(data, model)
    curve = {s: accuracy(data, model, on(MATRICES, Prune(s))(weights)) for s in (0.5, 0.8, 0.9)}
    gradual: Any = train_sparse(data, None, 0.9, epochs=15, rate=3e-3, seed=0, progress=False).model
    matrices = from_module(gradual).select(MATRICES)
    zeros = sum(int((x == 0).sum()) for x in matrices.arrays().values()) / matrices.size
    errors = [
        output_error(weights, on(MATRICES, step)(weights), evidence)
        for step in (PruneNM("2:4"), SparseGPT(by=evidence, pattern="2:4"))
    ]
    found = accuracy(data, gradual)
    return {
        "lost at 50 %": dense - curve[0.5],
        "lost at 90 %, gradual": dense - found,
        "gradual over one shot at 90 %": found - curve[0.9],
        "2:4 error, data-aware over magnitude": errors[1] / errors[0],
        "lost at 80 %": dense - curve[0.8],
        "lost at 90 %": dense - curve[0.9],
        "zeros of the gradual net": zeros,
        **_narrowed(digits("cnn")),
    }


F2 = Check(
    "F2",
    "weights can be pruned",
    "accuracy against sparsity on digits: one shot, gradual, 2:4 by data; a CNN at 35 % of its work, from its file",
    (
        Bar("lost at 50 %", "<=", 0.01),
        Bar("lost at 90 %, gradual", "<=", 0.03),
        Bar("gradual over one shot at 90 %", ">=", 0.05),
        Bar("zeros of the gradual net", ">=", 0.8999),
        Bar("2:4 error, data-aware over magnitude", "<=", 0.7),
        Bar("structured: parameters left", "<=", 0.6),
        Bar("structured: processor time left", "<=", 0.8),
        Bar("structured: difference after reload", "==", 0),
    ),
    _pruned,
)

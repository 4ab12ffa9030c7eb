"""How good a model is: one number per example, its mean with a confidence interval, and two models compared.

Decides which interval belongs to which kind of outcome. Changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.intervals import blocks, paired_proportions, student, wilson
from steelyard.learn.measures import IGNORED
from steelyard.learn.processes import reshard
from steelyard.learn.task import Split, Task, apply, check_model, check_task, device_of, per_example


def outcomes(model: nn.Module, task: Task, split: Split = "test") -> dict[str, np.ndarray]:
    """Each metric, and the loss, as one number per example (float64), in the order of the split.

    The model runs in evaluation mode and is left in the mode it was in. Raises ModelError for an empty split.
    """
    found = _measure(model, task, split)[0]
    if not len(found["loss"]):
        raise ModelError(f"the {split} split of the task {task.name!r} is empty")
    return found


def evaluate(model: nn.Module, task: Task, split: Split = "test", confidence: float = 0.95) -> Table:
    """The mean of each metric and of the loss over a split, with its confidence interval.

    Outcomes that are all 0 or 1 get Wilson's interval, others Student's t; where the examples follow one another
    (``task.ordered``), neighbours are alike, and the interval is that of a bootstrap of blocks. Where the task says
    what a model that has learned nothing gets, there is a column for it.
    """
    rows = []
    for name, values in outcomes(model, task, split).items():
        (low, high), method = interval(values, confidence, task.ordered)
        rows.append({"metric": name, "value": float(values.mean()), "low": low, "high": high})
        rows[-1] |= {"examples": len(values), "method": method}
        if task.baselines:
            rows[-1]["baseline"] = task.baselines.get(name)
    columns = [
        Column("metric"),
        Column("value", "", "mean over the examples"),
        Column("low", "", f"of the {confidence:.0%} interval"),
        Column("high", "", f"of the {confidence:.0%} interval"),
        *([Column("baseline", "", "of a model that has learned nothing")] if task.baselines else []),
        Column("examples"),
        Column("method", "", "of the interval"),
    ]
    return Table.of(
        f"{task.name}: {split}", columns, rows, {"task": task.name, "split": split, "confidence": confidence}
    )


def compare(a: nn.Module, b: nn.Module, task: Task, split: Split = "test", confidence: float = 0.95) -> Table:
    """Two models on the same examples: both means, the difference b - a with its interval, and their agreement.

    The difference is paired: Newcombe's method 10 for 0/1 outcomes, Student's t on the differences otherwise, and
    blocks of them where the examples follow one another.
    Agreement is the share of decisions (the largest output) in which the two are the same; None for regression.
    """
    (of_a, decided_a), (of_b, decided_b) = _measure(a, task, split), _measure(b, task, split)
    agreement = (
        float((decided_a == decided_b).mean()) if decided_a.size and decided_a.shape == decided_b.shape else None
    )
    rows = []
    for name in of_a:
        x, y = of_a[name], of_b[name]
        if not len(x):
            raise ModelError(f"the {split} split of the task {task.name!r} is empty")
        (low, high), method = paired_interval(x, y, confidence, task.ordered)
        rows.append({"metric": name, "a": float(x.mean()), "b": float(y.mean()), "low": low, "high": high})
        rows[-1] |= {
            "difference": float(y.mean() - x.mean()),
            "agreement": agreement,
            "examples": len(x),
            "method": method,
        }
    columns = ["metric", "a", "b", "difference", "low", "high", "agreement", "examples", "method"]
    meta = {"task": task.name, "split": split, "confidence": confidence}
    return Table.of(
        f"{task.name}: {split}, b against a", [Column(n, "%" if n == "agreement" else "") for n in columns], rows, meta
    )


def mean_outcomes(model: nn.Module, task: Task, split: Split, *, required: bool = True) -> dict[str, float]:
    """The mean of the loss and of each metric; {} for an empty split that is not required."""
    found = _measure(model, task, split)[0]
    if len(found["loss"]):
        return {name: float(values.mean()) for name, values in found.items()}
    if required:
        raise ModelError(f"the {split} split of the task {task.name!r} is empty: nothing to choose by, use keep='last'")
    return {}


def _measure(model: nn.Module, task: Task, split: Split) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outcomes by metric, and the decisions (the largest output; none for a single output)."""
    check_task(task)
    check_model(model)
    functions = {**task.metrics, "loss": task.loss}
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    decisions: list[Tensor] = []
    device = device_of(model)
    with evaluating(model):
        for number, batch in enumerate(task.batches(split, 0)):
            batch = batch.to(device)
            try:
                outputs = apply(model, batch)
                for name, function in functions.items():
                    parts[name].append(per_example(function, outputs, batch, name).double().cpu())
            except ModelError as error:
                raise ModelError(f"batch {number} of the {split} split: {error}") from (error.__cause__ or error)
            if outputs.ndim > 1 and outputs.shape[-1] > 1 and not batch.targets.is_floating_point():
                decided = outputs.argmax(-1)
                counted = decided[batch.targets != IGNORED] if decided.shape == batch.targets.shape else decided
                decisions.append(counted.cpu().flatten())
    values = {name: torch.cat(found).numpy() if found else np.zeros(0) for name, found in parts.items()}
    return values, torch.cat(decisions).numpy() if decisions else np.zeros(0, np.int64)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within the block; then every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        for module, training in modes:
            module.training = training


def training_mode(model: nn.Module) -> None:
    """Training mode; but a module whose own parameters are all frozen keeps its running statistics, too."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own) and any(True for _ in module.buffers(recurse=False)):
            module.eval()


@contextmanager
def unfused() -> Iterator[None]:
    """Within the block attention calls the layers inside it; the fused path calls none, so none could be watched."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def interval(values: np.ndarray, confidence: float, ordered: bool) -> tuple[tuple[float, float], str]:
    """The interval of a mean, and the method that it is by."""
    if ordered:
        return blocks(values, confidence), "block bootstrap"
    if binary(values):
        return wilson(float(values.sum()), len(values), confidence), "Wilson"
    return student(values, confidence), "Student t"


def paired_interval(a: np.ndarray, b: np.ndarray, confidence: float, ordered: bool) -> tuple[tuple[float, float], str]:
    """The interval of mean(b) - mean(a) over the same examples, and the method that it is by."""
    if binary(a) and binary(b) and not ordered:
        return paired_proportions(a, b, confidence), "Newcombe, paired"
    ends, method = interval(b - a, confidence, ordered)
    return ends, f"{method}, paired"


def binary(values: np.ndarray) -> bool:
    """Whether all outcomes are 0 or 1: shares, with intervals of their own."""
    return bool(np.isin(values, (0.0, 1.0)).all())

"""What the first layer of a network looks for: its filters, what each responds to, and what is lost without it.

Decides which layer is the first with filters, how a response is summed up, and the estimate of importance;
the proof is removal on examples that were not trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.explain.layers import collect, execution_order, find_layer
from steelyard.explain.ranking import spearman
from steelyard.learn.evaluate import evaluating
from steelyard.learn.task import Split, Task, apply, first_batch


def filters(model: nn.Module, task: Task, layer: str | None = None, *, split: Split = "train") -> Table:
    """Each filter of a layer: its taps, its response to each class, and its estimated importance.

    response = mean over examples and positions of max(0, z), the filter's rectified pre-activation;
    selectivity = the share of its variance over examples that lies between the classes (eta squared);
    importance = mean over examples of (sum over positions of z * dL/dz)^2, the first-order estimate of the
    squared change of an example's loss when the filter's output becomes zero.

    Args:
        model: any module with a convolution, or with a dense layer on images.
        task: a classification task; gives inputs, classes and the loss.
        layer: the name of the layer; None = the first that runs.
        split: over which responses and importance are measured.

    Returns a row for each filter, the most important first; ``taps`` is nested: channels, rows, columns.

    Raises UnknownNameError for a layer that is not there, ModelError for one without filters.

    Source of the estimate: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019.
    """
    layer = _layer(model, task, layer)
    taps = _taps(find_layer(model, layer), task)
    _, out, _, targets = collect(model, task, layer, split)
    names = _classes(task, targets)
    response = out.clamp_min(0).double().reshape(*out.shape[:2], -1).mean(2)  # (examples, filters)
    means = torch.stack([response[targets == k].mean(0) for k in range(len(names))])  # (classes, filters)
    selectivity = _between(response, means, targets)
    importance = _importance(model, task, layer, split)
    rows = [
        {
            "filter": f,
            "importance": float(importance[f]),
            "response": float(response[:, f].mean()),
            "class": names[int(means[:, f].nan_to_num(-1.0).argmax())],
            "selectivity": float(selectivity[f]),
            "responses": means[:, f].tolist(),
            "taps": taps[f].tolist(),
        }
        for f in importance.argsort(descending=True, stable=True).tolist()
    ]
    columns = [
        Column("filter"),
        Column("importance", about="estimated squared change of the loss without it"),
        Column("response", about="mean rectified pre-activation"),
        Column("class", about="where it responds most"),
        Column("selectivity", "%", "share of its variance that lies between the classes"),
        Column("responses", about="mean response to each class, in the order of the classes"),
        Column("taps", about="channels x rows x columns"),
    ]
    meta = {"layer": layer, "split": split, "classes": list(names), "shape": list(taps.shape[1:])}
    return Table.of(f"filters of {layer}", columns, rows, meta)


def filter_removal(model: nn.Module, task: Task, layer: str | None = None, *, split: Split = "test") -> Table:
    """What is lost on `split` when a filter's output is zero: the proof of `filters`.

    Args:
        model, task, layer: as for `filters`.
        split: of which nothing was trained on.

    Returns a row for each filter, the largest loss first: the change of the loss, of the headline metric,
    and of the metric on each class. The meta holds the Spearman correlation of the estimated importance
    (from the training split) with the change of the loss, and the class of each column.

    Raises UnknownNameError for a layer that is not there, ModelError for one without filters.
    """
    layer = _layer(model, task, layer)
    _, out, outputs, targets = collect(model, task, layer, split)
    metric = task.metrics[task.headline]
    names = _classes(task, targets)
    loss, score = task.loss(outputs, targets).double(), metric(outputs, targets).double()
    rows: list[dict[str, Any]] = []
    for f in range(out.shape[1]):
        result = _without(model, task, layer, f, split)
        lost, moved = task.loss(result, targets).double() - loss, metric(result, targets).double() - score
        by_class = [float(moved[targets == k].mean()) for k in range(len(names))]
        worst = int(np.nanargmin(by_class))
        rows.append({"filter": f, "loss": float(lost.mean()), "metric": float(moved.mean())})
        rows[-1] |= {"worst class": names[worst], "worst": by_class[worst], "by class": by_class}
    importance = _importance(model, task, layer, "train").numpy()
    agreement = spearman(importance, np.array([r["loss"] for r in rows]))
    columns = [
        Column("filter"),
        Column("loss", about="change of the mean loss without it"),
        Column("metric", "pp", f"change of {task.headline}"),
        *(Column("worst class"), Column("worst", "pp", "change of the metric on that class")),
        Column("by class", "pp", "change of the metric on each class"),
    ]
    meta = {"layer": layer, "split": split, "examples": len(targets), "classes": list(names)}
    meta["spearman of importance and loss"] = agreement
    rows.sort(key=lambda r: -r["loss"])
    return Table.of(f"removal of the filters of {layer}", columns, rows, meta)


def _classes(task: Task, targets: Tensor) -> tuple[str, ...]:
    """The names of the classes; raises ModelError where an example is not of one class."""
    if targets.ndim != 1 or targets.is_floating_point():
        raise ModelError(f"the task {task.name!r} does not put each example into a class that a filter responds to")
    return task.classes or tuple(str(int(c)) for c in targets.unique())


def _layer(model: nn.Module, task: Task, layer: str | None) -> str:
    if layer is None:
        order = execution_order(model, first_batch(task, "train").inputs)
        layer = next((n for n in order if isinstance(find_layer(model, n), (nn.Conv1d, nn.Conv2d, nn.Linear))), None)
        if layer is None:
            raise ModelError(f"{type(model).__name__} has no convolution and no dense layer; it has no filters to show")
    if not isinstance(find_layer(model, layer), (nn.Conv1d, nn.Conv2d, nn.Linear)):
        raise ModelError(f"the layer {layer!r} is a {type(find_layer(model, layer)).__name__}; it has no filters")
    return layer


def _taps(layer: nn.Module, task: Task) -> Tensor:
    """(filters, channels, rows, columns); a dense layer on images has filters of the image's size."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr,operator]
    if isinstance(layer, nn.Conv2d):
        return weight
    shape = task.interface.shape if task.interface is not None else ()
    if isinstance(layer, nn.Linear) and len(shape) == 3 and weight[0].numel() == torch.Size(shape).numel():
        return weight.reshape(-1, *shape)
    return weight.reshape(len(weight), -1, 1, weight.shape[-1])


def _between(response: Tensor, means: Tensor, targets: Tensor) -> Tensor:
    """Eta squared of each filter: (filters,); 0 for one that never responds."""
    total = (response - response.mean(0)).square().sum(0)
    counts = torch.bincount(targets, minlength=len(means)).double()
    between = (counts[:, None] * (means - response.mean(0)).square()).nansum(0)
    return torch.where(total > 0, between / total.clamp_min(1e-300), torch.zeros_like(total))


def _importance(model: nn.Module, task: Task, layer: str, split: Split) -> Tensor:
    """mean over examples of (sum over positions of z * dL/dz)^2 for each filter: (filters,) float64."""
    seen: list[Tensor] = []
    handle = find_layer(model, layer).register_forward_hook(lambda _m, _a, out: seen.append(out))
    total, examples = torch.zeros(0, dtype=torch.float64), 0
    try:
        with evaluating(model), torch.enable_grad():
            for batch in task.batches(split, 0):
                seen.clear()
                loss = task.loss(apply(model, batch), batch.targets).sum()
                (slope,) = torch.autograd.grad(loss, seen[-1])
                product = (seen[-1].detach() * slope).double()
                squared = product.reshape(*product.shape[:2], -1).sum(2).square().sum(0)
                total = total + squared if len(total) else squared
                examples += len(batch)
    finally:
        handle.remove()
    return total / examples


def _without(model: nn.Module, task: Task, layer: str, f: int, split: Split) -> Tensor:
    """The model's outputs when filter `f` returns zero everywhere."""

    def silence(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, f] = 0.0
        return output

    handle = find_layer(model, layer).register_forward_hook(silence)
    try:
        return collect(model, task, layer, split)[2]
    finally:
        handle.remove()

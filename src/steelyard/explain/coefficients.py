"""The weights of a linear layer as coefficients: which inputs count, in which direction, and how far size misleads.

A raw weight depends on the unit of its input; the effect w * std does not. Decides what large and near
zero mean; the proof is removal: each input held at its mean, on examples that were not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.explain.layers import collect, execution_order, find_layer
from steelyard.explain.ranking import ranks, spearman
from steelyard.learn.evaluate import outcomes
from steelyard.learn.task import Split, Task, first_batch

LARGE = 0.5  # of the largest effect on the same output
NEAR_ZERO = 0.02


def coefficients(
    model: nn.Module,
    task: Task,
    layer: str | None = None,
    *,
    split: Split = "train",
    features: Sequence[str] | None = None,
) -> Table:
    """Every weight of a linear layer, its standardised effect, its sign, and a warning where raw size misleads.

    effect_kj = (w_kj - mean_k w_kj) * std(x_j). The mean over the classes is taken away because a softmax
    does not see it; with one output, or outputs that are no classes, effect = w * std. An effect is large
    from half of its output's largest, near zero up to 2 % of it. A warning says that an input is in the
    first quarter by one of |w - mean_k w| and |effect|, and by the other more than a quarter further back.

    Args:
        model: any module with a dense layer.
        task: gives the inputs whose spread counts, and the names of the classes.
        layer: the name of the dense layer; None = the last one that runs.
        split: over which the spread of the layer's inputs is measured.
        features: names of the layer's inputs; None = the task's, where the layer sees the task's inputs.

    Returns a row for each output and input, each output's largest effect first. The meta holds the layer,
    how many warnings there are and the Spearman correlation of |w| with |effect|.

    Raises UnknownNameError for a layer that is not there, ModelError for one that is not dense.
    """
    layer = _dense(model, task, layer)
    weight = _weights(model, layer)
    given = collect(model, task, layer, split)[0]
    spread = _flat(given).std(0, correction=0)  # (inputs,)
    classes = task.classes if len(task.classes) == len(weight) else tuple(map(str, range(len(weight))))
    softmax = len(task.classes) == len(weight) > 1
    seen = weight - weight.mean(0) if softmax else weight  # (outputs, inputs)
    effects = (seen * spread).numpy()
    names = _names(features or _inputs(task, split, given), weight.shape[1])
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(classes):
        ranked = ranks(seen[k].abs().numpy()), ranks(np.abs(effects[k]))
        rows += _rows(name, names, weight[k].numpy(), spread.numpy(), effects[k], ranked)
    misled = sum(bool(r["warning"]) for r in rows)
    agreement = spearman(seen.abs().numpy().ravel(), np.abs(effects).ravel())
    meta = {"layer": layer, "split": split, "warnings": misled, "spearman of |weight| and |effect|": agreement}
    return Table.of(f"coefficients of {layer or 'the layer'}", _COLUMNS, rows, meta)


def removal(model: nn.Module, task: Task, layer: str | None = None, *, split: Split = "test") -> Table:
    """What happens on `split` when an input of a dense layer is held at its mean: the proof of `coefficients`.

    Args:
        model, task, layer: as for `coefficients`.
        split: of which nothing was trained on.

    Returns a row for each input, the largest effect first: its effect (root mean square over outputs), the
    rms change of the outputs, and the change of the loss and of the task's headline metric. The meta holds
    the Spearman correlations of effect and of |weight| with the change of the outputs, and with the loss.

    Raises UnknownNameError for a layer that is not there, ModelError for one that is not dense.
    """
    layer = _dense(model, task, layer)
    seen = collect(model, task, layer, "train")[0]
    given = _flat(seen)
    mean, spread = given.mean(0), given.std(0, correction=0)
    weight = _weights(model, layer)
    softmax = len(task.classes) == len(weight) > 1
    centred = weight - weight.mean(0) if softmax else weight
    effects = (centred * spread).square().mean(0).sqrt().numpy()
    sizes = centred.square().mean(0).sqrt().numpy()
    rows = _without(model, task, layer, mean, split, softmax)
    names = _names(_inputs(task, "train", seen), len(effects))
    for j, row in enumerate(rows):
        row |= {"input": names[j], "effect": float(effects[j]), "weight": float(sizes[j])}
    found = {key: np.array([r[key] for r in rows]) for key in ("outputs", "loss")}
    meta = {
        "layer": layer,
        "split": split,
        "examples": len(outcomes(model, task, split)["loss"]),
        "spearman of effect and outputs": spearman(effects, found["outputs"]),
        "spearman of effect and loss": spearman(effects, found["loss"]),
        "spearman of |weight| and outputs": spearman(sizes, found["outputs"]),
    }
    columns = [
        Column("input"),
        Column("weight", about="rms over the outputs"),
        Column("effect", about="rms over the outputs of weight * std"),
        Column("outputs", about="rms change of the outputs when this input is held at its mean"),
        Column("loss", about="change of the mean loss"),
        Column("metric", "pp", about=f"change of {task.headline}"),
    ]
    ordered = [rows[j] for j in np.argsort(-effects, kind="stable")]
    return Table.of(f"removal of the inputs of {layer or 'the layer'}", columns, ordered, meta)


def last_dense(model: nn.Module, task: Task) -> str:
    """The name of the dense layer that runs last; raises ModelError if there is none."""
    order = execution_order(model, first_batch(task, "train").inputs)
    dense = [name for name in order if isinstance(find_layer(model, name), nn.Linear)]
    if not dense:
        raise ModelError(f"{type(model).__name__} has no nn.Linear that runs; coefficients belong to a dense layer")
    return dense[-1]


def _dense(model: nn.Module, task: Task, layer: str | None) -> str:
    if layer is None:
        return last_dense(model, task)
    found = find_layer(model, layer)
    if not isinstance(found, nn.Linear):
        raise ModelError(f"the layer {layer!r} is a {type(found).__name__}; coefficients belong to an nn.Linear")
    return layer


def _weights(model: nn.Module, layer: str) -> Tensor:
    found = find_layer(model, layer)
    return found.weight.detach().double()  # type: ignore[union-attr,operator,return-value]


def _flat(x: Tensor) -> Tensor:
    return x.double().reshape(-1, x.shape[-1])


def _inputs(task: Task, split: Split, given: Tensor) -> Sequence[str]:
    """The task's names of its inputs, if that is what the layer was given."""
    inputs = first_batch(task, split).inputs
    if isinstance(inputs, tuple) or inputs[0].numel() != given.shape[-1] or given.ndim != 2:
        return ()
    return task.features if torch.equal(inputs.flatten(1), given[: len(inputs)]) else ()


def _names(features: Sequence[str], inputs: int) -> list[str]:
    return list(features) if len(features) == inputs else [str(j) for j in range(inputs)]


def _rows(
    output: str,
    names: list[str],
    weight: np.ndarray,
    spread: np.ndarray,
    effect: np.ndarray,
    ranked: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, Any]]:
    by_weight, by_effect = ranked
    top = float(np.abs(effect).max())
    quarter = max(2.0, len(names) / 4)
    rows = []
    for j in np.argsort(-np.abs(effect), kind="stable").tolist():
        size = abs(effect[j]) / top if top else 0.0
        places = by_weight[j], by_effect[j]
        misleads = abs(places[0] - places[1]) > quarter >= min(places)
        rows.append(
            {
                "output": output,
                "input": names[j],
                "weight": float(weight[j]),
                "std": float(spread[j]),
                "effect": float(effect[j]),
                "sign": "+" if effect[j] > 0 else "-" if effect[j] < 0 else "0",
                "size": "large" if top and size >= LARGE else "near zero" if size <= NEAR_ZERO else "medium",
                "rank by weight": float(by_weight[j]),
                "rank by effect": float(by_effect[j]),
                "warning": f"raw size misleads: {by_weight[j]:g} by |weight|, {by_effect[j]:g} by effect"
                if misleads
                else "",
            }
        )
    return rows


def _without(
    model: nn.Module, task: Task, layer: str, mean: Tensor, split: Split, softmax: bool
) -> list[dict[str, Any]]:
    """The change of outputs, loss and metric without each input, in the order of the inputs."""
    given, returned, outputs, targets = collect(model, task, layer, split)
    metric = task.metrics[task.headline]
    final = returned.shape == outputs.shape and torch.equal(returned, outputs)
    dense = find_layer(model, layer)
    loss, score = task.loss(outputs, targets).double().mean(), metric(outputs, targets).double().mean()
    rows = []
    for j in range(given.shape[-1]):
        if final:
            changed = given.clone()
            changed[..., j] = mean[j]
            with torch.no_grad():
                result = dense(changed)
        else:
            result = _run_without(model, task, dense, j, float(mean[j]), split)
        moved = (result - outputs).double()
        moved = moved - moved.mean(-1, keepdim=True) if softmax else moved
        rows.append(
            {
                "outputs": float(moved.square().mean().sqrt()),
                "loss": float(task.loss(result, targets).double().mean() - loss),
                "metric": float(metric(result, targets).double().mean() - score),
            }
        )
    return rows


def _run_without(model: nn.Module, task: Task, dense: nn.Module, j: int, mean: float, split: Split) -> Tensor:
    def hold(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., j] = mean
        return (changed, *args[1:])

    handle = dense.register_forward_pre_hook(hold)
    try:
        name = next(n for n, m in model.named_modules() if m is dense)
        return collect(model, task, name, split)[2]
    finally:
        handle.remove()


_COLUMNS = [
    Column("output", about="the class, or the number of the output"),
    Column("input"),
    Column("weight"),
    Column("std", about="standard deviation of the input"),
    Column("effect", about="weight (less its mean over the classes) times std"),
    Column("sign"),
    Column("size", about="large: from half of the largest effect; near zero: up to 2 % of it"),
    *(
        Column("rank by weight", about="by |weight less its mean over the classes|"),
        Column("rank by effect"),
        Column("warning"),
    ),
]

"""Groups of examples: how well the worst one does, and three ways to raise it.

Decides what is measured and how a task is changed for that. Training is that of `train`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight
from steelyard.errors import ModelError
from steelyard.formats.module import to_array
from steelyard.learn.balance import balanced_order
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.finetune import find_head
from steelyard.learn.intervals import wilson
from steelyard.learn.penalize import penalize
from steelyard.learn.penalties import L1
from steelyard.learn.robust import GroupDRO
from steelyard.learn.run import Run, train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.seeding import generator
from steelyard.learn.task import Split, Task, build_seeded, check_task, device_of


def by_group(model: nn.Module, task: Task, split: Split = "test", names: Sequence[str] = ()) -> Table:
    """The headline of each group of a split with its interval; the worst, and two means that are often confused.

    ``meta["mean"]`` is over the examples of the split; ``meta["mean by training shares"]`` weighs each group by its
    share of the training examples, as papers on spurious correlation do for splits that are balanced otherwise.
    The task's `Examples` must have the groups of the split and of "train". names: of the groups.

    Raises ModelError for a task without groups.
    """
    data = _grouped(task, split)
    groups, values = data.groups[split].numpy(), outcomes(model, task, split)[task.headline]
    shares = torch.bincount(_grouped(task, "train").groups["train"], minlength=int(groups.max()) + 1).double()
    shares = shares / shares.sum()
    proportion = bool(np.isin(values, (0, 1)).all())
    rows = []
    for group in np.unique(groups):
        found = values[groups == group]
        low, high = wilson(float(found.sum()), len(found)) if proportion else (None, None)
        row = {"group": names[group] if names else int(group), "examples": len(found), "low": low, "high": high}
        rows.append(row | {"training share": float(shares[group]), task.headline: float(found.mean())})
    scores = [row[task.headline] for row in rows]
    seen = shares[torch.from_numpy(np.unique(groups))]
    unit = "%" if task.headline == "accuracy" else ""
    columns = [Column("group"), Column("examples"), Column("training share", "%"), Column(task.headline, unit)]
    worst = max if task.headline in task.lower_is_better else min
    meta = {
        "worst group": worst(scores),
        "mean": float(values.mean()),
        "mean by training shares": float((seen * torch.tensor(scores).double()).sum() / seen.sum()),
        "task": task.name,
        "split": split,
    }
    return Table.of(f"{task.headline} by group", [*columns, Column("low", unit), Column("high", unit)], rows, meta)


def group_dro(
    task: Task,
    model: nn.Module | None = None,
    *,
    step: float = 0.01,
    adjustment: float = 0.0,
    **options: Unpack[RunOptions],
) -> Run:
    """Train against the worst group (`GroupDRO`); the options are those of `train`. The task's data has groups.

    Weights of examples count within their group: weight k is k copies, 0 is removed. With ``checkpoint`` it goes on bit
    for bit, the weights of the groups included.
    """
    data = _grouped(task, "train")
    counts = torch.bincount(data.groups["train"], weights=data.weight.get("train"))
    robust = replace(task, loss=GroupDRO(task.loss, counts, step=step, adjustment=adjustment))
    return train(robust, model, progress=False, **options)


def just_train_twice(
    task: Task,
    model: nn.Module | None = None,
    *,
    first_epochs: int = 5,
    upweight: float = 20.0,
    **options: Unpack[RunOptions],
) -> Run:
    """Train briefly, then anew with the examples that the first model got wrong weighted up (JTT; Liu et al. 2021).

    No groups are needed to train; `first_epochs` and `upweight` are chosen by the worst group of the validation split.
    Both trainings begin at the same weights. checkpoint: a folder, in which each has one of its own, "first" and
    "second"; with ``resume`` it goes on in either. Raises ModelError for a task whose data are not `Examples`.
    """
    data = _in_memory(task)
    start = build_seeded(task, options.get("seed", 0)) if model is None else model
    options, brief = ({**options, "checkpoint": _within(options.get("checkpoint"), n)} for n in ("second", "first"))
    brief |= {"epochs": first_epochs, "keep": "last"}
    first = train(task, copy.deepcopy(start), progress=False, **brief).model
    wrong = torch.from_numpy(outcomes(first, _as_test(task), "test")[task.headline] < 1)
    weight = torch.where(wrong, float(upweight), 1.0)
    weight = weight * data.weight["train"] if "train" in data.weight else weight
    heavier = replace(task, batches=replace(data, weight={**data.weight, "train": weight}))
    return train(heavier, start, progress=False, **options)


def refit_head(
    model: nn.Module,
    task: Task,
    *,
    split: Split = "valid",
    strengths: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
    draws: int = 10,
    steps: int = 300,
    seed: int = 0,
) -> Table:
    """The last layer anew on what it sees of a group-balanced set that training has not used (DFR; Kirichenko 2023).

    L1 logistic regression on standardised features: its strength is chosen by the worst group of one half of `split`
    after a fit to the other, then `draws` balanced samples of the whole are fitted in `steps` of Adam and averaged.
    The model's last nn.Linear is changed in place; nothing else is. Returns a row for each strength.

    Raises ModelError if the last layer is no nn.Linear, or a group is too small to be halved.
    """
    data, head = _grouped(task, split), _last_linear(model, task)
    x, y, groups = _inputs_of(head, model, data.inputs[split]), data.targets[split], data.groups[split]
    half = torch.zeros(len(y), dtype=torch.bool)
    for group in torch.unique(groups):
        rows = torch.nonzero(groups == group).flatten()
        if len(rows) < 2:
            raise ModelError(f"group {int(group)} has {len(rows)} example in {split}: two or more are needed")
        order = torch.randperm(len(rows), generator=generator(seed, "halves", int(group)))
        half[rows[order[: len(rows) // 2]]] = True
    table = []
    for strength in strengths:
        fitted = _averaged(x[half], y[half], groups[half], head.out_features, strength, max(1, draws // 4), steps, seed)
        hits = (fitted(x[~half]).argmax(1) == y[~half]).double()
        worst = min(float(hits[groups[~half] == group].mean()) for group in torch.unique(groups))
        table.append({"strength": strength, "worst group": worst, "mean": float(hits.mean())})
    best = max(table, key=lambda row: row["worst group"])["strength"]
    fitted = _averaged(x, y, groups, head.out_features, best, draws, steps, seed)
    with torch.no_grad():
        head.weight.copy_(fitted.weight)
        if head.bias is not None:
            head.bias.copy_(fitted.bias)
    columns = {"strength": "", "worst group": "%", "mean": "%"}
    return Table.of("the last layer refitted", columns, table, {"best": best, "split": split, "draws": draws})


def _within(folder: str | Path | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / name


def _averaged(
    x: Tensor, y: Tensor, groups: Tensor, classes: int, strength: float, draws: int, steps: int, seed: int
) -> nn.Linear:
    """The mean of fits to balanced samples, as a layer on the features as they are."""
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-9)
    kinds, counts = torch.unique(groups, return_counts=True)
    total = nn.Linear(x.shape[1], classes, dtype=torch.float64).requires_grad_(False)
    total.weight.zero_()
    total.bias.zero_()
    for draw in range(draws):
        rows = balanced_order(groups, seed, draw, int(counts.min()) * len(kinds))
        layer = copy.deepcopy(total).requires_grad_(True)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        penalize(layer, optimizer, L1(strength))
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(layer((x[rows] - mean) / spread), y[rows]).backward()
            optimizer.step()
        total.weight += layer.weight.detach() / spread / draws
        total.bias += (layer.bias.detach() - (layer.weight.detach() / spread) @ mean) / draws
    return total


def _last_linear(model: nn.Module, task: Task) -> nn.Linear:
    chosen = find_head(model, task)
    layers = {n.rpartition(".")[0] for n, p in model.named_parameters() if chosen(_named(n, p))}
    layer = model.get_submodule(layers.pop()) if len(layers) == 1 else model
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"the last layer of {type(model).__name__} is a {type(layer).__name__}, expected an nn.Linear")
    return layer


def _named(name: str, parameter: Tensor) -> Weight:
    return Weight.of(name, to_array(parameter))


def _inputs_of(head: nn.Linear, model: nn.Module, inputs: Tensor) -> Tensor:
    """What the layer is given for these inputs: (examples, features), float64, on the CPU."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().double().cpu()))
    try:
        with evaluating(model), torch.no_grad():
            for part in inputs.split(256):
                model(part.to(device_of(model)))
    finally:
        hook.remove()
    return torch.cat(seen)


def _in_memory(task: Task) -> Examples:
    check_task(task)
    if not isinstance(task.batches, Examples):
        raise ModelError(f"the task {task.name!r} serves batches of its own: give its data as Examples")
    return task.batches


def _grouped(task: Task, split: Split) -> Examples:
    data = _in_memory(task)
    if split not in data.groups:
        raise ModelError(f"the task {task.name!r} has no groups of its {split} split: give Examples(..., groups=...)")
    return data


def _as_test(task: Task) -> Task:
    """The task with its training examples, in order and as they are, as the test split."""
    data = _in_memory(task)
    inputs, targets = ({**t, "test": t["train"]} for t in (data.inputs, data.targets))
    return replace(task, batches=replace(data, inputs=inputs, targets=targets, weight={}, groups={}, balance=None))

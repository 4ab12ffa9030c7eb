"""Moving trained weights to a new task: load what fits, start a new head, freeze what shall stay, train the rest.

Decides what counts as the head and accounts for every name. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, Unpack

from torch import nn

from steelyard.core.table import Table
from steelyard.core.weights import Weights
from steelyard.core.where import Where, where
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.evaluate import evaluating
from steelyard.learn.run import Run, train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.task import Task, apply, build_seeded, device_of, first_batch


def transfer(
    weights: Weights, module: nn.Module, *, head: Where | None = None, rename: Mapping[str, str] | None = None
) -> Table:
    """Load what fits into the module; what ``head`` chooses stays as the module had it.

    rename: the names of the weights -> those of the module, as for `into_module`. Returns the account of
    `into_module`: every name on either side with its status, here also "new" for the head.
    Raises ModelError, with the module untouched, if not one weight fits or ``head`` chooses nothing of the module.
    """
    if head is not None and not _chooses(from_module(module), head):
        raise ModelError(
            f"no head to start anew: none of {_some(from_module(module))} is chosen; "
            "choose from the names of the model, such as those of its last layer"
        )
    body = weights if head is None else _without(weights, head)
    account = into_module(body, module, partial=True, rename=rename)
    if "loaded" not in account.column("status"):
        raise ModelError(
            f"none of the {len(body)} weights fits {type(module).__name__}: "
            f"it has {_some(from_module(module))}, given are {_some(body)}; "
            "map the names (rename=, or steelyard convert --rename)"
        )
    if head is None:
        return account
    chosen = set(from_module(module).select(head)) | set(from_module(module).ties)
    rows = [
        {**row, "status": "new", "note": "head of the new task, as it was started"}
        if row["status"] == "missing" and row["name"] in chosen
        else row
        for row in account.rows
    ]
    statuses = [str(row["status"]) for row in rows]
    meta = {key: value for key, value in account.meta.items() if not isinstance(value, int)}
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return replace(account, rows=tuple(rows), meta={**meta, **counts})


def freeze(module: nn.Module, where: Where) -> list[str]:
    """Stop training the parameters that ``where`` chooses; returns their names.

    Their bits stay as they are, and so do the running statistics of a normalisation that is frozen as a whole.
    Raises ModelError if nothing is chosen.
    """
    names = list(from_module(module, buffers=False).select(where))
    if not names:
        raise ModelError(
            f"no parameter to freeze: none of {_some(from_module(module, buffers=False))} is chosen; "
            "choose from the names of the model"
        )
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return names


def find_head(module: nn.Module, task: Task) -> Where:
    """What chooses the weights of the last layer: of those with parameters of their own, the one that runs last."""
    batch = first_batch(task, "train").to(device_of(module))
    order: list[str] = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, child in module.named_modules()
        if any(True for _ in child.parameters(recurse=False))
    ]
    try:
        with evaluating(module):
            apply(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise ModelError(f"{type(module).__name__} has no layer with parameters that runs")
    own = module.get_submodule(order[-1]).named_parameters(recurse=False)
    return where(",".join(f"{order[-1]}.{leaf}" if order[-1] else leaf for leaf, _ in own))


def finetune(
    task: Task,
    weights: Weights,
    model: nn.Module | None = None,
    *,
    head: Literal["new", "keep"] | Where = "new",
    freeze: Literal["body"] | Where | None = None,
    rename: Mapping[str, str] | None = None,
    progress: bool | Callable[[Run], None] = True,
    within: Callable[[Run], AbstractContextManager[Any]] | None = None,
    **options: Unpack[RunOptions],
) -> tuple[Run, Table]:
    """Carry ``weights`` over to the task's model and train it there; the finished run and the account of `transfer`.

    head: "new" starts the last layer anew, "keep" loads it if it fits, or what chooses the weights to start anew.
    freeze: what is not trained; "body" is all but the head. The other keywords are those of Run; the rate is 1e-3
    unless told; within: as for `train`.
    """
    options.setdefault("rate", 1e-3)
    found, account = carry(task, weights, model, head=head, freeze=freeze, rename=rename, seed=options.get("seed", 0))
    run = train(task, found, progress=progress, within=within, **options)
    return run, account


def carry(
    task: Task,
    weights: Weights,
    model: nn.Module | None = None,
    *,
    head: Literal["new", "keep"] | Where = "new",
    freeze: Literal["body"] | Where | None = None,
    rename: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Table]:
    """The first half of `finetune`: the model with what was carried over, ready to be trained, and the account."""
    found = build_seeded(task, seed) if model is None else model
    last = head if isinstance(head, Where) else find_head(found, task)
    account = transfer(weights, found, head=None if head == "keep" else last, rename=rename)
    if freeze is not None:
        _freeze(found, ~last if freeze == "body" else freeze)
    return found, account


_freeze = freeze  # carry has an argument of that name


def _chooses(weights: Weights, chosen: Where) -> bool:
    """Whether any tensor, or further name of one, is chosen."""
    return any(map(chosen, weights.values())) or any(chosen(replace(weights[a], name=a)) for a in weights.ties)


def _without(weights: Weights, head: Where) -> Weights:
    """The weights, and the further names of weights, that ``head`` does not choose."""
    body = weights.select(~head)
    ties = {a: name for a, name in body.ties.items() if not head(replace(weights[name], name=a))}
    return Weights(body.values(), ties, body.meta)


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")

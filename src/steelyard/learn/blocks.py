"""Residual blocks go as a whole, the least missed first: a shallower model, proved by its validation loss.

Decides which blocks can go (those that add to what they are given) and in which order. What stands in their place and
how a file tells of it is `steelyard.graph.skip`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.graph.skip import Skip, drop_, residual
from steelyard.learn.evaluate import evaluating, mean_outcomes
from steelyard.learn.options import check_whole
from steelyard.learn.task import Split, Task, apply, first_batch
from steelyard.learn.unharmed import unmoved


def prune_blocks_(model: nn.Module, task: Task, count: int = 1, *, split: Split = "valid") -> Table:
    """Take out the `count` residual blocks that are missed least, one after the other, in place.

    A block is a module with weights that is called once in a pass, gives a tensor of the shape of its first argument
    and adds to it on the way, and without which the model runs; of blocks within each other the inner ones count. In
    each round all that are left are tried: the one without which the mean loss on `split` is least goes. The others
    stay as they are: train on afterwards. ``from_module`` notes what is gone in the metadata, and
    ``into_module(..., resize=True)`` takes the same blocks out of the original model.

    Returns a table of the blocks in the order in which they went, with the loss before and after. Raises ModelError,
    with the model untouched, if there are fewer blocks.

    Source: Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", 2016.
    """
    check_whole(count=count)
    with unmoved(model), evaluating(model):
        left = blocks(model, task)
        if len(left) < count:
            most = f"take at most {len(left)}" if left else "take units instead, by a fraction (--fraction)"
            raise ModelError(f"{type(model).__name__} has {len(left)} residual blocks, and {count} cannot go: {most}")
        loss, rows = mean_outcomes(model, task, split)["loss"], []
        gone: list[str] = []
        for _ in range(count):
            found = {name: _loss_without(model, [*gone, name], task, split) for name in left}
            least = min(found, key=lambda name: found[name])
            rows.append({"block": least, "before": loss, "after": found[least]})
            gone.append(least)
            left.remove(least)
            loss = found[least]
    drop_(model, gone)
    columns = [Column("block"), Column("before", "", f"mean loss, {split}"), Column("after", "", f"mean loss, {split}")]
    return Table.of("blocks that went", columns, rows)


def blocks(model: nn.Module, task: Task) -> list[str]:
    """The names of the residual blocks that a model runs without, in the order in which a batch of the task meets them.

    Not all do: torch's `nn.TransformerEncoder` reads attributes of its first layer.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append((args, keywords, output))

        return hook

    found = [(name, m) for name, m in model.named_modules() if name and not isinstance(m, Skip)]
    hooks = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in found]
    try:
        model(*first_batch(task, "train").arguments)
    finally:
        for hook in hooks:
            hook.remove()
    chosen: list[str] = []
    for name, module in reversed(found):  # what is in a block comes before the block
        inner = any(other.startswith(f"{name}.") for other in chosen)
        if not inner and len(calls.get(name, [])) == 1 and _may_go(module, *calls[name][0]):
            chosen.append(name)
    return [name for name in calls if name in chosen and _runs_without(model, name, task)]


def _runs_without(model: nn.Module, name: str, task: Task) -> bool:
    with _without(model, [name]):
        try:
            apply(model, first_batch(task, "train"))
        except ModelError:  # who calls the block wants more of it than its outputs
            return False
    return True


def _may_go(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> bool:
    same = bool(args) and all(isinstance(x, Tensor) for x in (args[0], output)) and args[0].shape == output.shape
    if not same or not any(True for _ in module.parameters()):
        return False
    try:
        return residual(module, tuple(x[:2] if isinstance(x, Tensor) else x for x in args[:1]) + args[1:], keywords)
    except ModelError:  # its code decides by values: nobody knows what it does
        return False


def _loss_without(model: nn.Module, names: list[str], task: Task, split: Split) -> float:
    with _without(model, names):
        return mean_outcomes(model, task, split)["loss"]


@contextmanager
def _without(model: nn.Module, names: list[str]) -> Iterator[None]:
    kept = {name: model.get_submodule(name) for name in names}
    drop_(model, names)
    try:
        yield
    finally:
        for name, module in kept.items():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = module

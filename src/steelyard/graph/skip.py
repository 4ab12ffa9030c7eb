"""Blocks that were taken out of a module: what stands in their place, and how a file says which they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steelyard.errors import ModelError, quoted
from steelyard.graph.tracing import trace

DROPPED = "dropped"  # in metadata: the names of the blocks, separated by commas

SAME = ("aten.view", "aten.clone", "aten.alias", "aten.detach", "aten.transpose")  # give what they are given


class Skip(nn.Module):  # type: ignore[misc]
    """Gives its first argument, whatever the others are: a block of which only the shortcut is left."""

    def forward(self, x: Tensor, *_others: Any, **_named: Any) -> Tensor:
        return x


def dropped(model: nn.Module) -> list[str]:
    """The names of the blocks that are gone.

    >>> dropped(drop_(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"]))
    ['0']
    """
    return [name for name, module in model.named_modules() if isinstance(module, Skip)]


def drop_(model: nn.Module, names: list[str]) -> nn.Module:
    """Take these blocks out of a model, in place: each gives its first argument. Raises ModelError for other names."""
    found = dict(model.named_modules())
    for name in names:
        if name not in found or not name:
            raise ModelError(f"the model has no block {quoted(name)}")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = Skip()
    return model


def residual(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a block adds something to its first argument, which a pass over these arguments shows."""
    found = trace(block, arguments, keywords)
    places = [node for node in found.graph.nodes if node.op == "placeholder"]
    own = {places[len(found.names)]} if len(places) > len(found.names) else set()
    for node in found.graph.nodes:  # views and copies of it are it
        name = str(node.target)
        if (
            node.args
            and node.args[0] in own
            and name.startswith(("aten.view", "aten.clone", "aten.alias", "aten.detach"))
        ):
            own.add(node)
        if name.startswith(("aten.add.Tensor", "aten.add_.Tensor")) and any(arg in own for arg in node.args):
            return True
    return False

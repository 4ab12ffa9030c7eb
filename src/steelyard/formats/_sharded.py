"""Tensors of which each process holds a part (DTensor, as of FSDP2): their whole, and values laid out like them.

Decides how values move between one tensor and its shards. Whole and laid out are collective: every process of the mesh
has to call them, with the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def is_sharded(x: Any) -> bool:
    """Whether it is a DTensor, of which each process holds a shard (FSDP2, tensor parallelism)."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it
    return module is not None and isinstance(x, module.DTensor)


def whole(tree: Any) -> Any:
    """The same tree of dictionaries and lists, with each sharded tensor put together on the CPU."""
    if is_sharded(tree):
        return tree.detach().full_tensor().cpu()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    return tree


def like(target: Tensor, values: Tensor) -> Tensor:
    """The values on the device of `target`, and sharded if that is; their dtype stays."""
    if not is_sharded(target) or is_sharded(values):
        return values.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)


def local(x: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory; a tensor that is not sharded as it is."""
    return x.to_local() if is_sharded(x) else x

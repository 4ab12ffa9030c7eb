"""Several processes that train one model on torch.distributed, started by torchrun; there is no launcher here.

Decides how a batch is divided and what the processes agree on. Knows nothing of the loop. Every process must serve the
same batches; each works on its share of the examples, and one process alone would take the same steps.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from steelyard.errors import ModelError
from steelyard.formats._sharded import is_sharded
from steelyard.learn.task import Batch, device_of


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def join(device: torch.device) -> Processes:
        """Those of the process group; one that torchrun announces and nobody has begun is begun."""
        if not dist.is_available():
            return Processes()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                return Processes()
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        return Processes(dist.get_rank(), dist.get_world_size())

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model such that a backward pass averages gradients over the processes."""
        sharded = any(map(is_sharded, model.parameters()))  # by FSDP2, which does so itself
        if self.count == 1 or sharded or isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def share(self, batch: Batch) -> Batch:
        """Every count-th example. Where there are fewer examples than processes, an example that weighs nothing."""
        if self.count == 1:
            return batch
        rows = slice(self.rank, None, self.count) if self.rank < len(batch) else slice(0, 1)
        inputs = tuple(x[rows] for x in batch.arguments)
        weight = torch.ones(len(batch), device=batch.targets.device) if batch.weight is None else batch.weight
        weight = weight[rows] if self.rank < len(batch) else torch.zeros_like(weight[rows])
        return Batch(inputs if isinstance(batch.inputs, tuple) else inputs[0], batch.targets[rows], weight)

    def total(self, value: float, device: torch.device) -> float:
        """The sum over the processes."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(shared)
        return float(shared)

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks; anything that can be pickled."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def mine(self, gathered: Sequence[Any]) -> Any:
        """What `gathered` took from the process of this rank; raises ModelError if they were more or fewer."""
        if len(gathered) != self.count and any(gathered):
            raise ModelError(f"{len(gathered)} processes had states of their own when the checkpoint was written, and "
                             f"there are {self.count} now: go on with as many")  # fmt: skip
        return gathered[min(self.rank, len(gathered) - 1)]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        return self.total(float(flag), device) > 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


def shard(model: nn.Module) -> nn.Module:
    """Divide the tensors of a model among the processes that torchrun started, in place (FSDP2, `fully_shard`).

    Each process then holds a share of weights, gradients, moments of the optimizer and averages, and a layer is
    put together only while it runs: the blocks of each nn.ModuleList, and what remains. In one process alone the model
    stays as it is. Call it before the optimizer is made; `Run` and `train` make theirs after it::

        train(task, shard(task.build()))

    Any model that you gave to torch's `fully_shard` yourself, with your own mesh, groups and policies, will do as
    well. The process group is begun if nobody has begun it.
    """
    processes = Processes.join(device_of(model))
    if processes.count == 1:
        return model
    from torch.distributed.fsdp import fully_shard

    blocks = [block for many in model.modules() if isinstance(many, nn.ModuleList) for block in many]
    for block in reversed(blocks):  # those inside others first
        fully_shard(block)
    return fully_shard(model)


def reshard(model: nn.Module) -> None:
    """Let every process hold its shards alone again: a pass without gradients leaves the outermost ones whole.

    A whole tensor in the place of its shards is a copy: what is written into it would be lost.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def first() -> bool:
    """Whether this is the process that writes files and prints: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _leave() -> None:
    """End the process group before the interpreter ends, and its threads with it.

    A thread of the group that lets go of a tensor while the interpreter ends aborts the process. The threads live as
    long as anything refers to the group, so that what is only reachable in circles has to be collected first.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()

"""Balanced sampling: every group as often as every other. Decides the order of examples; knows nothing of losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from steelyard.errors import ModelError
from steelyard.learn.seeding import generator


def balanced_order(
    groups: Tensor,  # (examples,) the group or class number of each
    seed: int = 0,
    epoch: int = 0,
    size: int | None = None,
) -> Tensor:
    """Row numbers in which each group occurs equally often, up to one; a function of the seed and the epoch.

    Within a group every example is used before any is used again. size: how many; None: as many as there are rows.

    >>> order = balanced_order(torch.tensor([0] * 9 + [1]), size=10)
    >>> int((order == 9).sum()), len(set(order.tolist()))
    (5, 6)
    """
    if groups.ndim != 1 or not len(groups):
        raise ModelError(f"groups of shape {list(groups.shape)}: expected one number for each example")
    random = generator(seed, "balanced", epoch)
    size = len(groups) if size is None else size
    kinds = torch.unique(groups)
    kinds = kinds[torch.randperm(len(kinds), generator=random)]  # who gets the odd one changes with the epoch
    picked = []
    for index, kind in enumerate(kinds):
        rows = torch.nonzero(groups == kind).flatten()
        wanted = (size + len(kinds) - 1 - index) // len(kinds)
        rounds = [rows[torch.randperm(len(rows), generator=random)] for _ in range(-(-wanted // len(rows)))]
        picked.append(torch.cat([*rounds, rows[:0]])[:wanted])
    found = torch.cat(picked)
    return found[torch.randperm(len(found), generator=random)]


class BalancedSampler(Sampler[int]):
    """`balanced_order` for a torch DataLoader: ``DataLoader(data, 32, sampler=BalancedSampler(groups))``.

    With several processes each takes every `replicas`-th row of the same order, all the same number. Call
    ``set_epoch(epoch)`` before each epoch.
    """

    def __init__(self, groups: Tensor, *, seed: int = 0, size: int | None = None, replicas: int = 1, rank: int = 0):
        if not 0 <= rank < replicas:
            raise ModelError(f"rank={rank}: expected 0 to {replicas - 1} for {replicas} replicas")
        self.groups, self.seed, self.epoch, self.replicas, self.rank = groups, seed, 0, replicas, rank
        self.size = (len(groups) if size is None else size) // replicas

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = balanced_order(self.groups, self.seed, self.epoch, self.size * self.replicas)
        yield from order[self.rank :: self.replicas].tolist()

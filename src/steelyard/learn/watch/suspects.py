"""What the faults need to know of the model itself: the layer of each tensor, ties, rows looked up, lost updates.

Decides how these are read off the modules and the optimizer. Reads only. Knows nothing of thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steelyard.learn.gauges import plain_name
from steelyard.learn.watch.faults import NO_GRADIENT, NOT_HELD, TOO_SMALL, ZERO_GRADIENT, ZERO_RATE
from steelyard.learn.watch.looks import shard
from steelyard.learn.watch.norms import is_sharded

NARROW = (torch.bfloat16, torch.float16)


def layers_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The layer that each tensor belongs to, by name; "model" for the tensors of the model itself.

    >>> model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    >>> layers_of(model, dict(model.named_parameters()))
    ['0', '0', '0']
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            found.setdefault(id(p), plain_name(f".{name}".partition(".parametrizations")[0][1:]) or "model")
    return [found[id(p)] for p in tensors.values()]


def reasons(tensors: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Why each tensor, if it does not move, does not."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}

    def reason(p: Tensor) -> str:
        if id(p) not in rates:
            return NOT_HELD
        if is_lazy(p) or p.grad is None:
            return NO_GRADIENT
        if float(rates[id(p)]) == 0:
            return ZERO_RATE
        return TOO_SMALL if p.grad.is_sparse or bool(shard(p.grad).any()) else ZERO_GRADIENT

    return [reason(p) for p in tensors.values()]


@torch.no_grad()
def lost_share(p: Tensor, before: Tensor) -> float | None:
    """The share of the elements with a gradient that a step left as they were; None where there is no gradient.

    >>> w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> w.grad = torch.ones_like(w)
    >>> before = w.detach().clone()
    >>> with torch.no_grad(): _ = w[0].sub_(1e-3), w[1].sub_(1e-2)
    >>> lost_share(w, before)
    0.5
    """
    if p.grad is None or p.grad.is_sparse:
        return None
    pulled = shard(p.grad) != 0
    count = int(pulled.sum())
    return int((pulled & (shard(p.detach()) == shard(before))).sum()) / count if count else None


@torch.no_grad()
def decayed(p: Tensor, before: Tensor) -> bool:
    """Whether a step did nothing to a tensor but make it smaller as a whole, up to the rounding of its number format.

    >>> before = torch.tensor([3.0, 4.0])
    >>> decayed(before * 0.99, before), decayed(before - torch.tensor([0.1, 0.0]), before)
    (True, False)
    """
    if is_sharded(p):
        return False
    wide = torch.float64 if p.device.type == "cpu" else torch.float32
    a, b = (x.detach().flatten().to(wide) for x in (before, p))
    square = float(a @ a)
    factor = float(a @ b) / square if square else 0.0
    slack = 0.01 * float((b - a).norm()) + torch.finfo(p.dtype).eps * math.sqrt(square)
    return 0 < factor < 1 and float((b - factor * a).norm()) <= slack


@dataclass
class Ties:
    """The parameters that are one under several names, or start as copies where one is usual: tables and heads.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "head": nn.Linear(2, 5, bias=False)})
    >>> model.head.weight = model.embed.weight
    >>> ties = Ties(model)
    >>> model.head.weight = nn.Parameter(torch.zeros(5, 2))
    >>> list(ties.broken())
    [('head', 'head.weight and embed.weight were one tensor, and are two')]
    """

    model: nn.Module
    pairs: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(p), name) != name:
                self.pairs.append((first[id(p)], name))
        tables: list[tuple[str, Tensor]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Embedding, nn.Linear)) and not (
                is_lazy(module.weight) or is_sharded(module.weight)
            ):
                own = f"{name}.weight" if name else "weight"
                for other, p in tables:
                    if p is not module.weight and _alike(p, module.weight):
                        self.copies.append((other, own))
                if isinstance(module, nn.Embedding):
                    tables.append((own, module.weight))

    def broken(self) -> Iterator[tuple[str, str]]:
        """The layer and the evidence of each tie that does not hold any more."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        for pairs, text in (
            (self.pairs, "were one tensor, and are two"),
            (self.copies, "were equal when the watch began and are not: two copies learn apart"),
        ):
            for first, second in pairs:
                a, b = now.get(first), now.get(second)
                if a is not None and b is not None and a is not b and not (pairs is self.copies and _alike(a, b)):
                    yield plain_name(second).rpartition(".")[0], f"{plain_name(second)} and {plain_name(first)} {text}"


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values, and are not one value throughout, which many layers start with."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or not torch.equal(a[:1], b[:1]):
        return False
    return torch.equal(a, b) and not bool((a == a.flatten()[0]).all())


class Lookups:
    """Which rows of each embedding were looked up so far."""

    def __init__(self, model: nn.Module):
        self.tables = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        self.seen: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def note(self, name: str, indices: Any) -> None:
        """Indices that a table was called with."""
        if isinstance(indices, Tensor) and not indices.is_floating_point() and indices.numel():
            table = self.tables[name]
            if name not in self.seen:
                self.seen[name] = torch.zeros(table.num_embeddings, dtype=torch.bool, device=indices.device)
            self.seen[name][indices.detach().reshape(-1).clamp(0, table.num_embeddings - 1).long()] = True
            self.count[name] = self.count.get(name, 0) + indices.numel()

    def unseen(self) -> Iterator[tuple[str, Sequence[int], int, int]]:
        """For each table: its name, the rows that were never looked up, all rows, and how many look-ups there were."""
        for name, seen in self.seen.items():
            rows = set((~seen).nonzero().flatten().tolist()) - {self.tables[name].padding_idx}
            yield plain_name(name), sorted(rows), len(seen), self.count[name]

"""Factors of what goes into a layer or comes out of it, as hooks: for where neither start nor rate can hold them.

A hook is copied and pickled with its model, and is no part of a state dict. Decides that a model has one set of them:
putting it takes an older one away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Factor(ABC):
    """A number that multiplies something at one layer. Final subclasses are frozen dataclasses."""

    about: str  # what is multiplied by what

    @abstractmethod
    def put(self, layer: nn.Module) -> None:
        """Register it as a hook."""


@dataclass(frozen=True)
class OfInput(Factor):
    """The first argument of a layer, and so its output without its bias."""

    value: float

    @property
    def about(self) -> str:
        return f"input times {self.value:.6g}"

    def put(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self)

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.value, *args[1:])


@dataclass(frozen=True)
class OfKeys(Factor):
    """The keys of ``nn.MultiheadAttention``: its scores. The bias of the keys drops out of the softmax."""

    value: float

    @property
    def about(self) -> str:
        return f"keys times {self.value:.6g}"

    def put(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], args[1] * self.value, *args[2:]), options
        return args, {**options, "key": options["key"] * self.value}


@dataclass(frozen=True)
class OfPart(Factor):
    """Some elements of the last axis of an output, in runs (from, to)."""

    value: float
    part: tuple[tuple[int, int], ...]

    @property
    def about(self) -> str:
        runs = ", ".join(f"{a}:{b}" for a, b in self.part[:3]) + ", ..." * (len(self.part) > 3)
        return f"output [{runs}] times {self.value:.6g}"

    def put(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self)

    def __call__(self, _layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        factors = output.new_ones(output.shape[-1])
        for start, stop in self.part:
            factors[start:stop] = self.value
        return output * factors


def put(model: nn.Module, factors: Mapping[str, Factor]) -> None:
    """Make these the factors of a model, by the names of its layers."""
    for layer in model.modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Factor)]:
                del hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
    for name, factor in factors.items():
        factor.put(model.get_submodule(name))

"""The inputs of every weight matrix while a model runs, summed as they pass: means, second moments, Hessians.

Decides what the inputs of a weight are. The operations themselves are watched, below modules and functions, and a
weight is known by its memory: so tied weights, the parts of packed attention, recurrent steps and bare functions
count like any layer. Nothing that passes is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from steelyard.learn.evaluate import evaluating, unfused

PATCHES = 1 << 22  # numbers in the patches of a convolution that are unfolded at a time
_aten = torch.ops.aten


@dataclass
class Sums:
    """Sums over positions: of the inputs, and of their squares or of all their products."""

    total: Tensor  # (inputs,)
    square: Tensor  # (inputs,), or (inputs, inputs)
    count: int = 0

    @staticmethod
    def zeros(inputs: int, full: bool, dtype: torch.dtype, device: torch.device) -> Sums:
        """Nothing seen yet; `full` for all products."""
        shape = (inputs, inputs) if full else (inputs,)
        return Sums(torch.zeros(inputs, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def add(self, x: Tensor) -> None:
        """Count `x`: (positions, inputs)."""
        x = x.to(self.total.dtype)
        self.total += x.sum(0)
        if self.square.ndim == 2:
            self.square.addmm_(x.t(), x)
        else:
            self.square += x.square().sum(0)
        self.count += len(x)


@dataclass
class Site:
    """One weight, and what was seen of its inputs."""

    name: str
    parameter: Tensor
    full: bool
    dtype: torch.dtype
    first: bool = False  # the inputs are the first axis
    parts: dict[tuple[int, int], Sums] = field(default_factory=dict)  # the outputs from, to -> their inputs
    lookups: Tensor | None = None  # (rows,): how often each was looked up

    @property
    def outputs(self) -> int:
        return self.parameter.numel() // self.inputs if self.first else len(self.parameter)

    @property
    def inputs(self) -> int:
        return len(self.parameter) if self.first else self.parameter.numel() // len(self.parameter)

    def given(self, x: Tensor, start: int, stop: int) -> None:
        """The outputs from `start` to `stop` were computed from `x`: (positions, inputs)."""
        if (start, stop) not in self.parts:
            self.parts[start, stop] = Sums.zeros(x.shape[1], self.full, self.dtype, x.device)
        self.parts[start, stop].add(x.detach())

    def looked_up(self, rows: Tensor) -> None:
        """These rows were looked up."""
        counts = torch.bincount(rows.detach().reshape(-1), minlength=len(self.parameter)).to(self.dtype)
        self.lookups = counts if self.lookups is None else self.lookups + counts

    @property
    def seen(self) -> bool:
        return bool(self.parts) or self.lookups is not None

    def blocks(self) -> list[list[Sums]]:
        """What reaches each block of outputs; blocks are as large as the parts allow."""
        edges = {edge for part in self.parts for edge in part}
        size = math.gcd(self.outputs, *edges)
        starts = range(0, self.outputs, size)
        return [[s for (a, b), s in self.parts.items() if a <= start < b] for start in starts]


class Inputs(TorchDispatchMode):
    """While it is entered, the inputs of `parameters` (by name) are summed in `sites`; `full`: with all products."""

    def __init__(self, parameters: Mapping[str, Tensor], *, full: bool, dtype: torch.dtype):
        super().__init__()
        self.sites = [Site(name, p.detach(), full, dtype) for name, p in parameters.items()]
        self._by_memory: dict[int, list[Site]] = {}
        for site in self.sites:
            if site.parameter.numel() and site.parameter.is_contiguous():
                self._by_memory.setdefault(site.parameter.untyped_storage().data_ptr(), []).append(site)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watcher = _WATCHERS.get(func)
        if watcher is not None:
            watcher(self, args)
        return func(*args, **(kwargs or {}))

    def find(self, operand: Any) -> tuple[Site, int] | None:
        """The weight in whose memory an operand lies, and the element of it that the operand begins with."""
        if not isinstance(operand, Tensor) or not operand.numel():
            return None
        for site in self._by_memory.get(operand.untyped_storage().data_ptr(), ()):
            offset = (operand.data_ptr() - site.parameter.data_ptr()) // operand.element_size()
            if 0 <= offset < site.parameter.numel() and operand.dtype == site.parameter.dtype:
                return site, offset
        return None

    def product(self, x: Tensor, w: Tensor) -> bool:
        """Note ``x @ w`` if w is a weight or part of one: x (positions, inputs), w (inputs, outputs)."""
        found = self.find(w)
        if found is None:
            return False
        site, offset = found
        across = site.parameter.numel() // len(site.parameter)
        if w.shape[0] == across and _strides(w, 1, across) and offset % across == 0:
            site.given(x, offset // across, offset // across + w.shape[1])
        elif w.shape == (len(site.parameter), across) and _strides(w, across, 1):
            site.first = True
            site.given(x, 0, across)
        return True

    def convolution(self, x: Tensor, w: Tensor, rest: Sequence[Any]) -> None:
        """Note a convolution; `rest` is bias, stride, padding, dilation, transposed, output_padding, groups."""
        found = self.find(w)
        if found is None:
            return
        site, _ = found
        _, stride, padding, dilation, transposed, _, groups = rest
        if transposed:
            if groups == 1:  # else each group has rows of its own, which is not how a part is described
                site.first = True
                site.given(x.movedim(1, -1).reshape(-1, x.shape[1]), 0, site.outputs)
            return
        size = site.outputs // groups
        for some in _chunks(x, math.prod(w.shape[2:])):
            seen = patches(some, w.shape[2:], stride, padding, dilation)  # (examples, channels, positions..., kernel)
            for g, own in enumerate(seen.chunk(groups, dim=1)):
                site.given(own.movedim(1, -1).flatten(0, -3).transpose(1, 2).flatten(1), g * size, (g + 1) * size)


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution sees at each position: (examples, channels, positions..., elements of the kernel).

    >>> patches(torch.arange(4.0).reshape(1, 1, 4), (2,), (1,), (0,), (1,))[0, 0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    x = functional.pad(x, [p for one in reversed(padding) for p in (one, one)])
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return x.flatten(2 + len(kernel))


@contextmanager
def watching_inputs(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Evaluation mode without gradients within the block, every operation of the model watched by `inputs`."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with evaluating(model), unfused(), _step_by_step() if recurrent else _as_it_is(), inputs:
        yield


@contextmanager
def _step_by_step() -> Iterator[None]:
    """Recurrent layers take their steps one by one within the block: the fused layer shows nothing of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on graphics cards here
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _strides(w: Tensor, *expected: int) -> bool:
    return all(n == 1 or s == e for n, s, e in zip(w.shape, w.stride(), expected, strict=True))


def _chunks(x: Tensor, kernel: int) -> Iterator[Tensor]:
    """Examples whose patches are not too many at a time."""
    each = max(1, x[0].numel() * kernel) if len(x) else 1
    yield from x.split(max(1, PATCHES // each))


def _matmul(inputs: Inputs, a: Tensor, b: Tensor) -> None:
    if not inputs.product(a, b):
        inputs.product(b.t(), a.t())


def _watch_addmm(inputs: Inputs, args: Any) -> None:
    _matmul(inputs, args[1], args[2])


def _watch_mm(inputs: Inputs, args: Any) -> None:
    _matmul(inputs, args[0], args[1])


def _watch_mv(inputs: Inputs, args: Any) -> None:
    _matmul(inputs, args[0], args[1][:, None])


def _watch_bmm(inputs: Inputs, args: Any) -> None:
    a, b = args[:2]
    if b.shape[0] == 1 or b.stride(0) == 0:
        inputs.product(a.flatten(0, 1), b[0])


def _watch_convolution(inputs: Inputs, args: Any) -> None:
    inputs.convolution(args[0], args[1], args[2:9])


def _watch_embedding(inputs: Inputs, args: Any) -> None:
    found = inputs.find(args[0])
    if found is not None:
        found[0].looked_up(args[1])


_WATCHERS: dict[Any, Callable[[Inputs, Any], None]] = {
    _aten.addmm.default: _watch_addmm,
    _aten.mm.default: _watch_mm,
    _aten.mv.default: _watch_mv,
    _aten.bmm.default: _watch_bmm,
    _aten.convolution.default: _watch_convolution,
    _aten.embedding.default: _watch_embedding,
    _aten._embedding_bag.default: _watch_embedding,
    _aten._embedding_bag_forward_only.default: _watch_embedding,
}

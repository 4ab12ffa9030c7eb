"""One pass of a batch through a model and back: what each call of each weighted layer was given, gave, and got back.

Decides what is measured at a call (scales, and which earlier calls feed it, read off the graph of automatic
differentiation, so that registration, reuse, residual sums and functions in between do not matter). Knows nothing of
what is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from steelyard.errors import ModelError
from steelyard.formats._sharded import is_sharded, local
from steelyard.learn.matrices import TABLES, matrices

GATE = 0.03  # a layer whose matrices all have less gain than this is meant to open while it learns
ALIKE = 1e-4  # rows that differ by less than this share of their length are the same


class Scale(NamedTuple):
    """The size of the numbers in a tensor."""

    rms: float
    mean: float
    spread: float  # rms after the mean over the first axis (the samples) is taken away: what tells samples apart
    numbers: int  # in the tensor


@dataclass
class Call:
    """One call of one layer. Sums of squares of gradients are over all elements, because the loss is a mean."""

    layer: str
    kind: str
    order: int  # of the call in the pass
    inputs: Scale | None  # of the first argument of floating point
    output: Scale  # or that of the activation, where somebody has looked at it
    made: Scale  # the output itself
    fed_by: frozenset[int]  # the calls whose outputs reach the arguments without another layer in between
    gate: bool = False  # its weights are all close to zero, or the same: no gradient passes until it has learned
    followed: bool = False  # whether a gradient is awaited at the output
    gradient: float | None = None  # root of the sum of squares of dL/d(output)
    elements: int = 0  # of the output
    about: dict[str, Any] = field(default_factory=dict)  # what a closer look has found

    @property
    def slope(self) -> float | None:
        """The rms of dL/d(output)."""
        return None if self.gradient is None else self.gradient / math.sqrt(max(self.elements, 1))


Look = Callable[[Call, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Passage:
    """Records the calls of the layers in `found` while it is attached.

    `sample` bounds how many numbers of a tensor are read; `look` is called with every call that was recorded;
    `recording` says, as a layer is called, whether the call counts.
    """

    def __init__(
        self,
        found: Mapping[str, nn.Module],
        sample: int | None = None,
        *,
        look: Look | None = None,
        recording: Callable[[], bool] = lambda: True,
    ):
        self.found, self.sample, self.look, self.recording = found, sample, look, recording
        self.calls: list[Call] = []
        self._ends: dict[Any, int] = {}  # node of automatic differentiation -> the call whose output it is
        self._given: dict[int, list[tuple[Scale | None, frozenset[int]]]] = {}  # by layer, what is under way

    def clear(self) -> None:
        """Forget the pass."""
        self.calls, self._ends, self._given = [], {}, {}

    def release(self) -> None:
        """Let go of the graph of what has run so far: nothing that comes will be fed by it."""
        self._ends = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the layers within the block."""
        handles = self.attach()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self) -> list[Any]:
        """Hooks on the layers, to be removed by whoever asked for them."""
        handles: list[Any] = []
        for name, layer in self.found.items():
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(name), with_kwargs=True))
        return handles

    def makers(self, *tensors: Tensor) -> tuple[frozenset[int], set[str]]:
        """The calls from which tensors come without another layer in between, and the operations on the way."""
        seen: set[Any] = set()
        found: set[int] = set()
        names: set[str] = set()
        stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._ends:
                found.add(self._ends[node])
                continue
            names.add(node.name())
            stack.extend(before for before, _ in node.next_functions)
        return frozenset(found), names

    def follow(self, call: Call, output: Tensor) -> None:
        """Note the gradient at this tensor when it passes, as that of the call."""
        call.elements, call.followed = output.numel(), output.requires_grad

        def note(gradient: Tensor) -> None:
            call.gradient = length(gradient)

        for handle in call.about.pop("handles", ()):
            handle.remove()
        if output.requires_grad:
            call.about["handles"] = [output.register_hook(note)]

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recording():
            given = list(tensors_of((args, kwargs)))
            first = scale(given[0], self.sample) if given else None
            self._given.setdefault(id(layer), []).append((first, self.makers(*given)[0]))

    def _after(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            waiting = self._given.get(id(layer))
            tensor = next(tensors_of(output), None)
            if not waiting:
                return
            given, fed_by = waiting.pop()
            size = None if tensor is None else scale(tensor, self.sample)
            if tensor is None or size is None:
                return
            call = Call(name, type(layer).__name__, len(self.calls), given, size, size, fed_by, _is_gate(layer))
            self.calls.append(call)
            if tensor.grad_fn is not None:
                self._ends[tensor.grad_fn] = call.order
            self.follow(call, tensor)
            if self.look is not None:
                self.look(call, layer, args, kwargs)

        return hook


def check_values(model: nn.Module) -> None:
    """Raise ModelError for a model whose parameters have no values yet."""
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name!r} has no shape yet; run the model once on a batch before it is watched")
        if p.is_meta:
            raise ModelError(f"{name!r} is on the meta device, without values; call model.to_empty(device='cpu') first")


def scale(x: Tensor, sample: int | None = None) -> Scale | None:
    """The size of the numbers in a tensor; None for an empty one. `sample`: of about so many of them."""
    count = x.numel()
    if not count:
        return None
    x = x.detach()
    x = x.abs() if x.is_complex() else x
    x = x.reshape(1) if x.ndim == 0 else x
    if sample is not None and count > sample:
        x = x[: max(2, min(len(x), 64))].flatten(1) if x.ndim > 1 else x[:sample]
        x = x[:, :: max(1, x.numel() // sample)] if x.ndim > 1 else x
    x = x.to(torch.float64 if sample is None else _wide(x))
    x = x.reshape(len(x), -1) if len(x) > 1 else x.reshape(-1, 1)  # a single sample is told from its own mean
    mean = x.mean(0)
    centred, every = (x - mean).flatten(), x.flatten()
    within, total, middle = torch.stack([centred.dot(centred), every.dot(every), mean.mean()]).tolist()
    return Scale(math.sqrt(total / len(every)), middle, math.sqrt(within / len(every)), count)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of floating (or complex) point in nested arguments or results, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


def length(x: Tensor) -> float:
    """The Euclidean norm of all elements, in float32 or better."""
    x = x.detach()
    return float(torch.linalg.vector_norm(x if x.is_complex() else x.to(_wide(x))))


def gain_of(matrix: Tensor) -> float:
    """rms(W) sqrt(fan in): by how much a matrix (outputs, inputs, ...) scales what is independent and of mean 0."""
    return length(matrix) / math.sqrt(len(matrix)) if matrix.numel() else 0.0


def rows_alike(rows: Tensor) -> bool:
    """Whether all rows are the same, up to rounding.

    >>> rows_alike(torch.ones(3, 2)), rows_alike(torch.eye(2))
    (True, False)
    """
    rows = rows.detach().flatten(1)
    rows = rows if rows.is_complex() else rows.to(_wide(rows))
    apart = (rows - rows[:1]).abs().square().sum(1).amax()
    return bool(apart <= ALIKE**2 * rows.abs().square().sum(1).amax())


def _is_gate(layer: nn.Module) -> bool:
    if is_parametrized(layer):  # to look at the weights is to compute them, which may change the layer (spectral norms)
        return False
    own = list(layer.parameters(recurse=False))
    if any(map(is_sharded, own)):  # what this process holds: to put matrices together all would have to be asked
        parts = [local(p.detach()) for p in own if p.ndim > 1]
        return bool(parts) and not isinstance(layer, TABLES) and all(gain_of(part) < GATE for part in parts)
    found = [m.values for m in matrices(layer) if m.role != "table"]
    return bool(found) and (
        all(gain_of(m) < GATE for m in found) or all(_start_alike(m) and rows_alike(m) for m in found)
    )


def _start_alike(matrix: Tensor) -> bool:
    """Whether the first numbers of two rows are the same: soon said, and almost always no."""
    one, other = (row.detach().flatten()[:4].tolist() for row in (matrix[0], matrix[-1]))
    return all(abs(a - b) <= 2 * ALIKE * gain_of(matrix) for a, b in zip(one, other, strict=True))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

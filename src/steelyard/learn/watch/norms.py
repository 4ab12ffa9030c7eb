"""How large each tensor is, how large its gradient, and how far an optimizer step moves it: exactly, at every step.

Decides how the norms are taken: a trainable tensor is copied before the step, in the pass that reads its norm, and
compared after it; float32 on the processor goes through loops of ours, everything else through torch. Reads only.
Knows nothing of hooks or logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steelyard.formats._sharded import is_sharded
from steelyard.kernels import norms as loops

PIECE = 1 << 19  # elements that one thread takes at a time
SHARED = 1 << 22  # elements from which on threads are worth their start

Loop = Callable[..., None]


@dataclass(frozen=True)
class Readings:
    """The norms of each tensor at one step, (tensors,) float64 each; NaN where there is none."""

    weight: np.ndarray  # ||W|| before the step
    gradient: np.ndarray  # ||g|| as the optimizer got it, after any clipping; 0 without one
    update: np.ndarray  # ||W_after - W||
    learning: np.ndarray  # bool: whether there is a gradient

    @property
    def ratio(self) -> np.ndarray:
        """||W_after - W|| / ||W||; NaN for a tensor that was all zeros before the step."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.weight != 0, self.update / self.weight, np.nan)


class Norms:
    """The norms around each step of the tensors given; call `before`, step, call `after`.

    Holds a copy of every trainable tensor between the two calls, in memory that is kept for the next step: 4 bytes
    for a float32 weight. A frozen tensor without a gradient is not copied; its norm is read again after a change only.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> norms = Norms({"w": w})
    >>> norms.before()
    >>> with torch.no_grad(): _ = w.sub_(torch.tensor([0.3, 0.4]))
    >>> norms.after().ratio.round(6).tolist()
    [0.1]
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self.copies: dict[str, Tensor] = {}  # of the trainable ones, as they were before the step
        self.gradient = np.zeros(len(self.tensors))  # ||g||, known from `before` on
        self.learning = np.zeros(len(self.tensors), bool)
        self._weight = np.zeros(len(self.tensors))
        self._places = {name: i for i, name in enumerate(self.tensors)}
        self._still: dict[str, tuple[object, float]] = {}
        self._pool: ThreadPoolExecutor | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Read the norms of weights and gradients, and copy what may move."""
        self.gradient, self.learning = np.zeros_like(self.gradient), np.zeros_like(self.learning)
        self._read_gradients()
        moving = {n: p for n, p in self.tensors.items() if _moves(p)}
        for name in self.copies.keys() - moving.keys():
            del self.copies[name]
        self._weight = self._keep(moving)
        for name, p in self.tensors.items():
            if name not in moving and not is_lazy(p):
                self._weight[self._places[name]] = self._norm_of_still(name, p)

    @torch.no_grad()
    def after(self) -> Readings:
        """Read how far the step went. A gradient that the step itself made (by a closure) is read here."""
        self._read_gradients()
        update = self._norms({n: self.tensors[n] for n in self.copies}, against=True)
        return Readings(self._weight, self.gradient, update, self.learning)

    @torch.no_grad()
    def hold(self) -> np.ndarray:
        """Copy every tensor that has values, whether it may move or not; their norms, (tensors,)."""
        return self._keep({name: p for name, p in self.tensors.items() if not is_lazy(p)})

    @torch.no_grad()
    def renew(self) -> np.ndarray:
        """How far each tensor is from its copy, (tensors,), in the pass that makes the copy anew."""
        return self._norms({n: self.tensors[n] for n in self.copies}, copy=True, against=True)

    def _keep(self, chosen: Mapping[str, Tensor]) -> np.ndarray:
        for name, p in chosen.items():
            copy = self.copies.get(name)
            if copy is None or copy.shape != p.shape or copy.dtype != p.dtype or copy.device != p.device:
                self.copies[name] = torch.empty_like(p.detach(), memory_format=torch.preserve_format)
        return self._norms(chosen, copy=True)

    def _read_gradients(self) -> None:
        """The norms of the gradients that are there and were not read yet in this step."""
        waiting = (name for name, known in zip(self.tensors, self.learning, strict=True) if not known)
        found = {name: g for name in waiting if (g := gradient_of(self.tensors[name])) is not None}
        if found:
            self.gradient += self._norms(found)
            self.learning[[self._places[n] for n in found]] = True

    def close(self) -> None:
        """Give back the copies and the threads."""
        self.copies.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _norm_of_still(self, name: str, p: Tensor) -> float:
        state = (p._version, p.data_ptr(), p.dtype)
        known = self._still.get(name)
        if known is None or known[0] != state:
            known = self._still[name] = (state, float(_norm(p.detach())))
        return known[1]

    def _norms(self, chosen: Mapping[str, Tensor], *, copy: bool = False, against: bool = False) -> np.ndarray:
        """The norms of the tensors of those names, (tensors,), 0 for others. `copy` keeps them; `against`: how far each
        is from its copy, before that is made anew."""
        result = np.zeros(len(self.tensors))
        places = self._places
        quick: list[str] = []
        slow: list[str] = []
        for name, x in chosen.items():
            plain = _is_plain(x) and (not (copy or against) or _is_plain(self.copies[name]))
            (quick if plain else slow).append(name)
        if quick:
            copies = [self.copies[name] for name in quick] if copy or against else None
            loop = (loops.renew if copy else loops.moved) if against else loops.keep
            totals = self._in_pieces([chosen[name] for name in quick], copies, loop)
            result[[places[name] for name in quick]] = np.sqrt(totals)
        if slow:
            values = []
            for name in slow:
                x, other = chosen[name].detach(), self.copies.get(name)
                values.append(_distance(x, other) if against and other is not None else _norm(x))
                if copy and other is not None:
                    other.copy_(x)
            result[[places[name] for name in slow]] = _numbers(values)
        return result

    def _in_pieces(self, arrays: Sequence[Tensor], copies: Sequence[Tensor] | None, loop: Loop) -> np.ndarray:
        """The sums of squares of the arrays, (arrays,), by a loop over pieces of them; in threads where it pays."""
        sizes = [x.numel() for x in arrays]
        pieces = [-(-size // PIECE) for size in sizes]
        owner = np.repeat(np.arange(len(arrays)), pieces)
        first = np.concatenate([np.arange(n) for n in pieces]) * PIECE if pieces else np.empty(0, np.int64)
        counts = np.minimum(np.array(sizes, np.int64)[owner] - first, PIECE)
        given: list[Any] = [_addresses(arrays)[owner] + np.uint64(4) * first.astype(np.uint64)]
        if copies is None:
            loop = loops.squares
        else:
            given.append(_addresses(copies)[owner] + np.uint64(4) * first.astype(np.uint64))
        totals = np.zeros(len(owner))
        threads = min(torch.get_num_threads(), len(owner)) if sum(sizes) >= SHARED else 1
        if threads == 1:
            loop(*given, counts, 0, len(owner), totals)
        else:
            self._pool = self._pool or ThreadPoolExecutor(threads)
            ends = np.linspace(0, len(owner), 4 * threads + 1).astype(int).tolist()
            for done in [self._pool.submit(loop, *given, counts, a, b, totals) for a, b in pairwise(ends)]:
                done.result()
        return np.bincount(owner, totals, minlength=len(arrays))


def _addresses(arrays: Iterable[Tensor]) -> np.ndarray:
    return np.array([x.data_ptr() for x in arrays], np.uint64)


def _moves(p: Tensor) -> bool:
    return not is_lazy(p) and (p.requires_grad or p.grad is not None)


def gradient_of(p: Tensor) -> Tensor | None:
    """The gradient; of a sparse one the values that are not left out."""
    gradient = None if is_lazy(p) else p.grad
    return gradient.coalesce().values() if gradient is not None and gradient.is_sparse else gradient


def _is_plain(x: Tensor) -> bool:
    """Whether the values are float32, one after the other, in the processor's memory."""
    kind = type(x) is Tensor or type(x) is torch.nn.Parameter
    return kind and x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _wide(x: Tensor) -> torch.dtype:
    """What norms are taken in: float64 on the processor; elsewhere, where that may be slow or missing, float32."""
    return torch.float64 if x.device.type == "cpu" or x.dtype in (torch.float64, torch.complex128) else torch.float32


def _norm(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return torch.linalg.vector_norm(x, dtype=_wide(x))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||, the difference taken without rounding a piece at a time."""
    x, y = (torch.view_as_real(t) if t.is_complex() else t for t in (x, y))
    wide = _wide(x)
    if is_sharded(x):
        return torch.linalg.vector_norm(x.to(wide) - y.to(wide))
    pieces = zip(x.reshape(-1).split(PIECE), y.reshape(-1).split(PIECE), strict=True)
    found = [torch.linalg.vector_norm(a.to(wide) - b.to(wide)) for a, b in pieces]
    return torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros((), dtype=wide)


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """0-dimensional tensors as numbers: one wait for each device. Those of shards are put together by all processes."""
    values = [v.full_tensor() if is_sharded(v) else v for v in values]
    numbers = [0.0] * len(values)
    for kind in {(v.device, v.dtype) for v in values}:
        places = [i for i, v in enumerate(values) if (v.device, v.dtype) == kind]
        for i, number in zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True):
            numbers[i] = number
    return numbers

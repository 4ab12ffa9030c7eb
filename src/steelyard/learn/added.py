"""Parameters of no layer that are added to the signal or put beside it: positions, class tokens, learned queries.

Decides which of them a start by data may scale, and to what: only those that reach the sum as they are but for a
factor, never biases and what is added to the scores of attention. They are met in the pass itself, at the moment that
they are added. Knows nothing of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from steelyard.core.spec import Spec
from steelyard.init import generator, scheme_of
from steelyard.learn.kinds import KINDS, SUMS
from steelyard.learn.matrices import is_started
from steelyard.learn.tracing import is_fresh, plain, swap, tensors

SHARE = 0.3  # of the standard deviation of what it is added to; see bench/positions
FAINT = 0.1  # of it: what is kept and has less takes long to be heard
JOINS = (*SUMS, *KINDS["concatenate"], "where")
SCORES = ("matmul", "rmatmul", "bmm", "baddbmm", "einsum")  # of two signals: queries and keys

BIAS, LIKE_BIAS = "it is a bias", "the same is added at every place, like a bias"
SCORED = "it is added to the scores of attention"
HARMLESS = (BIAS, LIKE_BIAS, SCORED)  # reasons for which a small scale is as it should be


@dataclass(eq=False)
class Part:
    """One parameter, and what became of it."""

    name: str
    parameter: Tensor
    calls: int = 0
    factor: float = 1.0
    std: float | None = None  # of what was added, in the last pass
    beside: float | None = None  # the standard deviation of what it was added to
    drawn: bool = False
    kept: str = ""  # why it has the scale that it had
    settled: bool = False  # in this pass
    used: bool = False  # in this pass: before it was added, or otherwise

    @property
    def scaled(self) -> bool:
        """Whether it has been given a scale."""
        return self.std is not None and not self.kept

    @property
    def share(self) -> float | None:
        """Its standard deviation relative to that of what it is added to."""
        return self.std / self.beside if self.std is not None and self.beside else None

    def row(self) -> dict[str, Any]:
        """Of the table of a start."""
        done = "drawn normal" if self.drawn else "its pattern kept"
        row: dict[str, Any] = {"layer": self.name, "kind": "Parameter", "calls": self.calls, "std": self.std}
        return row | {"factor": self.factor, "done": f"{done}, at {SHARE:g} of the scale of what it is added to"}


@dataclass
class _Derived:
    """A tensor that was made of parameters alone, and how to make it again."""

    parts: frozenset[Part]
    again: Callable[[], Tensor]


class Added(TorchFunctionMode):
    """Follows the functions of a pass, and gives what is added to the signal its scale.

    `mine` are the parameters of layers, by id, which are started elsewhere.
    """

    def __init__(self, model: nn.Module, mine: Mapping[int, object], seed: int):
        super().__init__()
        self.mine, self.seed = mine, seed
        free = {name: p for name, p in model.named_parameters() if id(p) not in mine and p.is_floating_point()}
        self.parts = {id(p): Part(name, p) for name, p in free.items()}
        self.signal: Any = WeakTensorKeyDictionary()  # what comes from the data -> whether it is a score of attention
        self.made: Any = WeakTensorKeyDictionary()

    @contextmanager
    def watching(self, *inputs: Any) -> Iterator[None]:
        """One pass over these inputs."""
        self.signal, self.made = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for part in self.parts.values():
            part.settled, part.used, part.calls, part.kept = False, False, 0, ""
        for tensor in tensors(inputs):
            self.signal[tensor] = False
        if not self.parts:
            yield
            return
        with self:
            yield
        self.signal, self.made = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, plain(getattr(func, "__name__", ""))
        given = [] if is_fresh(name) else list(tensors((args, kwargs)))
        signals = [t for t in given if t in self.signal]
        ours = [d for t in given if (d := self._derived(t)) is not None]
        weighted = any(id(t) in self.mine for t in given)
        if signals and ours and name in JOINS:
            args, kwargs = swap((args, kwargs), lambda x: self._joined(x, signals, name))
        elif signals or weighted:
            for part in frozenset().union(*(d.parts for d in ours)):
                part.used = True
        result = func(*args, **kwargs)
        if signals or (ours and weighted):
            scores = (name in SCORES and len(signals) > 1) or (name not in SCORES and any(map(self._scores, signals)))
            for tensor in tensors(result):
                self.signal[tensor] = scores
        elif ours:
            self._note(result, ours, func, args, kwargs)
        return result

    def _scores(self, tensor: Tensor) -> bool:
        return bool(self.signal[tensor])

    def _derived(self, tensor: Tensor) -> _Derived | None:
        part = self.parts.get(id(tensor))
        if part is not None and part.parameter is tensor:
            return _Derived(frozenset([part]), lambda: tensor)
        return self.made.get(tensor)

    def _note(self, result: Any, ours: list[_Derived], func: Any, args: Any, kwargs: Any) -> None:
        """How to make a tensor again of parameters that have changed."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        before = {id(t): d for t in tensors((args, kwargs)) if (d := self._derived(t)) is not None}

        def again() -> Tensor:
            new_args, new_kwargs = swap((args, kwargs), lambda x: before[id(x)].again() if id(x) in before else x)
            made: Tensor = func(*new_args, **new_kwargs)
            return made

        self.made[result] = _Derived(frozenset().union(*(d.parts for d in ours)), again)

    def _joined(self, x: Any, signals: list[Tensor], name: str) -> Any:
        """What is added in the place of `x`: the same with the scale that it should have."""
        found = self._derived(x) if isinstance(x, Tensor) else None
        if found is None:
            return x
        if not any(part.settled for part in found.parts):
            self._settle(found, signals, name)
        for part in found.parts:
            part.calls += 1
        return found.again()

    def _settle(self, found: _Derived, signals: list[Tensor], name: str) -> None:
        with torch.no_grad():
            beside = _pooled([t for t in signals if t.is_floating_point()])
            why = self._reason(found, signals, name)
            if not why and _std(found.again()) == 0:
                for part in found.parts:
                    self._draw(part)
            std = _std(found.again())
            if not why and not (std > 0 and beside > 0 and math.isfinite(std) and math.isfinite(beside)):
                why = "it has no scale to change"
            ratio = 1.0 if why else SHARE * beside / std
            for part in found.parts:
                if not why:
                    part.parameter.data.mul_(ratio)  # not seen by automatic differentiation, which holds no value of it
                part.factor *= ratio
                part.std, part.beside, part.kept, part.settled = std * ratio, beside, why, True

    def _reason(self, found: _Derived, signals: list[Tensor], name: str) -> str:
        """Why what is added keeps its scale; '' if it does not."""
        for part in found.parts:
            if not is_started(part.parameter):
                return "it is frozen"
            leaf = part.name.rpartition(".")[2]
            if leaf.startswith(("bias", "beta")) or leaf.endswith("bias"):
                return BIAS
            if name in SUMS and part.parameter.squeeze().ndim < 2:
                return LIKE_BIAS
            if part.used:
                return "it is used in another way, too"
        if any(map(self._scores, signals)):
            return SCORED
        return "" if _is_linear(found) else "it is changed before it is added"

    def _draw(self, part: Part) -> None:
        """Normal values in the place of ones that are all the same."""
        shape = Spec.of(tuple(part.parameter.shape), "float64")
        values = scheme_of("normal(std=1)")(shape, generator(self.seed, part.name))
        part.parameter.data.copy_(torch.from_numpy(values))
        part.drawn = True

    def scaled(self) -> list[Part]:
        """Those that were given a scale, by name."""
        return [part for part in self.parts.values() if part.scaled]

    def faint(self) -> dict[str, str]:
        """By name those that kept a scale at which they are not heard, and why: no biases, nothing added to scores."""
        return {
            part.name: f"added to a signal of {1 / part.share:.0f} times its scale, and kept: {part.kept}"
            if part.share
            else f"added to the signal without any scale, and kept: {part.kept}"
            for part in self.parts.values()
            if part.kept and part.kept not in HARMLESS and part.share is not None and part.share < FAINT
        }


def _is_linear(found: _Derived) -> bool:
    """Whether twice the parameters give twice the tensor; tried with other values than theirs, which may be 0."""
    before = [(part.parameter, part.parameter.data.clone()) for part in found.parts]
    tried = {parameter: torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape) for parameter, _ in before}
    results = []
    for factor in (1.0, 2.0):
        for parameter, values in tried.items():
            parameter.data.copy_(factor * values)
        results.append(found.again().clone())
    for parameter, values in before:
        parameter.data.copy_(values)
    return bool(torch.allclose(results[1], 2 * results[0], rtol=1e-3))


def _std(x: Tensor) -> float:
    return float(x.detach().double().std(unbiased=False)) if x.numel() > 1 else 0.0


def _pooled(parts: list[Tensor]) -> float:
    """The standard deviation within several tensors."""
    count = sum(x.numel() for x in parts)
    return math.sqrt(sum(_std(x) ** 2 * x.numel() for x in parts) / count) if count else 0.0

"""What the layers do in one forward and backward pass of the training: signal, gradient, dead units, limits, drift.

Decides what is tapped while the model runs by itself: hooks that only read, for the time of one pass. What is measured
at weighted layers is in ``learn/passage``, what is healthy in ``learn/verdicts``. Knows nothing of steps or logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from steelyard.learn.gauges import plain_name
from steelyard.learn.limits import EDGE, allowed, attended, entropy, multihead
from steelyard.learn.matrices import outermost
from steelyard.learn.passage import Call, Passage
from steelyard.learn.verdicts import HEALTHY, judged

SAMPLE = 1 << 16  # numbers of an activation that are read for its scale

_RECTIFIERS = ("relu", "relu_", "relu6", "hardtanh", "threshold", "hardswish")
_LIMITED = {"tanh": -1.0, "tanh_": -1.0, "sigmoid": 0.0, "sigmoid_": 0.0, "hardsigmoid": 0.0}  # -> the lower limit


@dataclass
class Layer:
    """What one layer did in the pass; None where it does not apply."""

    name: str
    kind: str
    rms: float | None = None  # of the activation
    spread: float | None = None  # of it, after the mean over the examples is taken away
    gradient: float | None = None  # rms of dL/d(activation)
    verdict: str = HEALTHY  # of the signal and the gradient, see learn/verdicts
    dead: frozenset[int] | None = None  # units that are zero for the whole batch, after a rectifier
    units: int = 0
    saturated: float | None = None  # the share of activations at their limits
    peaked: float | None = None  # the share of attention's queries that are bound to a single key
    drift: float | None = None  # of a batch normalisation: from its running statistics to the batch


@dataclass
class _Closer:
    """What was seen of a layer beside its scales, over all of its calls."""

    dead: frozenset[int] | None = None
    units: int = 0
    saturated: list[float] = field(default_factory=list)


class Taps(TorchFunctionMode):
    """Taps on a model for one pass: `begin`, run the model, `leave`, go backwards, `remove`, `layers`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.passage = Passage(outermost(model), SAMPLE, look=self._look, recording=lambda: self.active)
        self.active = True  # until the model runs once more
        self.norms = {name: module for name, module in model.named_modules() if _tracks(module)}
        self._seen: dict[str, _Closer] = {}
        self._peaked: dict[str, list[float]] = {}
        self._drift: dict[str, float] = {}
        self._last: Call | None = None  # the last call, until a function of each element follows it
        self._quiet = self._entered = False
        self._handles: list[Any] = []

    def begin(self) -> None:
        """Tap what runs from now on."""
        self._handles = self.passage.attach()
        self._handles += [m.register_forward_pre_hook(self._normalise(name)) for name, m in self.norms.items()]
        self._entered = True
        self.__enter__()

    def leave(self) -> None:
        """Listen to functions no more; gradients that are awaited are still noted."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)
            self.passage.release()

    def remove(self) -> None:
        """Take the hooks away: while the model runs, torch would still call them."""
        self.leave()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def layers(self) -> list[Layer]:
        """What was found, in the order in which the layers ran first."""
        calls = self.passage.calls
        verdicts = judged(calls)
        found: dict[str, Layer] = {}
        for call, verdict in zip(calls, verdicts, strict=True):
            name = plain_name(call.layer)
            layer = found.get(name)
            if layer is None:
                closer = self._seen.get(call.layer, _Closer())
                layer = found[name] = Layer(name, call.kind, call.output.rms, call.output.spread, call.slope, verdict)
                layer.dead, layer.units = closer.dead, closer.units
                layer.saturated = max(closer.saturated, default=None)
            elif layer.verdict == HEALTHY:
                layer.verdict = verdict
        for name, shares in self._peaked.items():
            found.setdefault(name, Layer(name, "attention")).peaked = max(shares)
        for name, drift in self._drift.items():
            found[plain_name(name)] = Layer(plain_name(name), type(self.norms[name]).__name__, drift=drift)
        return list(found.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._quiet or not self.passage.calls or not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        if name in _RECTIFIERS or name in _LIMITED:
            self._activation(name, result)
        elif name == "scaled_dot_product_attention":
            self._attention(args[:2], attended(*args, **(kwargs or {}))[1])
        elif name == "softmax" and result.ndim > 2 and "BmmBackward0" in self.passage.makers(args[0])[1]:
            self._attention(args[:1], entropy(result, allowed(args[0]))[1])
        return result

    def _look(self, call: Call, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last = call
        if isinstance(layer, nn.MultiheadAttention):
            self._quiet = True
            try:
                with torch.no_grad():
                    share = multihead(layer, args, kwargs)[1]
            finally:
                self._quiet = False
            if share is not None:
                self._peaked.setdefault(plain_name(call.layer), []).append(share)

    @torch.no_grad()
    def _activation(self, name: str, a: Tensor) -> None:
        call, self._last = self._last, None
        if call is None:
            return
        seen = self._seen.setdefault(call.layer, _Closer())
        if name in _RECTIFIERS:
            axis = 1 if a.ndim > 2 and call.kind.startswith("Conv") else a.ndim - 1
            alive = (a.detach() != 0).movedim(axis, 0).flatten(1).any(1)
            dead = frozenset((~alive).nonzero().flatten().tolist())
            seen.dead, seen.units = dead if seen.dead is None else seen.dead & dead, len(alive)
        else:
            low = _LIMITED[name]
            edge = (1 - EDGE) * (1.0 - low) / 2
            a = a.detach()
            seen.saturated.append(float(((a < low + edge) | (a > 1.0 - edge)).float().mean()))

    def _attention(self, made_of: Sequence[Tensor], share: float | None) -> None:
        """Note the attention at the module around the layers that made queries and keys."""
        if share is None:
            return
        makers = {self.passage.calls[order].layer for order in self.passage.makers(*made_of)[0]}
        names = sorted(plain_name(name) for name in makers) or [plain_name(self.passage.calls[-1].layer)]
        self._peaked.setdefault(around(names), []).append(share)

    def _normalise(self, name: str) -> Any:
        def hook(module: _BatchNorm, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and name not in self._drift:
                self._quiet = True
                self._drift[name] = drift(module, args[0])
                self._quiet = False

        return hook


@torch.no_grad()
def drift(norm: _BatchNorm, x: Tensor) -> float:
    """How far a batch is from the running statistics of a batch normalisation: a divergence, median over the channels.

    The Kullback-Leibler divergence of N(mean, variance) of the batch from N(running mean, running variance), in nats:
    0 where they agree, 0.5 where the mean is one standard deviation away.

    >>> norm = nn.BatchNorm1d(1)
    >>> round(drift(norm, torch.tensor([[0.0], [2.0]])), 3)
    0.5
    """
    x = x.detach().float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    variance, running = variance + norm.eps, norm.running_var.float() + norm.eps
    away = (mean - norm.running_mean.float()).square()
    return float(((running / variance).log() + (variance + away) / running - 1).median() / 2)


def around(names: Sequence[str]) -> str:
    """The name of the module that holds all of these.

    >>> around(["blocks.0.attention.key", "blocks.0.attention.query"])
    'blocks.0.attention'
    """
    if len(names) == 1:
        return names[0]
    levels = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)) or names[0]


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None

"""The scale of the signal through a model, forwards and backwards, layer by layer, with cause and cure.

Decides what is healthy: by absolute scale relative to the input (forwards) and to the last layer
(backwards), never by the ratio of weight gradients, which stays near 1 while everything vanishes. Watches
one batch; knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.explain.layers import forward, weighted_layers

LIMIT = 1e3  # a scale this many times smaller or larger than where it came from is flagged
DEAD = 0.5  # a layer with this share of dead units is flagged
SATURATED = 0.5  # a layer with this share of saturated activations is flagged

_ACTIVATIONS = {
    **dict.fromkeys(("relu", "relu_", "relu6", "hardtanh", "threshold", "hardswish"), "relu"),
    **dict.fromkeys(("tanh", "tanh_"), "tanh"),
    **dict.fromkeys(("sigmoid", "sigmoid_", "hardsigmoid"), "sigmoid"),
    **dict.fromkeys(("gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "prelu"), "smooth"),
}

_WORDS = {
    "healthy": ("", ""),
    "vanishing signal": (
        "each layer shrinks what passes through it, so that inputs look alike here",
        "start with He for ReLU, Xavier for tanh, or a data-driven start; or add normalisation",
    ),
    "exploding signal": (
        "each layer enlarges what passes through it",
        "start with a smaller scale (He for ReLU, Xavier for tanh) or a data-driven start; or add normalisation",
    ),
    "vanishing gradient": (
        "each layer shrinks the gradient on its way back, so that this layer hardly learns",
        "start with He for ReLU, Xavier for tanh, or a data-driven start; or add residual connections",
    ),
    "exploding gradient": (
        "each layer enlarges the gradient on its way back",
        "start with a smaller scale, or clip the gradient",
    ),
    "dead": (
        "most units are zero for every sample: their biases are too negative or a step was too long",
        "start again with He and small biases, lower the rate, or use leaky ReLU or GELU",
    ),
    "saturated": (
        "most activations are at their limits, where the slope is almost zero",
        "start with a smaller scale (Xavier) or normalise the inputs",
    ),
    "not finite": ("the scale left the range of the number format", "start with a smaller scale, or lower the rate"),
}


@dataclass
class _Seen:
    """What one layer did in the pass."""

    kind: str
    rms: float
    mean: float
    spread: float
    size: int
    activation: str = ""
    saturated: float | None = None
    dead: list[int] | None = None
    units: int = 0
    gradient: float | None = None
    handles: list[Any] = field(default_factory=list)


def signal(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]) -> Table:
    """Forward and backward scale at every weighted layer, in order of execution, with a verdict.

    For each layer: rms and mean of its activation a (after the non-linearity that follows it), spread =
    rms(a - mean over the samples), which is what tells samples apart, the share of units that are dead
    (ReLU output zero for every sample and position) or of activations that are saturated, and the rms of
    dL/da and dL/dW for L = the mean loss of the batch.

    A layer is flagged when its spread is 1000 times below or above that of the input, or its dL/da is
    1000 times below or above that of the last layer, when half of its units are dead, or when half of its
    activations are saturated.

    Args:
        model: any module, in the mode it is in; its gradients and buffers are as before afterwards.
        batch: (inputs, targets).
        loss: of outputs and targets: a scalar, or a value for each example.

    Returns a table; its meta holds the model's verdict, the first layer it holds for, and the indices of
    dead units by layer.

    Raises ModelError if no weighted layer runs or the loss does not depend on the weights.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(16, dtype=torch.long)
    >>> signal(model, batch, nn.functional.cross_entropy).column("layer")
    ['0', '2']

    Source: Glorot & Bengio 2010; He et al. 2015 (the scales that keep a layer's variance).
    """
    inputs, targets = batch[0], batch[1]
    watch = _Watch(weighted_layers(model))
    parameters = {id(p): p for p in model.parameters() if p.requires_grad}
    held = {name: b.detach().clone() for name, b in model.named_buffers()}
    try:
        with watch.hooks(), watch, torch.enable_grad():
            outputs = forward(model, inputs)
        if not watch.seen:
            raise ModelError("no layer with weights runs on this batch; there is no signal to follow")
        value = loss(outputs, targets).mean()
        if not value.requires_grad:
            raise ModelError("the loss does not depend on a trainable weight; there is no gradient to follow")
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(held[name])
    gradients = dict(zip(parameters, found, strict=True))
    return _table(watch, gradients, watch.layers, _spread(inputs))


class _Watch(TorchFunctionMode):
    """Records layers by hooks, and the activation functions called after them by name."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = layers
        self.seen: dict[str, _Seen] = {}
        self.last: _Seen | None = None

    def hooks(self) -> _Hooks:
        return _Hooks([m.register_forward_hook(self._layer(name)) for name, m in self.layers.items()])

    def _layer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if name in self.seen or not isinstance(tensor, Tensor):
                return
            self.last = self.seen[name] = _Seen(type(module).__name__, *_scale(tensor))
            self._follow(self.last, tensor)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _ACTIVATIONS.get(getattr(func, "__name__", ""))
        if kind and self.last is not None and not self.last.activation and isinstance(result, Tensor):
            self._activation(self.last, kind, result)
        return result

    def _activation(self, seen: _Seen, kind: str, a: Tensor) -> None:
        seen.activation = kind
        seen.rms, seen.mean, seen.spread, seen.size = _scale(a)
        if kind == "relu":
            axis = 1 if a.ndim > 2 and seen.kind.startswith("Conv") else a.ndim - 1
            alive = (a.detach() != 0).movedim(axis, 0).flatten(1).any(1)
            seen.dead, seen.units = (~alive).nonzero().flatten().tolist(), len(alive)
        elif kind in ("tanh", "sigmoid"):
            low = -1.0 if kind == "tanh" else 0.0
            edge = 0.03 * (1.0 - low) / 2
            seen.saturated = float(((a < low + edge) | (a > 1.0 - edge)).double().mean())
        self._follow(seen, a)

    def _follow(self, seen: _Seen, a: Tensor) -> None:
        """Note the gradient at this tensor when it passes."""
        for handle in seen.handles:
            handle.remove()
        if a.requires_grad:

            def note(gradient: Tensor) -> None:
                seen.gradient = _rms(gradient)

            seen.handles = [a.register_hook(note)]


class _Hooks:
    """Hooks that are removed at the end of a with block."""

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def _scale(x: Tensor) -> tuple[float, float, float, int]:
    x = x.detach().double()
    centred = x - x.mean(0, keepdim=True) if len(x) > 1 else x
    return _rms(x), float(x.mean()), _rms(centred), x.numel()


def _spread(inputs: Any) -> float | None:
    """The spread of the first floating-point input; None where inputs are indices."""
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return _scale(first)[2] if isinstance(first, Tensor) and first.is_floating_point() else None


def _table(
    watch: _Watch, gradients: dict[int, Tensor | None], layers: dict[str, nn.Module], given: float | None
) -> Table:
    seen = watch.seen
    reference = given if given else next((s.spread for s in seen.values() if s.spread), 1.0)
    last = next((s.gradient for s in reversed(seen.values()) if s.gradient), None)
    rows = []
    for name, s in seen.items():
        parameter = next((p for n, p in layers[name].named_parameters() if "weight" in n), None)
        gradient = gradients.get(id(parameter))
        verdict = _verdict(s, reference, last)
        cause, cure = _WORDS[verdict]
        rows.append(
            {
                "layer": name,
                "kind": s.kind,
                "rms": s.rms,
                "mean": s.mean,
                "spread": s.spread,
                "dead": len(s.dead) / s.units if s.dead is not None else None,
                "saturated": s.saturated,
                "gradient": s.gradient,
                "weight gradient": None if gradient is None else _rms(gradient),
                "verdict": verdict,
                "cause and cure": f"{cause}; {cure}" if cause else "",
            }
        )
    overall = _overall(rows)
    drift = [s.spread for s in seen.values()]
    meta = {
        "verdict": overall,
        "first": None if overall == "healthy" else next(r["layer"] for r in rows if r["verdict"] == overall),
        "input spread": given,
        "drift": drift[-1] / drift[0] if drift[0] else None,
        "dead units": {n: s.dead for n, s in seen.items() if s.dead},
    }
    return Table.of("signal through the layers", _COLUMNS, rows, meta)


def _overall(rows: list[dict[str, Any]]) -> str:
    """The verdict of the whole: a signal that is lost forwards explains a gradient that is lost backwards."""
    verdicts = [r["verdict"] for r in rows]
    return next((v for v in ("not finite", *_WORDS) if v != "healthy" and v in verdicts), "healthy")


def _verdict(seen: _Seen, reference: float, last: float | None) -> str:
    forwards = seen.spread / reference
    backwards = seen.gradient / last if seen.gradient is not None and last else 1.0
    if not all(map(_finite, (seen.rms, backwards))):
        return "not finite"
    if seen.dead is not None and seen.units and len(seen.dead) >= DEAD * seen.units and forwards > 1 / LIMIT:
        return "dead"
    if seen.saturated is not None and seen.saturated >= SATURATED:
        return "saturated"
    for ratio, what in ((forwards, "signal"), (backwards, "gradient")):
        if ratio < 1 / LIMIT:
            return f"vanishing {what}"
        if ratio > LIMIT:
            return f"exploding {what}"
    return "healthy"


def _finite(x: float) -> bool:
    return x - x == 0.0


_COLUMNS = [
    Column("layer"),
    Column("kind"),
    Column("verdict"),
    Column("rms", about="root mean square of the activation"),
    Column("mean"),
    Column("spread", about="rms of the activation after the mean over the samples is taken away"),
    Column("dead", "%", "units that are zero for every sample"),
    Column("saturated", "%", "activations at their limits"),
    Column("gradient", about="rms of dL/da"),
    Column("weight gradient", about="rms of dL/dW"),
    Column("cause and cure"),
]

"""The scale of the signal through a model, forwards and backwards, layer by layer, with cause and cure.

Decides how a model is followed without a trace, and what is told of a layer. What is healthy is in
``learn/verdicts``, what is measured at a call in ``learn/passage``. Watches one batch; knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import unfused
from steelyard.learn.limits import EDGE, allowed, attended, entropy, gates_at_limits, multihead
from steelyard.learn.matrices import outermost, weights_of
from steelyard.learn.passage import Call, Passage, check_values, scale, tensors_of
from steelyard.learn.symmetry import symmetric
from steelyard.learn.task import Batch, called, weighted_mean
from steelyard.learn.tracing import tensors
from steelyard.learn.verdicts import WORDS, blamed, depends_on_data, judged, overall, sentence

DEAD = 0.5  # a layer with this share of dead units is flagged
FEW = 6  # samples and positions: fewer say nothing of dead units
SATURATED = 0.5  # a layer with this share of saturated activations is flagged
EPS = 1e-8  # of Adam: a gradient that is not large against it gives a smaller step

_ACTIVATIONS = {
    **dict.fromkeys(("relu", "relu_", "relu6", "hardtanh", "threshold", "hardswish"), "relu"),
    **dict.fromkeys(("tanh", "tanh_"), "tanh"),
    **dict.fromkeys(("sigmoid", "sigmoid_", "hardsigmoid"), "sigmoid"),
    **dict.fromkeys(("gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "prelu"), "smooth"),
}


def signal(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], *, rate: float = 1e-3) -> Table:
    """Forward and backward scale at every weighted layer, in order of execution, with a verdict.

    For each layer: rms and mean of its activation a (after the non-linearity that follows it), spread =
    rms(a - mean over the samples), which is what tells samples apart, the share of units that are dead (ReLU output
    zero for every sample and position) or of activations that are saturated, the entropy of the attention that its
    output decides (as a share of that of equal attention), the rms of dL/da, of W and of dL/dW for L = the mean loss
    of the batch, and the length of the first step relative to that of the weights: rate |dL/dW| / |W| for gradient
    descent, and rate / rms(W) for Adam and its kin, whose first step is the rate times the sign of the gradient.

    A layer is flagged when what it passes on is 1000 times smaller or larger than what came in, and the loss reaches
    the end of the model (where the gradient shrinks, too: 25,000 times both together, each 30 times); when its dL/da is
    1000 times below or above that of the layers it feeds, and the loss reaches the layers that see the data; when half
    of its units are dead or half of its activations are saturated; and when all of its units have the same weights and
    get the same gradient. A branch, a gate or a head that starts at zero is healthy, and so is what a normalisation
    makes up for. A layer that is called several times is one row: rms and mean over all calls, spread and dL/da of the
    call that is furthest from the first one.

    Args:
        model: any module, in the mode it is in. Parameters, gradients, buffers, modes and torch's generators are as
            before afterwards.
        batch: (inputs, targets), or a Batch; a tuple of inputs is several arguments, a dict is keywords.
        loss: of outputs and targets: a scalar, or a value for each example.
        rate: the learning rate for which the steps are given.

    Returns a table, with cause and cure at the first layer of each verdict; its meta holds the model's verdict, the
    first layer to blame, cause and cure, and the indices of dead units by layer.

    Raises ModelError if no weighted layer runs, the loss is not finite though the outputs are, or does not depend on
    the weights, the batch is empty or its samples are all the same, or the model or the loss fails.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(16, dtype=torch.long)
    >>> signal(model, batch, nn.functional.cross_entropy).column("layer")
    ['0', '2']

    Source: Glorot and Bengio 2010; He et al. 2015 (the scales that keep a layer's variance); Goodfellow et al. 2016,
    8.4 (symmetry).
    """
    inputs, targets, weight = _taken_apart(batch)
    if not (isinstance(rate, (int, float)) and 0 <= rate < math.inf):
        raise ModelError(f"rate={rate!r}: expected a finite number, 0 or more")
    check_values(model)
    _check_samples(inputs)
    watch = _Watch(outermost(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    with untouched(model), torch.enable_grad():
        with unfused(), watch.passage.attached(), watch, calling(f"{type(model).__name__}, called with the batch,"):
            outputs = called(model, inputs)
        if not watch.passage.calls:
            raise ModelError("no layer with weights runs on this batch; there is no signal to follow")
        with calling("the loss"):
            values = loss(outputs, targets)
            if not isinstance(values, Tensor):
                raise ModelError(f"the loss returns a {type(values).__name__}, expected a tensor")
            value = weighted_mean(values, weight) if values.ndim else values
        if not bool(value.isfinite()) and all(bool(t.isfinite().all()) for t in tensors_of(outputs)):
            raise ModelError(
                f"the loss is {float(value.detach())} on this batch, though the outputs of the model are finite: mend "
                "the targets or the loss"
            )
        if not value.requires_grad:
            raise ModelError("the loss does not depend on a trainable weight; there is no gradient to follow")
        with calling("the gradient of the loss"):
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        if not all(map(math.isfinite, watch.passage.calls[0].inputs or ())):
            raise ModelError("the inputs of this batch hold numbers that are not finite: mend the data")
        if not depends_on_data(watch.passage.calls):
            raise ModelError("the samples of this batch are all the same, nothing tells them apart: give real inputs")
        gradients = {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}
        return _table(watch, gradients, rate)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """After the block the model's parameters, buffers and modes, and torch's generators, are as they were before it."""
    tensors = [(m._parameters, n, t) for m in model.modules() for n, t in m._parameters.items() if t is not None]
    tensors += [(m._buffers, n, t) for m in model.modules() for n, t in m._buffers.items() if t is not None]
    held = {id(t): t.detach().clone() for _, _, t in tensors}
    modes = [(m, m.training) for m in model.modules()]
    cuda = {t.device.index for _, _, t in tensors if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(cuda)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for place, name, tensor in tensors:
                place[name] = tensor  # a buffer that was replaced
                if not torch.equal(tensor, held[id(tensor)]):
                    tensor.copy_(held[id(tensor)])


def _taken_apart(batch: Any) -> tuple[Any, Any, Tensor | None]:
    """Inputs, targets and the weights of examples."""
    if isinstance(batch, Batch):
        return batch.inputs, batch.targets, batch.weight
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ModelError(f"the batch is a {type(batch).__name__}, expected a pair: (inputs, targets)")
    return batch[0], batch[1], None


def _check_samples(inputs: Any) -> None:
    """Raise ModelError for a batch without numbers."""
    given = list(tensors(inputs))
    if given and not any(t.numel() for t in given):
        raise ModelError(f"the batch is empty, its inputs have the shape {tuple(given[0].shape)}: give some samples")


@dataclass
class _Seen:
    """What a closer look at a layer has found, over all of its calls."""

    saturated: list[float] = field(default_factory=list)
    dead: list[int] | None = None
    units: int = 0
    entropy: list[float] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """A passage, and the functions called after its layers: activations and attention by name."""

    def __init__(self, found: Mapping[str, nn.Module]):
        super().__init__()
        self.layers = found
        self.passage = Passage(found, look=self._look)
        self.seen: dict[str, _Seen] = {}
        self.active: Call | None = None  # the last call, until an activation follows it
        self.quiet = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.quiet or not self.passage.calls or not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        kind = _ACTIVATIONS.get(name)
        if kind and self.active is not None:
            call, self.active = self.active, None
            call.output = scale(result) or call.output
            self.passage.follow(call, result)
            self._activation(self.seen[call.layer], kind, result, call.kind.startswith("Conv"))
        elif name == "scaled_dot_product_attention":
            self._attention(args[:2], *attended(*args, **(kwargs or {})))
        elif name == "softmax" and result.ndim > 2 and "BmmBackward0" in self.passage.makers(args[0])[1]:
            self._attention(args[:1], *entropy(result, allowed(args[0])))
        return result

    def _activation(self, seen: _Seen, kind: str, a: Tensor, channels_first: bool) -> None:
        if kind == "relu":
            if a.numel() < FEW * a.shape[1 if a.ndim > 2 and channels_first else -1]:
                return  # by chance alone many units are zero for all of a few samples
            alive = (a.detach() != 0).movedim(1 if a.ndim > 2 and channels_first else a.ndim - 1, 0).flatten(1).any(1)
            dead = set((~alive).nonzero().flatten().tolist())
            seen.dead = sorted(dead if seen.dead is None else dead & set(seen.dead))
            seen.units = len(alive)
        elif kind in ("tanh", "sigmoid"):
            low = -1.0 if kind == "tanh" else 0.0
            edge = (1 - EDGE) * (1.0 - low) / 2
            seen.saturated.append(float(((a < low + edge) | (a > 1.0 - edge)).double().mean()))

    def _attention(self, scores_of: Sequence[Tensor], equal: float | None, single: float | None) -> None:
        """Note the attention at the layers that made queries and keys: its softmax is their activation."""
        if equal is None or single is None:
            return
        makers = self.passage.makers(*scores_of)[0] or {len(self.passage.calls) - 1}
        for name in {self.passage.calls[order].layer for order in makers}:
            self.seen[name].entropy.append(equal)
            self.seen[name].saturated.append(single)

    def _look(self, call: Call, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.active = call
        seen = self.seen.setdefault(call.layer, _Seen())
        self.quiet = True
        with torch.no_grad():
            if isinstance(layer, nn.MultiheadAttention):
                equal, single = multihead(layer, args, kwargs)
                if equal is not None and single is not None:
                    seen.entropy.append(equal)
                    seen.saturated.append(single)
            elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and args:
                seen.saturated += gates_at_limits(layer, args)
        self.quiet = False


def _table(watch: _Watch, gradients: dict[int, Tensor], rate: float) -> Table:
    calls, layers = watch.passage.calls, watch.layers
    verdicts = judged(calls)
    alike = symmetric(calls, layers, lambda parameter: gradients.get(id(parameter)))
    rows: list[dict[str, Any]] = []
    ranks = []
    for name in dict.fromkeys(call.layer for call in calls):
        seen, mine = watch.seen[name], [call for call in calls if call.layer == name]
        found = {verdicts[call.order] for call in mine} | ({"symmetric"} if name in alike else set())
        bounds = {word for word, over in (("dead", _dead(seen)), ("saturated", _saturated(seen))) if over}
        verdict = overall(found | bounds)
        ranks.append((found, bounds))
        said = sentence(verdict) if verdict not in {row["verdict"] for row in rows} else ""
        rows.append(
            {
                "layer": name,
                "kind": mine[0].kind,
                "calls": len(mine),
                "verdict": verdict,
                "rms": _pooled([(c.output.rms, c.output.numbers) for c in mine]),
                "mean": sum(c.output.mean * c.output.numbers for c in mine) / sum(c.output.numbers for c in mine),
                "spread": _furthest([c.output.spread for c in mine]),
                "dead": len(seen.dead) / seen.units if seen.dead is not None else None,
                "saturated": max(seen.saturated, default=None),
                "entropy": min(seen.entropy, default=None),
                "gradient": _furthest([c.slope for c in mine if c.slope is not None]),
                **_steps(layers[name], gradients, rate),
                "cause and cure": said,
            }
        )
    verdict, first = blamed(ranks)
    cause, cure = WORDS.get(verdict, (None, None))
    meta = {
        "verdict": verdict,
        "first": None if first is None else rows[first]["layer"],
        "cause": cause,
        "cure": cure,
        "rate": rate,
        "dead units": {n: seen.dead for n, seen in watch.seen.items() if seen.dead},
    }
    return Table.of("signal through the layers", _COLUMNS, rows, meta)


def _dead(seen: _Seen) -> bool:
    return seen.dead is not None and seen.units > 0 and len(seen.dead) >= DEAD * seen.units


def _saturated(seen: _Seen) -> bool:
    return max(seen.saturated, default=0.0) >= SATURATED


def _steps(layer: nn.Module, gradients: dict[int, Tensor], rate: float) -> dict[str, float | None]:
    """rms of the weights and of their gradient, and the length of a first step in units of that of the weights."""
    weights = weights_of(layer)
    size = _norm(weights)
    slopes = [gradients[id(p)] for p in weights if id(p) in gradients]
    found: dict[str, float | None] = {"weights": size / math.sqrt(sum(p.numel() for p in weights))}
    found |= dict.fromkeys(("weight gradient", "sgd step", "adam step"))
    if slopes:
        found["weight gradient"] = _norm(slopes) / math.sqrt(sum(g.numel() for g in slopes))
    if slopes and size:
        found["sgd step"] = rate * _norm(slopes) / size
        found["adam step"] = rate * _norm([g / (g.abs() + EPS) for g in slopes]) / size
    return found


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _pooled(parts: Sequence[tuple[float, int]]) -> float:
    return math.sqrt(sum(rms * rms * count for rms, count in parts) / sum(count for _, count in parts))


def _furthest(values: Sequence[float]) -> float | None:
    """Of several calls the value furthest from that of the first one, as a ratio."""
    if not values or not values[0]:
        return max(values, default=None)
    return max(values, key=lambda v: abs(math.log(v / values[0])) if v > 0 else math.inf)


_COLUMNS = [
    Column("layer"),
    Column("kind"),
    Column("calls"),
    Column("verdict"),
    Column("rms", about="root mean square of the activation"),
    Column("mean"),
    Column("spread", about="rms of the activation after the mean over the samples is taken away"),
    Column("dead", "%", "units that are zero for every sample"),
    Column("saturated", "%", "activations at their limits; of attention, queries with 97 % on a single key"),
    Column("entropy", "%", "of the attention, relative to equal attention"),
    Column("gradient", about="rms of dL/da"),
    Column("weights", about="rms of W"),
    Column("weight gradient", about="rms of dL/dW"),
    Column("sgd step", about="rate |dL/dW| / |W|"),
    Column("adam step", about="rate |sign(dL/dW)| / |W|, with eps = 1e-8 in the place of Adam's"),
    Column("cause and cure"),
]

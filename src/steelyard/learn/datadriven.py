"""A start by data: every layer gets standard deviation 1 at the moment that it is executed.

Decides what the standard deviation of a layer is (over all elements of its output and all its calls; of a recurrent
layer over the sums that go into its gates) and how a scale that several calls share is found. The layers are met in
the order of execution, because the work is done in their hooks: what comes in has been corrected already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.learn.added import Added
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import unfused
from steelyard.learn.gates import cell_sums, depths
from steelyard.learn.matrices import ATTENTION, matrices
from steelyard.learn.rescale import is_scaled, scale_cell, scale_gates, scale_projections, spread, unit_means
from steelyard.learn.task import batch_arguments, called
from steelyard.learn.tracing import tensors

TOLERANCE = 0.02  # of a standard deviation around 1
FURTHEST = 300.0  # powers of e that a call may change by: squared it is still a number
DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

COLUMNS = (
    Column("layer"),
    Column("kind"),
    Column("order", "", "of the first call"),
    Column("calls"),
    Column("std", "", "standard deviation of the output over all calls; of a recurrent layer, of the sums into gates"),
    Column("factor", "", "what the starting matrices were multiplied by"),
    Column("gradient", "", "rms of the gradient at the output, for a random gradient of rms 1 at the model's output"),
    Column("done"),
)


@dataclass
class _Use:
    """What is known of one scale: a layer's, or that of a parameter which several layers share."""

    layer: nn.Module
    target: float = 1.0  # the standard deviation that all calls together should have
    factor: float = 1.0  # of the matrices, all passes together
    wanted: float = 1.0  # the standard deviation of the first call, such that all calls together have the target
    next: float = 1.0  # the same for the pass after this one
    means: Tensor | None = None  # of each unit in this pass, before its scale; taken away by the bias
    ratio: Tensor | None = None  # in this pass: what an output is multiplied by
    probe: Tensor | None = None  # 1; the derivative of a later call with respect to it says how calls depend
    calls: list[_Call] = field(default_factory=list)


@dataclass
class _Call:
    name: str
    std: Tensor
    count: int
    output: Tensor
    table: bool


def scale_by_data(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    batch: Any,
    passes: int,
    seed: int,
    said: Mapping[str, str],
    targets: Mapping[str, float] | None = None,
    centred: Container[str] = (),
) -> Table:
    """Rescale the matrices of a model that was just started, so that every layer has standard deviation 1 on `batch`.

    Or another one, of layers that are in `targets`; recurrent layers and the projections inside of attention have 1.
    The units of layers that are `centred` also get such biases that each has mean 0.

    In a pass each layer divides its output, and afterwards its matrices, by the standard deviation s that it has; with
    a bias of 0 that is exact in one pass. A layer with several calls has one scale c for all of them: the exponents
    e = d log s / d log c of its calls come from automatic differentiation, c solves mean(s^2 c^2e) = 1, and the next
    pass is run with it. A parameter that an embedding shares with a linear layer gets the scale of the linear layer.
    A parameter of no layer that is added to the signal, or put beside it (positions, a class token), gets 0.3 of the
    standard deviation of that signal; see `steelyard.learn.added`. Dropout is off, norms use the batch, and everything
    but the weights is as before afterwards.

    Returns a table with a row for each layer; ``meta`` has the passes taken, the largest distance of a standard
    deviation from its target (not counting look-ups of a shared embedding), which layers are off it and why, and the
    ratio of the largest to the smallest scale of gradients. Raises ModelError if the model fails on the batch, or a
    layer's output does not vary at all.
    """
    run = _Run(model, found, targets or {}, centred, seed)
    for turn in range(passes):
        run.once(batch)
        if turn + 1 < passes and not run.settled():
            run.share()
        else:
            break
    return run.table(said, turn + 1, seed)


class _Run:
    """The passes over one model."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, nn.Module],
        targets: Mapping[str, float],
        centred: Container[str],
        seed: int,
    ):
        self.model, self.found, self.targets, self.centred = model, found, targets, centred
        mine = {id(p): name for name, layer in found.items() for p in layer.parameters(recurse=False)}
        self.added = Added(model, mine, seed)
        self.uses: dict[int, _Use] = {}
        self.order: list[str] = []
        self.gradients: dict[str, float] = {}
        self.norms: dict[str, float] = {}  # of the gradient at the output of a layer, which a mean over places spares
        self.cosine: float | None = None

    def once(self, batch: Any) -> None:
        """One forward pass with corrections, and one backward pass that only looks."""
        self.order.clear()
        for use in self.uses.values():
            use.ratio, use.probe, use.means = None, None, None
            use.calls.clear()
        for layer in self.model.modules():
            layer.training = not isinstance(layer, (*DROPPING, nn.RNNBase))
        handles = [
            handle
            for name, layer in self.found.items()
            for handle in (
                layer.register_forward_pre_hook(self._before(name), with_kwargs=True),
                layer.register_forward_hook(self._after(name)),
            )
        ]
        try:
            arguments = batch_arguments(batch)
            told = "the model, on the batch of its start,"
            with unfused(), torch.enable_grad(), self.added.watching(arguments), calling(told):
                output = called(self.model, arguments)
        finally:
            for handle in handles:
                handle.remove()
        if not self.order:
            raise ModelError("no layer with weights runs on this batch; nothing can be started by it")
        self._look_back(output)
        self.cosine = next((mean_cosine(t) for t in floats(output)), None)
        self._solve()
        self._keep()

    def settled(self) -> bool:
        """Whether every scale is where it should be: always after one pass, but where calls share one."""
        return all(abs(_pooled(use) / use.target - 1) <= TOLERANCE / 4 for use in self.uses.values())

    def share(self) -> None:
        """For scales of several calls, what the first call should have in the next pass so that all have the target."""
        for use in self.uses.values():
            use.wanted = use.next

    def _solve(self) -> None:
        for use in self.uses.values():
            calls = _counted(use)
            if len(use.calls) > 1 and use.probe is not None:
                use.next = use.wanted * _solved(use.probe, calls, use.target)
            elif len(use.calls) > 1 and isinstance(use.layer, nn.RNNCellBase):
                use.next = math.sqrt(max(use.wanted**2 + 1 - _rms(calls) ** 2, 0.01))  # the state adds the rest

    def _use(self, layer: nn.Module, name: str) -> _Use:
        first = next(iter(matrices(layer)))
        target = self.targets.get(name, 1.0)
        return self.uses.setdefault(
            id(getattr(layer, first.parameter)), _Use(layer, target, wanted=target, next=target)
        )

    def _before(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            use = self._use(layer, name)
            if use.calls or not is_scaled(layer):
                return
            if isinstance(layer, nn.MultiheadAttention):
                scale_projections(layer, args, kwargs)
            elif isinstance(layer, nn.RNNBase):
                use.factor *= scale_gates(layer, args, name)
            elif isinstance(layer, nn.RNNCellBase):
                use.factor *= scale_cell(layer, args, use.wanted, name)

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor) and not isinstance(layer, nn.RNNBase):
                return None
            if name not in self.order:
                self.order.append(name)
            if isinstance(layer, nn.RNNBase):
                seen = first if isinstance(first, Tensor) else first.data
                self._note(self._use(layer, name), name, torch.cat([d.sums() for d in depths(layer, args)]), seen)
                return None
            if isinstance(layer, nn.RNNCellBase):
                self._note(self._use(layer, name), name, cell_sums(layer, args), first)
                return None
            if isinstance(layer, nn.MultiheadAttention):
                self.order.append(f"{name}.out_proj") if f"{name}.out_proj" not in self.order else None
                scaled = self._scaled(f"{name}.out_proj", layer.out_proj, first)
                self._note(self._use(layer, name), name, scaled, scaled)
                return (scaled, *output[1:]) if isinstance(output, tuple) else scaled
            return self._scaled(name, layer, first)

        return hook

    def _scaled(self, name: str, layer: nn.Module, output: Tensor) -> Tensor:
        """The output of a layer that is linear in its matrices, at its new scale."""
        use = self._use(layer, name)
        if is_scaled(layer) and not use.calls:
            if name in self.centred:
                use.means = unit_means(layer, output)
                output = output - use.means
            use.probe = torch.ones((), dtype=output.dtype, requires_grad=True)
            use.ratio = use.probe * use.wanted / spread(output, name)
        if use.ratio is not None:
            output = output * use.ratio
        self._note(use, name, output, output, table=isinstance(layer, (nn.Embedding, nn.EmbeddingBag)))
        return output

    def _note(self, use: _Use, name: str, values: Tensor, output: Tensor, table: bool = False) -> None:
        if not values.is_floating_point():
            return  # whole and complex numbers
        use.calls.append(_Call(name, values.std(unbiased=False), values.numel(), output, table))

    def _look_back(self, output: Any) -> None:
        """The scale of the gradient at the first call of each layer, for random gradients at the output."""
        ends = [t for t in floats(output) if t.requires_grad and t.numel()]
        firsts: dict[str, Tensor] = {}
        for use in self.uses.values():
            for call in use.calls:
                if call.output.requires_grad:
                    firsts.setdefault(call.name, call.output)
        if not ends or not firsts:
            return
        noise = [torch.randn(t.shape, dtype=t.dtype, device=t.device) for t in ends]
        with calling("the backward pass of the start (turn activation checkpointing off for it)"):
            found = torch.autograd.grad(ends, list(firsts.values()), noise, retain_graph=True, allow_unused=True)
        scales = {name: g for name, g in zip(firsts, found, strict=True) if g is not None}
        self.gradients = {name: _rms_of(g) for name, g in scales.items()}
        self.norms = {name: float(g.norm()) for name, g in scales.items()}

    def _keep(self) -> None:
        """Put the scales of this pass into the matrices."""
        for use in self.uses.values():
            if use.ratio is not None:
                ratio = float(use.ratio.detach())
                use.factor *= ratio
                for matrix in matrices(use.layer):
                    matrix.values.mul_(ratio)
                if use.means is not None:
                    use.layer.bias.detach().mul_(ratio).sub_(use.means.flatten() * ratio)

    def table(self, said: Mapping[str, str], passes: int, seed: int) -> Table:
        """What became of every layer."""
        rows = []
        by_layer = {name: use for use in self.uses.values() for name in {call.name for call in use.calls}}
        for name in [*self.order, *(n for n in self.found if n not in self.order)]:
            layer, use = self.found[name], by_layer.get(name)
            row: dict[str, Any] = {"layer": name, "kind": type(layer).__name__, "calls": 0, "done": said[name]}
            if use is None and name in self.order:
                row |= {"order": self.order.index(name) + 1, "done": f"{row['done']}; its output has no scale to give"}
            elif use is None:
                row["done"] += "; not executed by this batch"
            else:
                calls = [call for call in use.calls if call.name == name]
                row |= {"order": self.order.index(name) + 1, "calls": len(calls), "std": _rms(calls) if calls else None}
                row |= {"factor": use.factor, "gradient": self.gradients.get(name)}
                if len({call.name for call in use.calls}) > 1 and not isinstance(layer, ATTENTION):
                    row["done"] += "; one scale with " + ", ".join(sorted({c.name for c in use.calls} - {name}))
            rows.append(row)
        off = self._off_target(passes, said)
        for row in rows:
            row["done"] += f"; {off[row['layer']]}" if row["layer"] in off else ""
        rows += [part.row() for part in self.added.scaled()]
        away = [_away(use) for use in self.uses.values() if use.calls]
        scales = [row["gradient"] for row in rows if row.get("gradient")]
        norms = [norm * self.targets.get(name, 1.0) for name, norm in self.norms.items()]  # of outputs at scale 1
        meta = {
            "passes": passes,
            "furthest from target": max(away, default=None),
            "gradient scale, largest over smallest": max(scales) / min(scales) if scales and min(scales) else None,
            "gradient norm, largest over smallest": max(norms) / min(norms) if norms and min(norms) else None,
            "mean cosine of outputs": self.cosine,
            "seed": seed,
        }
        meta |= {"off target": off} if off else {}
        meta |= {"faint": faint} if (faint := self.added.faint()) else {}
        return Table.of("start by data", COLUMNS, rows, meta)

    def _off_target(self, passes: int, said: Mapping[str, str]) -> dict[str, str]:
        """The layers that missed their standard deviation, the furthest first, and why."""
        found = {}
        for use in sorted((use for use in self.uses.values() if use.calls), key=_away, reverse=True):
            if not _away(use) <= TOLERANCE:
                shared = f"after {passes} pass{'es' * (passes > 1)}: its calls share one scale, give more passes="
                kept = said[use.calls[0].name].partition(" kept: ")[2].partition(";")[0]
                why = shared if is_scaled(use.layer) else f"because its weights are kept: {kept}"
                found |= {call.name: f"{_away(use):.0%} off its target, {why}" for call in use.calls}
        return found


def _counted(use: _Use) -> list[_Call]:
    """The calls whose standard deviation is to be 1: not look-ups, where the same parameter also multiplies."""
    multiplied = [call for call in use.calls if not call.table]
    return multiplied or use.calls


def _away(use: _Use) -> float:
    """How far the standard deviation of all calls is from its target, relative to that."""
    return abs(_rms(_counted(use)) / use.target - 1)


def _pooled(use: _Use) -> float:
    moved = use.ratio is not None or isinstance(use.layer, nn.RNNCellBase)
    return _rms(_counted(use)) if use.calls and moved else use.target


def _rms(calls: list[_Call]) -> float:
    total = sum(call.count for call in calls)
    return math.sqrt(sum(float(c.std.detach()) ** 2 * c.count for c in calls) / total) if total else 0.0


def _rms_of(gradient: Tensor) -> float:
    return float(gradient.double().square().mean().sqrt())


def _solved(probe: Tensor, calls: list[_Call], target: float) -> float:
    """The c with mean(s^2 c^(2e)) = target^2, by bisection of its logarithm; e is the exponent of each call."""
    known = []
    for call in calls:
        (slope,) = torch.autograd.grad(call.std, probe, retain_graph=True, allow_unused=True)
        std = float(call.std.detach())
        known.append((std, float(slope) / std if slope is not None and std else 0.0, call.count))
    total = target**2 * sum(count for _, _, count in known)

    def too_large(log: float) -> bool:
        return sum(count * (std * math.exp(min(e * log, FURTHEST))) ** 2 for std, e, count in known) > total

    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return math.exp(low)


def mean_cosine(outputs: Tensor) -> float | None:
    """Between different samples (along the first axis); None for a single one, or for outputs of one number.

    >>> mean_cosine(torch.eye(3)), mean_cosine(torch.ones(4, 2))
    (0.0, 1.0)
    """
    flat = outputs.detach().double().flatten(1) if outputs.ndim > 1 else None
    if flat is None or len(flat) < 2 or flat.shape[1] < 2:
        return None
    unit = nn.functional.normalize(flat, dim=1)
    return round(float((unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1))), 6)


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in a value."""
    return [t for t in tensors(value) if t.is_floating_point()]

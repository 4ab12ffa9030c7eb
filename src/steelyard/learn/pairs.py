"""Mirrored pairs: each unit with weights v has a twin with -v, and what follows subtracts the twin.

A layer and the one after it then see V2 (f(V1 x) - f(-V1 x)), which for ReLU, leaky ReLU, GELU, SiLU and softplus is
exactly linear in x, for every other activation odd. Decides which layers can be started so: those whose units arrive
at the next layers in the same two halves. That is tried with numbers, whatever lies between (dropout, pooling, a
flattening), rather than concluded from names.

Source: Balduzzi et al., "The shattered gradients problem", ICML 2017 (the 'looks linear' start of the ReLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.learn.calling import calling
from steelyard.learn.evaluate import unfused
from steelyard.learn.matrices import CONVOLUTIONS, is_started, unit_axis
from steelyard.learn.task import called
from steelyard.learn.tracing import Graph, Operation
from steelyard.learn.unharmed import unmoved

FAR = 3.0  # of the numbers that stand for the two halves: an activation that is not odd tells 3 from -3


@dataclass(frozen=True)
class Halves:
    """Which axes of a matrix are two mirrored halves."""

    outputs: bool = False
    inputs: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the quarter or half from which the matrix is made.

        >>> Halves(outputs=True, inputs=True).shape((8, 6, 3, 3))
        (4, 3, 3, 3)
        """
        return (shape[0] // (1 + self.outputs), shape[1] // (1 + self.inputs), *shape[2:])

    def mirrored(self, part: Tensor) -> Tensor:
        """The whole matrix.

        >>> Halves(outputs=True, inputs=True).mirrored(torch.ones(1, 1))
        tensor([[ 1., -1.],
                [-1.,  1.]])
        """
        if self.inputs:
            part = torch.cat([part, -part], 1)
        return torch.cat([part, -part], 0) if self.outputs else part


def pairs(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    graph: Graph,
    arguments: tuple[Any, ...],
    wanted: Iterable[str],
) -> dict[str, Halves]:
    """Which of the layers `wanted` can be mirrored pairs, and which layers take their halves in.

    A layer can if it is linear or a convolution of one group, called once, with an even number of outputs, and
    everything that its output reaches first is such a layer, which finds the two halves on its inputs. One forward
    pass in evaluation mode; the model is as before. Raises ModelError if the model fails on the arguments.
    """
    calls = graph.calls()
    able = {name for name, mine in calls.items() if len(mine) == 1 and is_plain(found[name])}
    able = {name for name in able if is_started(found[name].weight)}  # frozen ones keep what they have
    senders = {name for name in wanted if name in able and found[name].weight.shape[0] % 2 == 0}
    nexts = {name: reached(calls[name][0], graph.outputs) for name in senders}
    receivers: set[str] = set()
    while senders:
        receivers = _halved(model, found, senders, able, arguments) & set().union(*(nexts[name] for name in senders))
        good = {name for name in senders if nexts[name] <= receivers}
        if good == senders:
            break
        senders = good
    return {name: Halves(name in senders, name in receivers) for name in senders | (receivers if senders else set())}


def is_plain(layer: nn.Module) -> bool:
    """Whether its weight is one matrix of outputs and inputs."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)


def reached(start: Operation, outputs: Sequence[Operation]) -> set[str]:
    """The next layers on every way from a call; '' among them if a way ends without one."""
    found: set[str] = set()
    waiting, seen = [start], set()
    while waiting:
        op = waiting.pop()
        if op is not start and op.layer is not None:
            found.add(op.layer)
        elif op not in seen:
            seen.add(op)
            waiting.extend(op.uses)
            if op in outputs or not op.uses:
                found.add("")
    return found


def _halved(
    model: nn.Module, found: Mapping[str, nn.Module], senders: set[str], able: set[str], arguments: tuple[Any, ...]
) -> set[str]:
    """The layers whose inputs are one number in the first half and another in the second, if outputs of senders are."""
    met: set[str] = set()

    def marked(layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        axis = unit_axis(layer, output)
        size = output.shape[axis]
        sign = torch.ones(size, dtype=output.dtype, device=output.device)
        sign[size // 2 :] = -1
        return (FAR * sign).reshape([size] + [1] * (output.ndim - axis - 1)).expand_as(output).clone()

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            x = args[0] if args else None
            if not isinstance(x, Tensor):
                return
            first, second = x.chunk(2, unit_axis(layer, x)) if x.shape[unit_axis(layer, x)] % 2 == 0 else (x, x)
            low, high = first.flatten()[:1], second.flatten()[:1]
            if len(low) and bool((first == low).all() and (second == high).all() and (low != high).all()):
                met.add(name)

        return hook

    handles = [found[name].register_forward_hook(marked) for name in senders]
    handles += [found[name].register_forward_pre_hook(look(name)) for name in able]
    try:
        with unmoved(model), unfused(), torch.no_grad(), calling("the model, on the batch of its start,"):
            for layer in model.modules():
                layer.training = False
            called(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return met

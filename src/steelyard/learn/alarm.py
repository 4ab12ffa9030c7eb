"""An alarm for the first steps of any training: which layer, and why, while there is still little lost.

Decides what is watched (the passes that training makes anyway, and whether weights move), and for how many steps in a
row something must be wrong before it is said. What is wrong is decided in ``verdicts``. Hooks on the layers and on the
optimizer do the work, so that no loop needs to know of it; they change nothing, and are taken away at the end.

A model that is cut into a graph beforehand (torch.compile) calls no hooks, and is not watched.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from steelyard.errors import ModelError, TrainingWarning
from steelyard.formats._sharded import is_sharded, local
from steelyard.learn.matrices import is_started, outermost, weights_of
from steelyard.learn.passage import Call, Passage, check_values, length
from steelyard.learn.symmetry import same_weights, symmetric
from steelyard.learn.verdicts import HEALTHY, blamed, fades, judged, sentence

SAMPLE = 2**16  # numbers that are read of a tensor
MOST = 4096  # calls that are recorded for a step
IN_A_ROW = {
    **dict.fromkeys(("inputs not finite", "not finite", "frozen"), 1),
    **dict.fromkeys(("exploding signal", "exploding gradient", "symmetric"), 2),
}
USUALLY = 3  # steps in a row, for everything else
EVERY = 5  # steps: how often weights are looked at for whether they moved
AS_LARGE = 1e-2  # of the gradient of what moves: a layer with so much should move, too
STILL = 2  # such looks in a row at which frozen weights have not moved


@dataclass(frozen=True)
class Found:
    """What an alarm has found."""

    step: int  # of the optimizer, from 1
    layer: str
    verdict: str  # vanishing signal, exploding gradient, dead, symmetric, frozen, not finite, ...

    def __str__(self) -> str:
        return f"step {self.step}: {self.verdict}, first at the layer {self.layer!r}: {sentence(self.verdict)}"


class Alarm:
    """Watches the first steps that an optimizer makes with a model, and says which layer is in trouble and why.

    ::

        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        alarm = sy.Alarm(net, optimizer)        # warns; alarm.found has what was found
        for x, y in batches:                    # any loop
            ...

    In the forward and backward passes of training it sees a signal or a gradient that vanishes or explodes on the way
    through the layers, layers whose units are all dead or all the same, numbers that are not finite, and trainable
    weights that do not move while others do. Each is said once, when it has lasted: numbers that are not finite at
    once, explosions and symmetry for 2 steps, frozen weights for 10, the others for 3. Where signal and gradient both
    vanish at the first step, which shows the start alone, that is said at once: long steps soon bring the scales back,
    but not what was lost. After `steps` steps all hooks are gone; nothing of the training is changed, to the last bit.
    Of several processes each watches its own examples, and of weights that are sharded among them (FSDP2) its own
    part, without a word to the others; there symmetry is not looked for.

    Args:
        model: the module that is trained.
        optimizer: any torch optimizer of its parameters.
        steps: how many steps to watch.
        say: called with each `Found`; by default it becomes a TrainingWarning.

    Raises ModelError for a model without layers with weights, or whose weights have no values yet, for what is no torch
    optimizer or one that holds none of the model's parameters, and for less than one step.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> for layer in (net[0], net[2]):
    ...     _ = nn.init.constant_(layer.weight, 0.1), nn.init.zeros_(layer.bias)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    >>> with Alarm(net, optimizer, say=lambda found: None) as alarm:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(net(x), y).backward()
    ...         optimizer.step()
    >>> [(found.step, found.layer, found.verdict) for found in alarm.found]
    [(2, '0', 'symmetric')]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int = 20,
        say: Callable[[Found], None] | None = None,
    ):
        self.layers = outermost(model)
        if not self.layers:
            raise ModelError(f"{type(model).__name__} has no layer with weights; there is nothing to watch")
        check_values(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ModelError(f"the optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in model.parameters()):
            raise ModelError(
                f"the optimizer holds no parameter of this {type(model).__name__}, none of its steps moves it: make it "
                "from model.parameters(), after the model was moved or copied"
            )
        if steps < 1:
            raise ModelError(f"steps={steps}: expected at least one step to watch")
        self.optimizer, self.steps, self.say = optimizer, steps, say or _warn
        self.found: list[Found] = []
        self.step = 0
        self._row = (HEALTHY, 0)  # a verdict, and for how many steps in a row
        self._passage = Passage(self.layers, SAMPLE, recording=self._recording)
        self._moves = _Moves(self.layers)
        whole = not any(map(is_sharded, model.parameters()))
        self._suspect = whole and any(map(same_weights, self.layers.values()))  # what is not so never becomes so
        self._handles = [
            *self._passage.attach(),
            model.register_forward_hook(lambda *_: self._passage.release(), always_call=True),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> Alarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks away; what was found stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passage.clear()

    def _recording(self) -> bool:
        """Whether this is a forward pass of training: not evaluation, and not the second pass of a checkpoint."""
        calls = self._passage.calls
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or len(calls) >= MOST:
            return False
        if any(call.gradient is not None for call in calls):  # a pass without a step: accumulation, or one left out
            self._passage.clear()
        return True

    def _after_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.step += 1
        calls = self._passage.calls
        if any(call.gradient is not None for call in calls):
            self._judge()
        self._passage.clear()
        if self.step >= self.steps:
            self.close()

    def _judge(self) -> None:
        calls = self._passage.calls
        found: dict[str, set[str]] = {call.layer: set() for call in calls}
        for call, verdict in zip(calls, judged(calls), strict=True):
            found[call.layer].add(verdict)
        if self._suspect:
            for name in symmetric(calls, self.layers, _slope):
                found[name].add("symmetric")
        if self.step % EVERY == 0:
            for name in self._moves.frozen(calls, self.optimizer):
                found[name].add("frozen")
        verdict, first = blamed([(words, set()) for words in found.values()])
        before, times = self._row
        self._row = (verdict, times + 1 if verdict == before else 1)
        at_once = self.step == 1 and verdict == "vanishing signal" and fades(calls)  # later, long steps have hidden it
        due = at_once or self._row[1] >= IN_A_ROW.get(verdict, USUALLY)
        known = {f.verdict for f in self.found}
        if "inputs not finite" in known:  # and so are the weights ever since
            known.add("not finite")
        if first is not None and due and verdict not in known:
            self.found.append(Found(self.step, list(found)[first], verdict))
            self.say(self.found[-1])


class _Moves:
    """Which weights stay where they are although they are trained and others move."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.weights = {name: _trained(layer) for name, layer in layers.items()}
        self.prints = {name: [_print(p) for p in found] for name, found in self.weights.items()}
        self.still: Counter[str] = Counter()

    def frozen(self, calls: list[Call], optimizer: torch.optim.Optimizer) -> list[str]:
        """The layers that have stayed for STILL looks in a row, while others moved.

        Either no gradient reaches them nor any layer before them, or they get one and are not given to the optimizer,
        or they get one that moves others and are held in 16 bits, in which the steps round to nothing.
        """
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        called = dict.fromkeys(call.layer for call in calls if call.followed and self.weights[call.layer])
        prints = {name: [_print(p) for p in self.weights[name]] for name in called}
        slopes = {name: max((_size(p.grad) for p in self.weights[name]), default=0.0) for name in called}
        moving = max((slopes[name] for name in called if prints[name] != self.prints[name]), default=0.0)
        cut_off = True  # whether no layer so far has got a gradient
        for name in called:
            mine = self.weights[name]
            cut_off = cut_off and all(p.grad is None for p in mine)
            left_out = slopes[name] > 0 and not any(id(p) in rates for p in mine)
            rounded = slopes[name] >= AS_LARGE * moving and all(p.dtype.itemsize <= 2 for p in mine)
            meant = cut_off or left_out or (rounded and any(rates.get(id(p)) for p in mine))
            stays = prints[name] == self.prints[name] and moving > 0
            self.still[name] = self.still[name] + 1 if stays and meant else 0
        self.prints |= prints
        return [name for name in called if self.still[name] >= STILL]


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    """The weights of a layer that may move; none where they are computed from others."""
    if is_parametrized(layer):
        return []
    own = list(layer.parameters(recurse=False))
    found = [p for p in own if p.ndim > 1] if any(map(is_sharded, own)) else weights_of(layer)
    return [p for p in found if is_started(p) and p.is_leaf]


def _print(parameter: Tensor) -> list[float]:
    """Two sums that are the same only if all elements are, for all that training does to them."""
    x = local(parameter.detach())
    x = x.abs() if x.is_complex() else x
    return torch.stack([x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)]).tolist()


def _size(gradient: Tensor | None) -> float:
    """The rms of a gradient."""
    if gradient is None:
        return 0.0
    gradient = local(gradient)
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return length(values) / math.sqrt(max(gradient.numel(), 1))


def _slope(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad if parameter.is_leaf else None
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _warn(found: Found) -> None:
    warnings.warn(str(found), TrainingWarning, stacklevel=2)

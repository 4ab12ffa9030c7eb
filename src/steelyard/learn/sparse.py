"""Training that prunes as it goes: more and more zeros by a schedule, chosen by magnitude or by where weights move.

Decides when masks are renewed and what ranks weights then. State is in the model: masks and a count of updates are
buffers that no state_dict has, scores are parameters; so a Run's checkpoint has them all and goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.edit.prune import Prune, Scope
from steelyard.errors import ModelError, RecipeError
from steelyard.formats.module import to_array, to_tensor
from steelyard.learn.constrain import Masked, constrained, release
from steelyard.learn.options import check_choice, check_not_negative, check_positive, check_whole
from steelyard.learn.parameters import Named, as_where, named_parameters
from steelyard.learn.penalties import Penalty, Term
from steelyard.learn.run import Run, train
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.task import Task, build_seeded

Method = Literal["magnitude", "movement", "soft-movement"]
SHARP = 30.0  # of the scores of soft movement in their sigmoid: an optimizer's small steps are to reach the threshold


class Gated(Masked):
    """A mask that is renewed now and then, and the number of updates so far."""

    def __init__(self, mask: Tensor, count: Tensor):
        super().__init__(mask)
        self.register_buffer("count", count, persistent=False)

    def ranks(self, original: Tensor) -> Tensor:
        """What is least goes first; what has gone stays gone."""
        return original.detach().abs() * self.mask


class Moving(Gated):
    """Weights with a score each, which grows where a step of gradient descent moves the weight away from zero.

    The score's gradient is that of the mask as if it were a number: dL/d(w m) w (straight through; Sanh et al. 2020).
    """

    def __init__(self, mask: Tensor, count: Tensor, score: nn.Parameter):
        super().__init__(mask, count)
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Through.apply(x, self.score, self.mask)
        return found

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    def ranks(self, original: Tensor) -> Tensor:
        """Those that moved towards zero go first."""
        return self.score.detach().view(original.shape)


class Soft(Moving):
    """The same with a threshold in place of a share: the mask is sigmoid(sharp score) > threshold."""

    def __init__(self, mask: Tensor, count: Tensor, score: nn.Parameter, threshold: float):
        super().__init__(mask, count, score)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mask.copy_(torch.sigmoid(SHARP * self.score) > self.threshold)
        return super().forward(x)


class _Through(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, _score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, mask = ctx.saved_tensors
        return grad * mask, grad * x, None


class Gradual:
    """Prune a model while it is trained: pass it to a Run as ``after_step``, and release the model afterwards.

    ::

        gradual = Gradual(model, 0.9, steps=1000)
        with Run(task, model, after_step=gradual, keep="last") as run: ...
        gradual.release()

    The share of zeros rises from 0 at `begin` to `fraction` at `end`, both shares of `steps`, as
    1 - (1 - progress)^3 (Zhu & Gupta 2017); masks are renewed after each `every` updates (None: fifty times in all).
    By the method 'magnitude' the least weights go, and stay gone; by 'movement' those whose score is the least: scores
    are trained with the weights, and what has gone can come back. `scope` is that of `Prune`; `where`: which weights
    (None: all matrices and filters). 'soft-movement' has no schedule: what has sigmoid(score) below `threshold` is
    zero, and the penalty `Scores(strength)`, passed to the Run, decides how many there are.

    Make it before the optimizer and the Run. A checkpoint of the Run has all of its state. ``keep="last"``, because
    the best epoch would be one with few zeros. Raises RecipeError for numbers out of range, ModelError if there is
    nothing to prune.

    Sources: Zhu & Gupta, "To prune, or not to prune", 2017; Sanh et al., "Movement Pruning", 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float,
        *,
        steps: int,
        method: Method = "magnitude",
        begin: float = 0.0,
        end: float = 0.7,
        every: int | None = None,
        scope: Scope = "global",
        where: Where | str | None = None,
        threshold: float = 0.1,
    ):
        check_choice("method", method, get_args(Method))
        check_whole(steps=steps, every=every)
        Prune(fraction, scope)
        if not 0 <= begin < end <= 1:
            raise RecipeError(f"expected 0 <= begin < end <= 1, shares of the training, not {begin} and {end}")
        if not 0 < threshold < 0.5:
            raise RecipeError(f"the threshold is above 0 and below 0.5, where scores begin, not {threshold}")
        self.model, self.fraction, self.steps, self.scope, self.method = model, fraction, steps, scope, method
        self.begin, self.end = begin, end
        self.every = max(1, round(steps * (end - begin) / 50)) if every is None else every
        chosen = _matrices(model, where)
        constrained(model, {named.name: _maker(named.parameter, method, threshold) for named in chosen})
        self.names = [named.name for named in chosen]

    def __call__(self, _model: nn.Module) -> None:
        """After an update: count it, and renew the masks if it is time to."""
        gates = dict(self._gates())
        count = int(next(iter(gates.values()))[1].count) + 1
        for _, gate in gates.values():
            gate.count.fill_(count)
        start, stop = self.begin * self.steps, self.end * self.steps
        if self.method == "soft-movement" or count < start:
            return
        last = count >= stop > count - 1
        if last or (self.method == "movement" and count > stop) or (count < stop and count % self.every == 0):
            self._renew(gates, self.share((count - start) / (stop - start)))

    def share(self, progress: float) -> float:
        """The share of zeros after so much of the schedule, 0 to 1."""
        return self.fraction * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    @property
    def zeros(self) -> float:
        """The share of zeros in the masks now."""
        masks = [gate.mask for _, (_, gate) in self._gates()]
        left = sum(int(mask.sum()) for mask in masks)
        return 1.0 - left / int(sum(mask.numel() for mask in masks))

    def release(self) -> nn.Module:
        """Turn what is constrained into plain parameters with these zeros, and return the model."""
        return release(self.model)

    def _renew(self, gates: dict[str, tuple[Tensor, Gated]], share: float) -> None:
        ranks = {name: to_array(gate.ranks(original)) for name, (original, gate) in gates.items()}
        ones = Weights.of({name: np.ones_like(rank) for name, rank in ranks.items()})
        for name, item in Prune(share, self.scope, Weights.of(ranks))(ones).items():
            for gate in self._every_gate(name):
                gate.mask.copy_(to_tensor(item.array()) != 0)

    def _gates(self) -> Iterator[tuple[str, tuple[Tensor, Gated]]]:
        """The first place of each constrained parameter."""
        for name in self.names:
            for gate in self._every_gate(name):
                prefix, _, leaf = name.rpartition(".")
                yield name, (self.model.get_submodule(prefix).parametrizations[leaf].original, gate)
                break

    def _every_gate(self, name: str) -> list[Gated]:
        prefix, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(prefix)
        if "parametrizations" not in module._modules or leaf not in module.parametrizations:
            raise ModelError(f"{name} is no longer constrained: make a new Gradual to prune on")
        original = module.parametrizations[leaf].original
        found = []
        for other in self.model.modules():
            lists = other.parametrizations.values() if "parametrizations" in other._modules else ()
            found += [steps[0] for steps in lists if steps.original is original and isinstance(steps[0], Gated)]
        return found


class Scores(Penalty):
    """strength * mean of sigmoid(score) over all scores of soft movement pruning: the more, the more zeros."""

    def __init__(self, strength: float):
        check_not_negative(strength=strength)
        self.strength = strength

    def bind(self, model: nn.Module) -> Term:
        found = {id(m.score): m.score for m in model.modules() if isinstance(m, Soft)}
        if not found:
            raise ModelError("Scores: the model has no scores of soft movement pruning: make a Gradual first")
        scores = list(found.values())
        count = sum(s.numel() for s in scores)

        def value() -> Tensor:
            return torch.stack([torch.sigmoid(SHARP * s).sum() for s in scores]).sum() * (self.strength / count)

        return Term(f"scores({self.strength:g})", scores, value, smooth=value)


def train_sparse(
    task: Task,
    model: nn.Module | None,
    fraction: float,
    *,
    method: Method = "magnitude",
    strength: float = 5.0,
    scope: Scope = "global",
    where: Where | str | None = None,
    **options: Unpack[RunOptions],
) -> Run:
    """Train a model so that it ends with this share of zeros: `Gradual` in a Run, whose keywords the others are.

    model: None is a new one of the task. strength: of soft movement, which takes it in place of `fraction`. The
    model of the Run that is returned has plain parameters, zeros among them.

    >>> from steelyard.learn.tasks import task
    >>> run = train_sparse(task("breast-cancer", model="mlp"), None, 0.9, epochs=10, progress=False)
    >>> weight = run.model.fc2.weight
    >>> bool((weight == 0).float().mean() > 0.5)
    True
    """
    model = build_seeded(task, options.get("seed", 0)) if model is None else model
    batches = sum(1 for _ in task.batches("train", 0))
    steps = options.get("epochs", 20) * math.ceil(batches / options.get("accumulate", 1))
    check_positive(strength=strength)
    if options.get("after_step") is not None:
        raise RecipeError("after_step is what prunes: call Gradual in a function of your own, in a Run")
    gradual = Gradual(model, fraction, steps=steps, method=method, scope=scope, where=where)
    penalties = [*options.get("penalties", ()), *([Scores(strength)] if method == "soft-movement" else [])]
    settings: RunOptions = {**options, "keep": "last", "penalties": penalties, "after_step": gradual}
    try:
        return train(task, model, **settings)
    finally:
        gradual.release()


def _matrices(model: nn.Module, where: Where | str | None) -> list[Named]:
    condition = as_where(where)
    every = [n for n in named_parameters(model) if n.parameter.ndim >= 2 and n.parameter.is_floating_point()]
    found = [named for named in every if condition is None or named.fits(condition)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no matrix or filter to prune among those that were chosen")
    return found


def _maker(parameter: nn.Parameter, method: str, threshold: float) -> Any:
    """A function that makes the step of each place of one parameter; scores, masks and counts are one for all."""
    mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    count = torch.zeros((), dtype=torch.int64)
    score = nn.Parameter(torch.zeros_like(parameter))
    if method == "magnitude":
        return lambda: Gated(mask, count)
    if method == "movement":
        return lambda: Moving(mask, count, score)
    return lambda: Soft(mask, count, score, threshold)

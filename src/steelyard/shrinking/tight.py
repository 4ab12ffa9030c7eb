"""Train a net to be small: whole numbers of learned steps under a rising price of bits, its original as the teacher.

Decides the ladder of prices, when a rung went too far (by the validation split alone), which numbers are moved by rate
and distortion at the end, and what is trained after that. Knows nothing of files: every stage hands out Weights, and
whoever writes them measures their size.

Sources: Oktay et al., "Scalable model compression by entropy penalized reparameterization", ICLR 2020; the quadratic
estimate of what a change costs is LeCun, Denker, Solla, "Optimal brain damage", 1989; the choice by distortion +
price * rate is Wiedemann et al., "DeepCABAC", 2019.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steelyard.codecs.multiples import Multiples, costs
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.edit.pack import Pack
from steelyard.errors import ModelError
from steelyard.formats.module import from_module
from steelyard.learn.constrain import release
from steelyard.learn.evaluate import evaluating
from steelyard.learn.levels import EntropyRate, levelled, levels_of
from steelyard.learn.run import train
from steelyard.learn.task import Task, apply, objective
from steelyard.shrinking.deep import Stage, distilled, halved, headline, lost


@dataclass(frozen=True)
class Tight:
    """How hard to press, and how long. Raises ModelError for what must be more than 0 and is not."""

    tolerance: float = 0.005  # how much worse the headline metric may be on validation data, in its own unit
    prices: tuple[float, ...] = (1e-6, 2e-6, 4e-6, 8e-6, 16e-6)  # of a bit, in the loss; as far up as is borne
    epochs: int = 40  # at the first price, which rises from 0 during the first two fifths
    more_epochs: int = 20  # at each higher price
    tune_epochs: int = 4  # of the steps alone, the numbers fixed
    rate: float = 3e-3
    step: float = 1.0  # at the beginning, in root mean squares of each tensor
    where: Where | str | None = None  # what is rounded; None: as `levelled` chooses

    def __post_init__(self) -> None:
        for name in ("epochs", "rate", "step"):
            if not getattr(self, name) > 0:
                raise ModelError(f"expected {name} to be more than 0, got {getattr(self, name):g}")
        for name in ("tolerance", "more_epochs", "tune_epochs"):
            if not getattr(self, name) >= 0:
                raise ModelError(f"expected {name} to be 0 or more, got {getattr(self, name):g}")
        rising = list(self.prices) == sorted(self.prices)
        if not self.prices or not rising or not all(0 < p < math.inf for p in self.prices):
            raise ModelError(f"expected prices that are more than 0 and rise, got {self.prices}")


def tighten(model: nn.Module, task: Task, settings: Tight | None = None, seed: int = 0) -> Iterator[Stage]:
    """Yield a stage for each price, then 'weighed' and 'coded'; `model` is left as it was, and is the teacher.

    The headline metric on the validation split is compared with the original's. Prices rise until more than
    ``settings.tolerance`` is lost there; the last that lost no more is gone on with (the first in any case; the notes
    say what each lost). 'weighed' moves numbers towards zero where price * bits saved is more than the loss expected
    of it; 'coded' has trained the steps once more, if that helps there. All are held by `Multiples`. The test split is
    never looked at.
    Raises ModelError if there is nothing to round.

    ::

        *_, last = sy.tighten(model, task)
        sy.write(last.weights, "small.safetensors")
    """
    settings = settings or Tight()
    original, lesson = headline(model, task), distilled(task, model)
    student = levelled(copy.deepcopy(model), settings.where, settings.step)

    def loss() -> float:
        return lost(task, original, headline(student, task))

    price, state = settings.prices[0], student.state_dict()
    for rung, higher in enumerate(settings.prices[: None if settings.more_epochs else 1]):
        epochs, ramp = (settings.more_epochs, 0.0) if rung else (settings.epochs, 0.4)
        _train(student, lesson, epochs, settings.rate, EntropyRate(higher, ramp), seed + rung)
        yield _stage(f"price {higher:g}", student, task, f"{loss():.4f} of {task.headline} lost")
        borne = loss() <= settings.tolerance
        if borne or not rung:
            price, state = higher, copy.deepcopy(student.state_dict())
        if not borne:
            break
    student.load_state_dict(state)
    before, best = loss(), copy.deepcopy(student.state_dict())
    moved = weigh(student, lesson, price)
    if loss() > max(before, settings.tolerance):
        student.load_state_dict(best)
        moved = 0
    yield _stage("weighed", student, task, f"of price {price:g}, {moved:,} numbers moved, {loss():.4f} lost")
    before, best = loss(), copy.deepcopy(student)
    _tune(student, lesson, settings, seed)
    if loss() > before:
        student = best
    steps = "as they were" if student is best else "trained"
    yield _stage("coded", student, task, f"steps {steps}, {loss():.4f} lost")


def _train(student: nn.Module, lesson: Task, epochs: int, rate: float, penalty: EntropyRate | None, seed: int) -> None:
    penalties = [] if penalty is None else [penalty]
    train(lesson, student, epochs=epochs, rate=rate, weight_decay=0.0, keep="last", penalties=penalties, seed=seed,
          progress=False)  # fmt: skip


def weigh(student: nn.Module, lesson: Task, price: float, passes: int = 4) -> int:
    """Move numbers one towards zero where price * (bits saved) exceeds the loss that is expected of it; how many.

    Bits are what the adaptive coder pays at that place; the loss is gradient * change + curvature / 2 * change^2, the
    curvature estimated by squared gradients (the diagonal of the empirical Fisher matrix). Neither estimate holds for
    many changes at once: each pass makes the best eighth of its moves, and the next one measures anew.
    """
    total = 0
    for _ in range(passes):
        measured = _curvature(student, lesson)
        for name, (levels, latent) in levels_of(student).items():
            gradient, curvature = measured[name]
            step = float(levels.log_step.detach().exp())
            whole = levels.numbers(latent)
            bits = costs(whole.cpu().numpy())
            change = -torch.sign(whole) * step
            harm = gradient * change + curvature * change.square() / 2
            gain = price * torch.from_numpy(bits[0] - bits[1]).to(harm) - harm
            gain[whole == 0] = 0
            better = gain[gain > 0]
            bar = float(better.kthvalue(math.ceil(len(better) * 0.875)).values) if len(better) else math.inf
            chosen = gain >= bar
            with torch.no_grad():
                latent.copy_(torch.where(chosen, whole * step + change, latent))
            total += int(chosen.sum())
    return total


def _curvature(student: nn.Module, lesson: Task) -> Mapping[str, tuple[Tensor, Tensor]]:
    """For each rounded tensor the mean gradient of the loss, and its mean square for single examples, estimated."""
    found = levels_of(student)
    sums = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, (_, x) in found.items()}
    examples = 0
    with evaluating(student), torch.enable_grad():
        for batch in lesson.batches("train", 0):
            loss = objective(lesson, apply(student, batch), batch)
            for name, g in zip(found, torch.autograd.grad(loss, [x for _, x in found.values()]), strict=True):
                sums[name][0].add_(g, alpha=len(batch))
                sums[name][1].add_(g.square(), alpha=float(len(batch)) ** 2)
            examples += len(batch)
    return {name: (first / examples, second / examples) for name, (first, second) in sums.items()}


def _tune(student: nn.Module, lesson: Task, settings: Tight, seed: int) -> None:
    """Fix the numbers, train the steps, and round each to the eight bits of a bfloat16: two bytes of a stream."""
    for levels, latent in levels_of(student).values():
        levels.fix(latent)
    fixed = {id(p): p.requires_grad for p in student.parameters()}
    for name, p in student.named_parameters():
        p.requires_grad_(name.endswith(".log_step"))
    if settings.tune_epochs:
        _train(student, lesson, settings.tune_epochs, settings.rate / 3, None, seed + 1000)
    for p in student.parameters():
        p.requires_grad_(fixed[id(p)])
    for levels, _ in levels_of(student).values():
        levels.snap()


def _stage(name: str, student: nn.Module, task: Task, note: str) -> Stage:
    shown = copy.deepcopy(student)
    rounded = levels_of(shown)
    for levels, latent in rounded.values():
        levels.fix(latent)
        levels.snap()
    names = list(rounded)
    release(shown)
    numbers = f"{sum(int((x != 0).sum()) for x in shown.parameters()):,} weights are not zero"
    weights = _coded(from_module(shown).settle(), names)
    return Stage(name, weights, f"{note}; {numbers}", headline(shown, task))


def _coded(weights: Weights, names: Collection[str]) -> Weights:
    """The rounded tensors as multiples, the others in half precision where that changes next to nothing."""
    rounded = Pack(Multiples())(weights.select(lambda weight: weight.name in names))
    found = [rounded[w.name] if w.name in names else w for w in weights.values()]
    return weights.with_items(w if w.name in names or w.spec.dtype.name != "float32" else halved(w) for w in found)

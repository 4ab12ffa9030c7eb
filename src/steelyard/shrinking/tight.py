"""Train a net to be small: whole numbers of learned steps under a rising price of bits, and a teacher.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.codecs.multiples import Multiples, costs
from steelyard.core.weights import Weights
from steelyard.core.where import Where
from steelyard.edit.pack import Pack
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.constrain import release
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.levels import EntropyRate, levelled, levels_of
from steelyard.learn.run import Run, train
from steelyard.learn.task import Batch, Split, Task, apply, objective
from steelyard.shrinking.deep import Stage, distilled, halved, lost
from steelyard.shrinking.journal import Journal, fingerprint
from steelyard.shrinking.settings import TOLERANCE

PASSES = 4  # of weighing, each of which measures anew
Borne = Callable[[np.ndarray], bool]  # by how much worse each example came out


@dataclass(frozen=True)
class Tight:
    """How hard to press, and how long. Raises ModelError for what must be more than 0 and is not."""

    tolerance: float = TOLERANCE  # how much worse the headline metric may be on validation data, in its own unit
    prices: tuple[float, ...] = (1e-6, 2e-6, 4e-6, 8e-6, 16e-6)  # of a bit, in the loss; as far up as is borne
    epochs: int = 40  # at the first price, which rises from 0 during the first two fifths
    more_epochs: int = 20  # at each further price
    tune_epochs: int = 4  # of the steps alone, the numbers fixed
    rate: float = 3e-3
    step: float = 1.0  # at the beginning, in root mean squares of each tensor
    where: Where | str | None = None  # what is rounded; None: as `levelled` chooses
    brief: bool = False  # the prices alone: no 'weighed', no 'coded'
    rungs: int = 0  # prices tried in all: those that the climb leaves lie between the last borne and the first too high

    def __post_init__(self) -> None:
        for name in ("epochs", "rate", "step"):
            if not getattr(self, name) > 0:
                raise ModelError(f"expected {name} to be more than 0, got {getattr(self, name):g}")
        for name in ("tolerance", "more_epochs", "tune_epochs", "rungs"):
            if not getattr(self, name) >= 0:
                raise ModelError(f"expected {name} to be 0 or more, got {getattr(self, name):g}")
        rising = list(self.prices) == sorted(self.prices)
        if not self.prices or not rising or not all(0 < p < math.inf for p in self.prices):
            raise ModelError(f"expected prices that are more than 0 and rise, got {self.prices}")

    def price_after(self, tried: Mapping[float, bool]) -> float | None:
        """The price after those that were tried (True: it was borne); None: there is no other."""
        if not tried:
            return self.prices[0]
        if not self.more_epochs:
            return None
        if all(tried.values()):
            return self.prices[len(tried)] if len(tried) < len(self.prices) else None
        if len(tried) >= self.rungs:
            return None
        high = min(price for price, borne in tried.items() if not borne)
        low = max((price for price, borne in tried.items() if borne and price < high), default=high / 16)
        return math.sqrt(low * high)


def tighten(
    model: nn.Module,
    task: Task,
    settings: Tight | None = None,
    seed: int = 0,
    *,
    teacher: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    borne: Borne | None = None,
    progress: Callable[[Run], None] | None = None,
    before: np.ndarray | None = None,
) -> Iterator[Stage]:
    """Yield a stage for each price, then 'weighed' and 'coded'; `model` is left as it was.

    What a file would hold is compared with the original by the headline metric on the validation split. Prices rise
    until more than ``settings.tolerance`` is lost there; the last that lost no more is gone on with (the first in any
    case; the notes say what each lost). 'weighed' moves numbers towards zero where price * bits saved is more than the
    loss expected of it; 'coded' has trained the steps once more, if that helps there. All are held by `Multiples`. The
    test split is never looked at.

    teacher: whose outputs are the targets in training (`distilled`); None: `model` itself. A better one, such as the
    mean of several nets, leaves fewer errors at the same bytes. It has to take the same inputs, and is used on the
    device that it is on.
    checkpoint: a folder that keeps each answer, and the state of the training after each epoch; the same call goes on
    from there, to the same bits. borne: decides instead of the tolerance, by how much worse each validation example
    came out. progress: called with the run after each step of training. before: what the original has on each of them,
    where that is known.
    Raises ModelError if there is nothing to round, or if the folder is that of another model, task or settings.

    ::

        *_, last = sy.tighten(model, task)
        sy.write(last.weights, "small.safetensors")
    """
    settings = settings or Tight()
    identity = {"model": fingerprint(from_module(model)), "task": task.name, "data": str(task.about)}
    identity["teacher"] = "itself" if teacher is None else fingerprint(from_module(teacher))
    journal = Journal(checkpoint, {**identity, "settings": str(settings), "seed": seed})
    made = _Made(model, teacher or model, task, settings, seed, journal, progress, before)

    def bearable(stage: Stage) -> bool:
        return made.lost(stage).mean() <= settings.tolerance if borne is None else borne(made.lost(stage))

    tried: dict[float, bool] = {}
    state, price = made.state(), settings.prices[0]
    while (asked := settings.price_after(tried)) is not None:
        reached = made.trained(state, asked, len(tried))
        stage = made.stage(f"price {asked:g}", reached)
        yield stage
        tried[asked] = bearable(stage)
        if tried[asked] or len(tried) == 1:
            state, price, last = reached, asked, stage
    if settings.brief:
        return
    moved = made.weighed(state, price)
    stage = made.stage("weighed", moved, f"of price {price:g}, {made.apart(state, moved):,} numbers moved, ")
    if not bearable(stage) and made.lost(stage).mean() > made.lost(last).mean():
        moved, stage = state, replace(last, name="weighed", note=f"of price {price:g}, no number moved")
    yield stage
    tuned = made.measured("coded", made.tuned(moved), "steps trained, ")
    if made.lost(tuned).mean() > made.lost(stage).mean():
        tuned = replace(stage, name="coded", note="steps as they were")
    yield tuned


class _Made:
    """A student, and what is made of it: each thing once, because the journal keeps it."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        task: Task,
        settings: Tight,
        seed: int,
        journal: Journal,
        progress: Callable[[Run], None] | None,
        before: np.ndarray | None,
    ):
        self.task, self.settings, self.seed, self.journal = task, settings, seed, journal
        self.progress = progress or False
        self.lesson = distilled(task, teacher)
        self.unasked = _without_validation(self.lesson)
        self.plain = copy.deepcopy(model)
        self.student = levelled(copy.deepcopy(model), settings.where, settings.step)
        self.before = self._outcomes("original", model) if before is None else before

    def state(self) -> Weights:
        """The student as it is: what is trained, not what is rounded."""
        return from_module(self.student).settle()

    def trained(self, state: Weights, price: float, rung: int) -> Weights:
        """The state after training at a price, from the state before."""
        epochs, ramp = (self.settings.more_epochs, 0.0) if rung else (self.settings.epochs, 0.4)
        question = f"trained at {price:g}"

        def made() -> Weights:
            into_module(state, self.student)
            place = self.journal.under_way(question)
            self._train(epochs, self.settings.rate, EntropyRate(price, ramp), self.seed + rung, place)
            return self.state()

        return self.journal.weights(question, made)

    def weighed(self, state: Weights, price: float) -> Weights:
        """The state after `weigh`."""

        def made() -> Weights:
            found, passes = state, Journal(self.journal.under_way("weighed"), {})
            for i in range(PASSES):
                found = passes.weights(f"pass {i}", lambda found=found: once(found))  # type: ignore[misc]
            return found

        def once(before: Weights) -> Weights:
            into_module(before, self.student)
            weigh(self.student, self.lesson, price, 1)
            return self.state()

        return self.journal.weights("weighed", made)

    def tuned(self, state: Weights) -> Weights:
        """What a file would hold after the steps alone were trained, each rounded to the eight bits of a bfloat16."""

        def made() -> Weights:
            student = self._fixed(state)
            moving = {id(levels.log_step) for levels, _ in levels_of(student).values()}
            for p in student.parameters():
                p.requires_grad_(id(p) in moving)
            if self.settings.tune_epochs:
                self._train(self.settings.tune_epochs, self.settings.rate / 3, None, self.seed + 1000,
                            self.journal.under_way("tuned"), student)  # fmt: skip
            return _held(student)

        return self.journal.weights("tuned", made)

    def stage(self, name: str, state: Weights, note: str = "") -> Stage:
        """What a file would hold of a state, measured."""
        return self.measured(name, self.journal.weights(f"{name}, held", lambda: _held(self._fixed(state))), note)

    def measured(self, name: str, held: Weights, note: str) -> Stage:
        """The stage with these weights."""

        after = self._outcomes(name, self.plain, held)
        worse = float(lost(self.task, self.before, after).mean())
        count = sum(int((weight.array() != 0).sum()) for weight in held.values())
        note = f"{note}{worse:.4f} of {self.task.headline} lost; {count:,} weights are not zero"
        return Stage(name, held, note, float(after.mean()), after)

    def _outcomes(self, name: str, model: nn.Module, held: Weights | None = None) -> np.ndarray:
        """The headline metric of each validation example, of the model with these weights."""

        def found() -> list[float]:
            if held is not None:
                into_module(held, model)
            values: list[float] = outcomes(model, self.task, "valid")[self.task.headline].tolist()
            return values

        return np.array(self.journal.of(f"{name}, validation", found))

    def lost(self, stage: Stage) -> np.ndarray:
        """How much worse each validation example came out."""
        assert stage.examples is not None
        return lost(self.task, self.before, stage.examples)

    def apart(self, a: Weights, b: Weights) -> int:
        """In how many whole numbers two states differ."""
        found = []
        for state in (a, b):
            into_module(state, self.student)
            found.append([levels.numbers(latent).clone() for levels, latent in levels_of(self.student).values()])
        return sum(int((x != y).sum()) for x, y in zip(*found, strict=True))

    def _fixed(self, state: Weights) -> nn.Module:
        """A student of a state, whose numbers no longer change."""
        into_module(state, self.student)
        student = copy.deepcopy(self.student)
        for levels, latent in levels_of(student).values():
            levels.fix(latent)
        return student

    def _train(
        self,
        epochs: int,
        rate: float,
        penalty: EntropyRate | None,
        seed: int,
        place: Path | None,
        student: nn.Module | None = None,
    ) -> None:
        penalties = [] if penalty is None else [penalty]
        train(self.unasked, student or self.student, epochs=epochs, rate=rate, weight_decay=0.0, keep="last",
              penalties=penalties, seed=seed, progress=self.progress, checkpoint=place,
              resume=place is not None)  # fmt: skip


def _without_validation(task: Task) -> Task:
    """The task whose validation split is empty: an epoch is trained, and nothing is measured after it."""

    def batches(split: Split, epoch: int) -> Iterable[Batch]:
        return () if split == "valid" else task.batches(split, epoch)

    return replace(task, batches=batches)


def weigh(student: nn.Module, lesson: Task, price: float, passes: int = PASSES) -> int:
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


def _held(student: nn.Module) -> Weights:
    """What a file would hold of a student whose numbers are fixed; the student is used up."""
    names = list(levels_of(student))
    release(student)
    return _coded(from_module(student).settle(), names)


def _coded(weights: Weights, names: Collection[str]) -> Weights:
    """The rounded tensors as multiples, the others in half precision where that changes next to nothing."""
    rounded = Pack(Multiples())(weights.select(lambda weight: weight.name in names))
    found = [rounded[w.name] if w.name in names else w for w in weights.values()]
    return weights.with_items(w if w.name in names or w.spec.dtype.name != "float32" else halved(w) for w in found)

"""Starts compared: by one batch before anything is trained, and, on request, by short training.

Decides which start is first and says why. A start is judged by what its tangent kernel (``tangent``) lets samples teach
each other, and explained by the scales of its signal (``signal``). Every start gets a copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, RecipeError, UnknownNameError, WeightsError
from steelyard.explain.candidates import (
    DEFAULT,
    FEWEST,
    GIVEN,
    Loss,
    Material,
    Scheme,
    begin,
    builder,
    checked_depths,
    first,
    material,
    moved,
    named,
)
from steelyard.explain.signal import signal
from steelyard.explain.tangent import Tangent, tangent
from steelyard.learn.datadriven import DROPPING
from steelyard.learn.evaluate import mean_outcomes
from steelyard.learn.intervals import student
from steelyard.learn.progress import progress_bar
from steelyard.learn.run import Run
from steelyard.learn.schedules import SCHEDULES, Schedule
from steelyard.learn.start import unharmed
from steelyard.learn.task import Task, device_of

LITTLE = 0.1  # a score, or a cosine, that is as good as 0
SOFTLY, FURTHEST = 10.0, 15.0  # powers of e: that lower the score by e; that count at most
RECIPE = {"optimizer", "rate", "schedule", "weight_decay"}
SCHEMES = (GIVEN, DEFAULT, "xavier", "he", "lecun", "orthogonal", "data")
SCORE = "taught x steady: what the loss asks is learned from sample to sample, through layers of one scale"
SOURCE = (
    "Jacot et al. 2018 (tangent kernel), Mohamadi et al. 2023 (one output for all), Allen 1974 (leave one out), "
    "Xiao et al. 2020 (trainability from the kernel), Glorot and Bengio 2010 (scales)"
)

SAID = ("score", "taught", "steady", "loss", "alike", "forwards", "backwards", "dead", "saturated", "verdict", "why")
COLUMNS = {
    column.name: column
    for column in (
        Column("depth"),
        Column("rank", "", "equal where nothing tells two starts apart"),
        Column("start"),
        Column("result", "", "mean over the seeds, on the validation split"),
        Column("low", "", "of the 95 % interval of that mean"),
        Column("high", "", "of the 95 % interval of that mean"),
        Column("score", "", SCORE),
        Column(
            "taught", "", "correlation of what the loss asks of a sample with what the others teach (leave-one-out)"
        ),
        Column("steady", "", "1 where the signal and its gradient keep their scales through all layers"),
        Column("loss", "", "before training"),
        Column("alike", "", "mean cosine between the gradients of two samples: at 1 nothing tells them apart"),
        Column("forwards", "x", "spread between samples at the last layer, relative to the first"),
        Column("backwards", "x", "gradient at the first layer, relative to the last"),
        Column("dead", "%", "units that are zero for every sample, in the layer that has most"),
        Column("saturated", "%", "activations at their limits, in the layer that has most"),
        Column("verdict", "", "of the signal"),
        Column("why"),
    )
}


def compare_starts(
    subject: Task | nn.Module | Callable[..., nn.Module],
    schemes: Sequence[Scheme] | Mapping[str, Scheme] = SCHEMES,
    depths: Sequence[int] | None = None,
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    batch: Any = None,
    loss: Loss | None = None,
    examples: int = 64,
    seeds: int = 3,
    seed: int = 0,
    train: int = 0,
    progress: bool = True,
    **recipe: Any,
) -> Table:
    """Which start will train best: ranked by one batch, and, with `train` steps, by training.

    The score of a start is t s, between 0 and 1. t, 'taught', says how much the samples of the batch would teach each
    other: kernel regression with the tangent kernel, which is what gradient descent does at first, predicts the outputs
    for each sample from the other samples, and t is the correlation of these outputs with those that the loss asks for.
    Where the signal vanishes, all samples look the same to the kernel; where it is chaotic, each sample is alone; where
    the outputs are too large to begin with, they have to be unlearned. s = exp(-(|ln a| + |ln b|) / 10), 'steady',
    lowers the score where the signal from the first to the last layer, and the gradient on its way back, change by
    factors a and b; each logarithm counts up to 15. The tenth is found by experiment, on digits: anything from a
    fifth to a fourteenth ranks about as well.

    With `train`, each start is also trained for so many steps with each seed, and the rank is that of the headline
    metric on the validation split; `meta` then holds Kendall's tau-b between score and result.

    Args:
        subject: a task; or a module, or a function that builds one, together with `batch` and `loss`.
        schemes: of each start: 'as given' (the weights the model comes with), 'default' (torch's own), a scheme of
            `init_` such as 'he' or 'data', an initialiser, or a function that starts a module; or a mapping from
            names of your choice to these.
        depths: builds the model anew for each depth: `model` (or `subject`) is then a function of the depth.
        model: for a task, another model than its own: a module, or a function that builds one.
        batch: (inputs, targets), or a Batch; inputs are a tensor, a tuple of several, or a dict of keywords; None: the
            first training batch of the task.
        loss: of outputs and targets: a scalar or a value for each sample; None: that of the task.
        examples: how many samples of the batch the score is made from, at least 8; each costs a backward pass, and
            4 bytes for each weight.
        seeds: how often each start is drawn, with the seeds `seed`, `seed` + 1, ...; what is shown are means.
        train: steps of training; needs a task. Further keywords (optimizer, rate, schedule, weight_decay) are those
            of `steelyard.train`.
        progress: True shows a bar for each training, on a terminal only.

    Returns a table, for each depth the best start first. ``meta['best']`` is the name of the best one, with depths a
    mapping from each depth to it. The model, and torch's random numbers, are as they were before.

    Raises RecipeError for arguments that do not fit together, UnknownNameError for a scheme that is not there, and
    ModelError for a model or a loss that fails on the batch. A start that cannot be made, or whose training fails, is
    last, and its row says why.

    >>> from steelyard.learn.tasks import task
    >>> def net(depth):
    ...     layers = [part for _ in range(depth) for part in (nn.Linear(30, 30), nn.Tanh())]
    ...     return nn.Sequential(*layers, nn.Linear(30, 2))
    >>> starts = {"small": "normal(std=0.01)", "xavier": "xavier"}
    >>> table = compare_starts(task("breast-cancer"), starts, [2, 20], model=net, seeds=1)
    >>> table.meta["best"]
    {2: 'xavier', 20: 'xavier'}

    Source: Jacot et al., "Neural tangent kernel", NeurIPS 2018; Mohamadi et al., ICML 2023; Allen, "The relationship
    between variable selection and data augmentation and a method for prediction", Technometrics 1974; Xiao et al.,
    "Disentangling trainability and generalization in deep neural networks", ICML 2020.
    """
    plan = _Plan(examples, range(seed, seed + seeds), train, recipe, progress)
    starts = named(schemes)
    given, used = material(subject, model, batch, loss, train)
    rows = []
    for depth in [None] if depths is None else checked_depths(depths):
        built = builder(given, depth)
        _judged(built(seed), used, examples, seed)  # what fails here fails for every start
        rows += [{"depth": depth, "start": n, **_compared(scheme, built, used, plan)} for n, scheme in starts.items()]
    return _table(rows, used, plan, depths is not None)


@dataclass(frozen=True)
class _Plan:
    """How closely to look."""

    examples: int
    seeds: range
    train: int
    recipe: Mapping[str, Any]
    progress: bool

    def __post_init__(self) -> None:
        if self.examples < FEWEST or not self.seeds or self.train < 0:
            raise RecipeError(
                f"examples={self.examples}, seeds={len(self.seeds)}, train={self.train}: expected at least {FEWEST} "
                "examples, 1 seed and 0 steps"
            )
        if unknown := sorted(set(self.recipe) - RECIPE):
            raise UnknownNameError("keyword of compare_starts", unknown[0], sorted(RECIPE))
        if self.recipe and not self.train:
            raise RecipeError(f"{next(iter(self.recipe))} is a setting of training; say for how many steps: train=200")


def _compared(scheme: Scheme, built: Callable[[int], nn.Module], used: Material, plan: _Plan) -> dict[str, Any]:
    """The row of one start: means over the seeds, and the verdict of the first."""
    found, results = [], []
    for seed in plan.seeds:
        net = built(seed)
        try:
            begin(net, scheme, used, seed)
        except (ModelError, WeightsError) as error:
            return {"why": f"cannot be made: {error}"}
        found.append(_judged(net, used, plan.examples, seed))
        if plan.train and used.task is not None:
            failure = _train(net, used.task, seed, plan)
            if failure:
                return _mean(found) | {"why": f"cannot be trained: {failure}"}
            results.append(mean_outcomes(net, used.task, "valid")[used.task.headline])
    row = _mean(found)
    if results:
        low, high = student(np.array(results)) if len(results) > 1 else (None, None)
        row |= {"result": float(np.mean(results)), "low": low, "high": high}
    return row


def _judged(net: nn.Module, used: Material, examples: int, seed: int) -> dict[str, Any]:
    """What one batch says of a model in training mode, but for dropout; the model is as it was afterwards."""
    batch = first(moved(used.batch, device_of(net)), examples)
    with unharmed(net):
        for layer in net.modules():
            layer.training = not isinstance(layer, (*DROPPING, nn.RNNBase))
        seen = tangent(net, batch.inputs, batch.targets, used.loss, seed)
        scales = signal(net, (batch.inputs, batch.targets), used.loss)
    spreads, gradients = scales.column("spread"), scales.column("gradient")
    forwards, backwards = _ratio(spreads[-1], spreads[0]), _ratio(gradients[0], gradients[-1])
    taught, steady = seen.taught(), math.exp(-(_powers(forwards) + _powers(backwards)) / SOFTLY)
    row = {
        "score": taught * steady,
        "taught": taught,
        "steady": steady,
        "loss": seen.loss,
        "alike": seen.alike,
        "forwards": forwards,
        "backwards": backwards,
        "dead": max((share for share in scales.column("dead") if share is not None), default=None),
        "saturated": max((share for share in scales.column("saturated") if share is not None), default=None),
        "verdict": scales.meta["verdict"],
    }
    blamed = next((r for r in scales.rows if r["layer"] == scales.meta["first"]), None)
    return row | {"why": _why(row, seen, blamed)}


def _why(row: Mapping[str, Any], seen: Tangent, blamed: Mapping[str, Any] | None) -> str:
    """The score and its cause in one line; `blamed` is the row of the layer to blame."""
    said, alike = f"what samples teach each other: {row['taught']:.2f} of 1", seen.alike
    if row["taught"] < LITTLE and alike is not None and alike > 1 - LITTLE:
        said += f", because to this model all are the same (cosine of their gradients {alike:.3g})"
    elif row["taught"] < LITTLE and seen.loud > 1:
        said += f", because the outputs are {seen.loud:.2g} times what the loss asks for and have to be unlearned"
    elif row["taught"] < LITTLE and alike is not None and abs(alike) < LITTLE:
        said += f", because each is learned by itself (cosine of their gradients {alike:.2g})"
    if blamed is not None:
        return f"{said}; {row['verdict']} at {blamed['layer']!r}: {blamed['cause and cure']}"
    if row["forwards"] is not None and row["backwards"] is not None:
        said += f"; the signal changes by {row['forwards']:.2g} forwards and {row['backwards']:.2g} backwards"
    return said


def _mean(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the words are those of the first seed."""
    row = dict(found[0])
    for name, value in found[0].items():
        numbers = [one[name] for one in found]
        if not isinstance(value, str):
            row[name] = None if any(n is None for n in numbers) else float(np.mean(numbers))
    return row


def _train(net: nn.Module, task: Task, seed: int, plan: _Plan) -> str:
    """Train for so many steps; why it came to an end before, or ''."""
    per_epoch = sum(1 for _ in task.batches("train", 0))
    epochs = max(1, math.ceil(plan.train / max(per_epoch, 1)))
    wanted = plan.recipe.get("schedule", "one-cycle")
    schedule = SCHEDULES.get(wanted, wanted) if isinstance(wanted, str) else wanted
    if callable(schedule):  # over the steps that are taken, not over whole epochs
        schedule = partial(_stretched, schedule, epochs * per_epoch / plan.train)
    recipe = {**plan.recipe, "schedule": schedule}
    with (
        progress_bar(f"training on {task.name}", plan.progress) as shown,
        Run(task, net, epochs=epochs, seed=seed, keep="last", progress=shown, **recipe) as run,
    ):
        try:
            for _ in islice(run, plan.train):
                pass
        except ModelError as error:  # what is wrong with the model or the task has shown itself before: it diverged
            return str(error)
    return ""


def _stretched(schedule: Schedule, factor: float, done: float) -> float:
    return schedule(min(done * factor, 1.0))


def _table(rows: list[dict[str, Any]], used: Material, plan: _Plan, by_depth: bool) -> Table:
    """For each depth the best first; starts that are equally good share a rank."""
    trained = plan.train > 0 and used.task is not None
    task = used.task
    key = "result" if trained else "score"
    headline = task.headline if trained and task is not None else ""
    sign = 1 if trained and task is not None and headline in task.lower_is_better else -1
    ordered = []
    for depth in dict.fromkeys(row["depth"] for row in rows):
        group = [row for row in rows if row["depth"] == depth]
        goods = [sign * round(row[key], 3) if row.get(key) is not None else math.inf for row in group]
        for good, row in sorted(zip(goods, group, strict=True), key=lambda pair: (pair[0], -pair[1].get("score", -1))):
            ordered.append({**row, "rank": 1 + sum(other < good for other in goods)})
    best = {row["depth"]: row["start"] for row in reversed(ordered) if row["rank"] == 1}
    meta: dict[str, Any] = {
        "best": dict(reversed(best.items())) if by_depth else best[None],
        "seeds": len(plan.seeds),
        "examples": min(plan.examples, len(used.batch)),
        "score is the": SCORE,
        "source": SOURCE,
    }
    if trained:
        both = [(row["score"], -sign * row["result"]) for row in ordered if row.get("result") is not None]
        meta |= {"steps": plan.train, "tau-b of score and result": _tau(both)}
    names = [*(["depth"] if by_depth else []), "rank", "start", *(["result", "low", "high"] if trained else [])]
    columns = [replace(COLUMNS[name], name=headline) if name == "result" else COLUMNS[name] for name in (*names, *SAID)]
    clean = [{headline if n == "result" else n: row.get(n) for n in (*names, *SAID)} for row in ordered]
    return Table.of("starts compared", columns, clean, meta)


def _tau(pairs: list[tuple[float, float]]) -> float | None:
    """Kendall's tau-b, which leaves ties in either ranking out of its denominator; None where one is all ties."""
    from scipy.stats import kendalltau

    if len(pairs) < 2:
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return tau if math.isfinite(tau) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _powers(ratio: float | None) -> float:
    """By how many powers of e a scale changes, up to FURTHEST."""
    return min(abs(math.log(ratio)), FURTHEST) if ratio is not None and 0 < ratio < math.inf else FURTHEST

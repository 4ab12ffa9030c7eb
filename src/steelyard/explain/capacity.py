"""What the weights say about the gap between seen and unseen: norms, margins and sharpness, beside the gap itself.

Decides which measures there are, and on which examples they are taken (of the training split alone). Knows nothing of
how a model was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.errors import ModelError
from steelyard.explain.layers import differentiable
from steelyard.explain.ranking import kendall
from steelyard.explain.sharpness import Landscape, along_filters, ascent, hessian_trace, random_weights
from steelyard.learn.generalization import generalization
from steelyard.learn.matrices import layers, matrices
from steelyard.learn.measures import IGNORED
from steelyard.learn.options import check_whole
from steelyard.learn.task import Batch, Task, apply, device_of, first_examples

SMALL = 0.1  # the quantile of the margins that stands for the small ones


@dataclass(frozen=True)
class Measure:
    """One measure: its family, where it comes from, and whether more of it speaks for a larger gap."""

    family: str
    about: str
    source: str
    more: bool = True


MEASURES: Mapping[str, Measure] = {
    "weights": Measure("norm", "how many there are in matrices", ""),
    "squares": Measure("norm", "sum of squares of all matrices", "Neyshabur et al. 2015"),
    "distance": Measure("norm", "sum of squares of matrices - start", "Nagarajan and Kolter 2019"),
    "Frobenius product": Measure("norm", "sum of ln |W|², Frobenius", "Neyshabur et al. 2015"),
    "spectral product": Measure("norm", "sum of ln |W|², spectral: a Lipschitz constant", "Bartlett et al. 2017"),
    "path norm": Measure("norm", "ln of the sum over all paths of the product of w²", "Neyshabur et al. 2015"),
    "small margin": Measure("margin", "output of the class - next; 10 % have less", "Jiang et al. 2019", False),
    "normalised margin": Measure("margin", "median margin / product of spectral norms", "Bartlett et al. 2017", False),
    "spectral complexity": Measure("margin", "ln(prod |W|² sum |W|F² / |W|² / small margin²)", "Neyshabur et al. 2018"),
    "steepest ascent": Measure("sharpness", "rise of the loss 0.05 uphill", "Foret et al. 2021"),
    "steepest ascent, adaptive": Measure("sharpness", "the same, 0.5 in units of |w|", "Kwon et al. 2021"),
    "random weights": Measure("sharpness", "1 / sigma² of noise that costs 0.1 errors", "Neyshabur et al. 2017"),
    "random weights, by magnitude": Measure("sharpness", "the same with noise in units of |w|", "Jiang et al. 2020"),
    "filter-normalised": Measure("sharpness", "rise of the loss half a filter away", "Li et al. 2018"),
    "Hessian trace": Measure("sharpness", "sum of the curvatures of the loss", "Hutchinson 1990"),
}
GAP = "gap"


def capacity(
    model: nn.Module,
    task: Task,
    *,
    start: Weights | None = None,
    examples: int = 1000,
    draws: int = 5,
) -> Table:
    """Norms, margins and sharpness of a trained model, beside its gap: a row for each of `MEASURES`, and for the gaps.

    Norms are of the matrices of the layers as `learn.matrices` has them (a kernel as outputs x the rest; each gate of a
    recurrent layer); margins are those of training examples; sharpness is that of the mean training loss, in evaluation
    mode. What normalises its inputs makes norms before it meaningless: weights there can be rescaled without a change
    of the function, which leaves the margins, the adaptive ascent, the noise by magnitude and the filter-normalised
    directions as they are. A value is None where it does not apply: margins without classes, a path norm of what is not
    positively homogeneous, a distance without a start, a spectral complexity where the small margin is negative.

    The gap is that of `generalization`: by how much the test split is worse than the training split.

    Args:
        model: left as it is.
        task: its training and test splits.
        start: the weights before training, `sy.from_module(model)` of then; None: no distance.
        examples: of the training split at most, for margins and sharpness.
        draws: random directions for each kind of sharpness.

    Which of them rank the gaps of several models, and how well, is `rank_gaps`. Raises ModelError for an empty split
    or a start that does not fit.

    Source: Jiang et al., Fantastic generalization measures and where to find them, ICLR 2020, and those in the table.

    >>> from steelyard.learn.task import build_seeded
    >>> from steelyard.learn.tasks import task
    >>> cancer = task("breast-cancer", model="mlp")
    >>> table = capacity(build_seeded(cancer), cancer, draws=1)
    >>> table.rows[0]["measure"], table.rows[0]["value"]
    ('weights', 12160)
    """
    check_whole(examples=examples, draws=draws)
    batches = [batch.to(device_of(model)) for batch in first_examples(task, "train", examples)]
    values: dict[str, float | None] = {}
    with differentiable(model):
        values |= _norms(model, start)
        values["path norm"] = path_norm(model, batches[0])
        land = Landscape(model, task, batches)
        loss, error = land.measured()
        values |= _margins(land, values["spectral product"] or 0.0, values.pop("ratios") or 0.0)
        values |= ascent(land, loss) | random_weights(land, error, draws)
        values |= {"filter-normalised": along_filters(land, loss, draws), "Hessian trace": hessian_trace(land, draws)}
    rows: list[dict[str, Any]] = []
    for name, measure in MEASURES.items():
        value = values[name]
        value = None if value is None or math.isnan(value) else value
        rows.append({"measure": name, "family": measure.family, "value": value, "gap grows with": _way(measure)})
        rows[-1] |= {"about": measure.about, "source": measure.source}
    for row in generalization(model, task).rows:
        if row["part"] == "gap, test":
            rows.append({"measure": f"gap in {row['metric']}", "family": GAP, "value": row["value"]})
            rows[-1] |= {"about": "test split, worse than train", "source": ""}
    columns = [
        Column("measure"),
        Column("family"),
        Column("value"),
        Column("gap grows with", "", "more of it, or less, as theory has it"),
        Column("about"),
        Column("source"),
    ]
    meta = {"task": task.name, "examples": land.count, "draws": draws, "train loss": loss}
    return Table.of(f"what the weights say about the gap on {task.name}", columns, rows, meta)


def rank_gaps(tables: Sequence[Table], gap: str | None = None, *, confidence: float = 0.95) -> Table:
    """How well each measure ranks the gaps of several models: Kendall's tau with its interval, a row for each measure.

    tau is 1 where the models stand in the same order by the measure, in the direction that theory has, and by the gap;
    0 is chance. The interval is that of Samara and Randles (1988), over the models: it speaks of other models that were
    chosen in the same way, not of those that were chosen otherwise.

    Args:
        tables: of `capacity`, of at least 3 models on one task.
        gap: "gap in accuracy", say; None: in the headline metric.

    A measure that some model lacks is ranked over the others. Raises ModelError for fewer than 3 models, or another
    name of a gap.
    """
    if len(tables) < 3:
        raise ModelError(f"{len(tables)} models: expected at least 3 to rank")
    columns = [dict(zip(t.column("measure"), t.column("value"), strict=True)) for t in tables]
    gaps = [row["measure"] for row in tables[0].rows if row["family"] == GAP]
    gap = str(gaps[0]) if gap is None else gap
    if any(gap not in column for column in columns):
        raise ModelError(f"there is no {gap!r} in every table: they have {', '.join(map(str, gaps))}")
    rows = []
    for name, measure in MEASURES.items():
        known = [(column[name], column[gap]) for column in columns if column.get(name) is not None]
        row: dict[str, Any] = {"measure": name, "family": measure.family, "models": len(known)}
        if len(known) >= 3 and len({value for value, _ in known}) > 1:
            x, y = np.array(known, float).T
            row |= dict(zip(("tau", "low", "high"), kendall(x if measure.more else -x, y, confidence), strict=True))
        rows.append(row)
    heads = [Column("measure"), Column("family"), Column("tau", "", f"Kendall's, with the {gap}")]
    heads += [Column(end, "", f"of the {confidence:.0%} interval") for end in ("low", "high")] + [Column("models")]
    meta = {"task": tables[0].meta.get("task"), "gap": gap, "confidence": confidence}
    return Table.of("how well each measure ranks the gap", heads, rows, meta)


def _way(measure: Measure) -> str:
    return "more" if measure.more else "less"


def _norms(model: nn.Module, start: Weights | None) -> dict[str, float | None]:
    """Those of the matrices; "ratios" is the sum of |W|F² / |W|²."""
    found = [m.values.reshape(len(m.values), -1).double() for one in layers(model).values() for m in matrices(one)]
    found = [w for w in found if w.numel()]
    if not found:
        raise ModelError(f"{type(model).__name__} has no layer with matrices: there is no norm to take")
    squares = [float(w.square().sum()) for w in found]
    spectral = [float(torch.linalg.matrix_norm(w, 2)) ** 2 for w in found]
    some = all(square > 0 for square in squares)
    return {
        "weights": sum(w.numel() for w in found),
        "squares": sum(squares),
        "distance": None if start is None else _distance(model, start),
        "Frobenius product": sum(map(math.log, squares)) if some else None,
        "spectral product": sum(map(math.log, spectral)) if some else None,
        "ratios": sum(a / b for a, b in zip(squares, spectral, strict=True)) if some else None,
    }


def _distance(model: nn.Module, start: Weights) -> float:
    """The squared distance of the parameters that hold matrices from the start."""
    total = 0.0
    for name, layer in layers(model).items():
        for parameter in dict.fromkeys(m.parameter for m in matrices(layer)):
            own, key = getattr(layer, parameter).detach().cpu(), f"{name}.{parameter}" if name else parameter
            if key not in start or start[key].spec.shape != tuple(own.shape):
                raise ModelError(f"the start has no {key!r} of shape {tuple(own.shape)}: give the weights of this "
                                 "model before it was trained")  # fmt: skip
            then = torch.from_numpy(np.array(start[key].array(), np.float64))
            total += float((own.double() - then).square().sum())
    return total


def path_norm(model: nn.Module, batch: Batch) -> float | None:
    """ln of the sum over all paths from an input to an output of the product of squared weights, biases included.

    The model with all weights squared is run on ones. None for what is not positively homogeneous, f(2 x) = 2 f(x)
    without biases: normalisation, attention, gates, other activations than rectifiers, tokens.
    """
    if any(not x.is_floating_point() for x in batch.arguments) or any(is_parametrized(m) for m in model.modules()):
        return None
    ones = tuple(torch.ones_like(x[:1], dtype=torch.float64) for x in batch.arguments)
    tensors: dict[str, Tensor] = {n: p.detach().double().square() for n, p in model.named_parameters()}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
    straight = {n: torch.zeros_like(t) if "bias" in n.rpartition(".")[2] else t for n, t in tensors.items()} | buffers
    with torch.no_grad():
        once, twice = (functional_call(model, straight, tuple(k * x for x in ones)) for k in (1.0, 2.0))
        if not isinstance(once, Tensor) or not torch.allclose(twice, 2 * once, rtol=1e-9, atol=0.0):
            return None
        total = float(functional_call(model, tensors | buffers, ones).sum())
    return math.log(total) if total > 0 else None


@torch.no_grad()
def _margins(land: Landscape, spectral: float, ratios: float) -> dict[str, float | None]:
    names = ("small margin", "normalised margin", "spectral complexity")
    parts = []
    for batch in land.batches:
        outputs = apply(land.model, batch)
        if batch.targets.is_floating_point() or outputs.ndim < 2 or outputs.shape[-1] < 2:
            return dict.fromkeys(names)
        counted = batch.targets.reshape(-1) != IGNORED
        rows, own = outputs.double().reshape(-1, outputs.shape[-1])[counted], batch.targets.reshape(-1, 1)[counted]
        others = rows.scatter(1, own, -math.inf).amax(1)
        parts.append(rows.gather(1, own)[:, 0] - others)
    margins = torch.cat(parts)
    small = float(margins.quantile(SMALL))
    complexity = spectral + math.log(ratios) - 2 * math.log(small) if small > 0 and ratios else None
    return {
        "small margin": small,
        "normalised margin": float(margins.median()) * math.exp(-spectral / 2),
        "spectral complexity": complexity,
    }

"""The coordinate check: whether what a few steps change in each layer depends on the width of the model.

Decides what is measured, and when a slope counts as none. Trains by the optimizer that it is given; knows no rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, linear_regression, stdev
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.init import Init
from steelyard.learn.calling import calling
from steelyard.learn.mup import mup
from steelyard.learn.options import check_counts
from steelyard.learn.seeding import derive, seeded
from steelyard.learn.start import NORMS
from steelyard.learn.task import batch_arguments, called
from steelyard.learn.widths import Factory, tensors

Parametrisation = Literal["mup", "standard"]
FLAT = 0.15  # a slope of less than this, or less than twice its standard error, counts as none


def coordinate_check(
    factory: Factory,
    widths: Sequence[int],
    batch: tuple[Any, Tensor],
    loss: Callable[[Any, Tensor], Tensor],
    *,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    rate: float = 1e-2,
    steps: int = 5,
    seeds: int = 3,
    parametrisation: Parametrisation = "mup",
    base: int = 64,
    init: str | Init = "he",
) -> Table:
    """How the change that training makes in each layer grows with width: the exponent, layer by layer.

    Models of all widths take the same few steps on the same batch. The change of a layer is the root mean square, over
    the batch and all coordinates, of its output after the steps less its output before; a factor in front of hidden
    weights, that of queries, is taken out. In the maximal update parametrisation it is the same at all large widths in
    every layer, and a rate that is good at one width is good at all; under the standard one it grows in some layers and
    vanishes in others. Small widths differ by terms that fall like 1 / sqrt(width), so the slope is that over the wider
    half of the widths, and output layers start at zero here. The scores of attention start near zero in wide models,
    too: under SGD it takes more steps before queries and keys are flat.

    Args:
        factory: a function from a width to a model.
        widths: at least two, best a factor 8 or more apart.
        batch: inputs (a tensor, a tuple of several or a dict of keywords) and targets.
        loss: of outputs and targets: a scalar, or a value for each example.
        optimizer, rate: as in `Mup.optimizer`; the rate is that at the base width. It should be one that trains well:
            steps that are too small measure rounding, and steps that are too large measure chaos.
        steps: how many.
        seeds: how many starts; the slopes are their means.
        parametrisation: 'mup', or 'standard': the start of `init_` and one rate for all parameters.
        base, init: as in `mup`.

    Returns a row for each layer with an output, in order of execution: its slope d log(change) / d log(width), the
    standard error over seeds, and the verdict: flat, grows or vanishes. ``meta["verdict"]`` is 'flat' if all are, else
    the verdict of the steepest; ``meta["sizes"]`` is a table of the changes themselves, drawn by
    ``report.plots.Line(table.meta["sizes"], "width", ("change",), by="layer", log_x=True, log_y=True)``.

    Raises RecipeError for fewer than two widths, ModelError if the model or the loss fails or a change is not finite.

    >>> from torch.nn import functional
    >>> def net(width):
    ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))
    >>> x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    >>> batch = x, (x[:, 0] > 0).long()
    >>> for which in ("mup", "standard"):
    ...     table = coordinate_check(net, [256, 1024], batch, functional.cross_entropy, parametrisation=which)
    ...     print(table.meta["verdict"])
    flat
    grows

    Source: Yang et al. 2022, appendix D.1.
    """
    check_counts(steps=steps, seeds=seeds, base=base)
    if len(set(widths)) < 2:
        raise RecipeError(f"a slope needs at least two widths, given are {list(widths)}")
    if parametrisation not in get_args(Parametrisation):
        raise UnknownNameError("parametrisation", parametrisation, get_args(Parametrisation))
    changes: dict[tuple[int, int], dict[str, float]] = {}
    for seed in range(seeds):
        for width in sorted(set(widths)):
            inputs = batch_arguments(batch[0])
            at = base if parametrisation == "mup" else width
            made = mup(factory, width, base=at, init=init, seed=seed, batch=inputs, zero_output=True)
            optimize = made.optimizer(optimizer)
            queries = {n.rpartition(".")[0]: s.multiplier for n, s in made.scalings.items() if s.kind == "hidden"}
            with seeded(derive(seed, "coordinates")):
                found = _changes(made.model, optimize, inputs, batch[1], loss, rate, steps)
            changes[seed, width] = {name: change / queries.get(name, 1.0) for name, change in found.items()}
    return _table(changes, {"parametrisation": parametrisation, "base": base, "rate": rate, "steps": steps})


def _changes(
    model: nn.Module,
    optimize: Callable[..., torch.optim.Optimizer],
    inputs: tuple[Any, ...],
    targets: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    rate: float,
    steps: int,
) -> dict[str, float]:
    """The change of the output of each layer after some steps on one batch, by name, in order of execution."""
    optimizer = optimize([p for p in model.parameters() if p.requires_grad], lr=rate)
    for layer in model.modules():
        layer.training = isinstance(layer, NORMS)  # statistics of the batch, and no dropout
    before = _outputs(model, inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad(), calling("the model or the loss"):
            loss(called(model, inputs), targets).mean().backward()
        optimizer.step()
    after = _outputs(model, inputs)
    return {name: _rms(after[name] - before[name]) for name in before if name in after}


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What each module gives in one pass, the last of several calls; of several tensors the first."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = next((x for x in tensors(output) if x.is_floating_point()), None)
            if first is not None:
                seen[name] = first.detach().clone()

        return hook

    handles = [m.register_forward_hook(watch(name or "(output)")) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), calling(f"{type(model).__name__}, called with the batch,"):
            called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _table(changes: dict[tuple[int, int], dict[str, float]], meta: dict[str, Any]) -> Table:
    seeds, widths = sorted({s for s, _ in changes}), sorted({w for _, w in changes})
    rows, sizes = [], []
    for layer in next(iter(changes.values())):
        found = [[changes[seed, width].get(layer, math.nan) for width in widths] for seed in seeds]
        means = [math.fsum(of_width) / len(seeds) for of_width in zip(*found, strict=True)]
        if not all(map(math.isfinite, means)):
            width = next(w for w, mean in zip(widths, means, strict=True) if not math.isfinite(mean))
            raise ModelError(f"what changes in {layer!r} at width {width} is not finite: lower the rate")
        sizes += [{"layer": layer, "width": w, "change": mean} for w, mean in zip(widths, means, strict=True)]
        rows.append({"layer": layer} | _slope(widths, found))
    steep = [row for row in rows if row["verdict"] in ("grows", "vanishes")]
    steepest = max(steep, key=lambda row: abs(row["slope"]), default=None)
    about = {**meta, "widths": widths, "verdict": steepest["verdict"] if steepest else "flat"}
    about["steepest"] = steepest["layer"] if steepest else None
    about["sizes"] = Table.of("changes by width", [Column("layer"), Column("width"), Column("change")], sizes, meta)
    return Table.of("coordinate check", _COLUMNS, rows, about)


def _slope(widths: list[int], found: list[list[float]]) -> dict[str, Any]:
    """The slope of log(change) against log(width): mean and standard error over seeds, and the verdict."""
    if any(change == 0 for row in found for change in row):
        return {"verdict": "no change"}
    wide = slice(min(len(widths) // 2, len(widths) - 2), None)
    x = [math.log(w) for w in widths[wide]]
    slopes = [linear_regression(x, [math.log(change) for change in row[wide]]).slope for row in found]
    slope = fmean(slopes)
    error = stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
    steep = abs(slope) > max(FLAT, 2 * error)
    return {
        "slope": slope,
        "standard error": error if len(slopes) > 1 else None,
        "verdict": "flat" if not steep else "grows" if slope > 0 else "vanishes",
    }


_COLUMNS = [
    Column("layer"),
    Column("slope", about="d log(change of the output) / d log(width), over the wider half of the widths"),
    Column("standard error", about="of the slope, over seeds"),
    Column("verdict"),
]

"""The tables of a log: their columns, with units. Decides nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steelyard.core.table import Column
from steelyard.errors import UnknownNameError

VERSION = 1
ENDED = "steelyard.ended"  # in the metadata of a log that was closed
TEXT = ("tensor", "shape", "dtype", "what", "layer", "kind", "verdict")  # columns of words
TEXT = (*TEXT, "fault", "where", "severity", "evidence", "remedy")
INTEGER = ("step", "examples", "trainable")  # of whole numbers; all others hold fractions
TABLES: Mapping[str, tuple[Column, ...]] = {
    "tensors": (
        Column("tensor"),
        Column("shape"),
        Column("dtype"),
        Column("trainable", about="1 if it had requires_grad when the watch began"),
    ),
    "steps": (
        Column("step", about="counts the optimizer's steps from 0"),
        Column("seconds", "s", "since the watch began, at the end of the step"),
        Column("rate", about="the learning rate of the first parameter group"),
        Column("gradient norm", about="Euclidean, over all tensors, as the optimizer got it"),
        Column("update ratio", "x", "||W_after - W|| / ||W|| over all tensors"),
    ),
    "norms": (
        Column("step"),
        Column("tensor"),
        Column("weight norm", about="||W||, Euclidean, before the step"),
        Column("gradient norm", about="||g||, as the optimizer got it"),
        Column("update norm", about="||W_after - W||"),
        Column("update ratio", "x", "||W_after - W|| / ||W||"),
    ),
    "values": (
        Column("step"),
        Column("tensor"),
        Column("what", about="weight (before the step) or gradient"),
        Column("min"),
        Column("1 %", about="quantiles, and zeros, of 16,384 values at most, evenly spaced"),
        Column("25 %"),
        Column("median"),
        Column("75 %"),
        Column("99 %"),
        Column("max"),
        Column("zeros", "%"),
        Column("not finite", "%"),
    ),
    "layers": (
        Column("step"),
        Column("layer"),
        Column("kind"),
        Column(
            "verdict",
            about="of signal and gradient, against what came in and the model's end; or of the limits",
        ),
        Column("rms", about="root mean square of the activation"),
        Column("spread", about="rms of the activation after the mean over the examples is taken away"),
        Column("gradient", about="rms of dL/d(activation)"),
        Column("dead", "%", "units that are zero for the whole batch, after a rectifier"),
        Column("saturated", "%", "activations at their limits"),
        Column("peaked", "%", "queries of attention with 97 % on a single key"),
        Column("drift", about="nats from the running statistics of a batch normalisation to the batch, median"),
    ),
    "noise": (
        Column("step", about="the second of the two"),
        Column("examples", about="in the batch of the step"),
        Column("gradient square", about="|G|², estimated from the gradients of two steps in a row"),
        Column("variance", about="tr(Σ), the variance of the gradient of one example"),
        Column("noise scale", about="tr(Σ) / |G|² in examples, averaged over looks"),
    ),
    "faults": (
        Column("step"),
        Column("fault"),
        Column("where"),
        Column("severity"),
        Column("evidence"),
        Column("remedy"),
    ),
    "notes": (Column("step"), Column("what"), Column("value", about="as it was noted: a loss, an accuracy")),
}


def columns_of(name: str) -> tuple[Column, ...]:
    """The columns of a table; raises UnknownNameError for one that no log has."""
    if name not in TABLES:
        raise UnknownNameError("table of a log", name, TABLES)
    return TABLES[name]


def to_cell(value: Any) -> Any:
    """SQLite has no NaN and makes it NULL, which stands for a number that there is not: written as text."""
    return "NaN" if value != value else value


def from_cell(name: str, value: Any) -> Any:
    """What `to_cell` made of a value of the column of that name."""
    return math.nan if value == "NaN" and name not in TEXT else value

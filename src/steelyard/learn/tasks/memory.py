"""Tasks that only a long memory solves: adding two marked numbers, and copying a sequence after a wait.

Decides what an example is, and what a model without memory gets. Examples are drawn anew for each epoch, by seed, split
and epoch. Knows nothing of models but their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steelyard.errors import ModelError
from steelyard.learn.data import Batches
from steelyard.learn.measures import cross_entropy, squared_error
from steelyard.learn.models import model as build
from steelyard.learn.options import check_counts
from steelyard.learn.seeding import generator
from steelyard.learn.task import Checked, Interface, Split, Task

SYMBOLS, REMEMBERED = 8, 10  # of the copying task
HELD_OUT = 1000  # examples to search and stop, and as many to prove
NEAR = 0.04  # an error below which a sum is right

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # (examples, generator) -> inputs, targets


def adding(
    *, length: int = 100, seed: int = 0, batch_size: int = 50, examples: int = 10_000, model: str = "rnn"
) -> Task:
    """The sum of two marked numbers in a sequence (Hochreiter & Schmidhuber 1997, in the form of Arjovsky et al. 2016).

    An example is ``length`` steps of a number, uniform in [0, 1], and a mark that is 1 at one step of the first half,
    at one of the second half, and 0 elsewhere. The target is the sum of the two marked numbers. Always saying 1 has a
    squared error of 1/6 = 0.167, the variance; "right" is the share of errors below 0.04. ``examples`` is
    their number in an epoch.

    Raises ModelError for a length below 2.

    >>> adding(length=50).baselines["squared error"]
    0.16666666666666666
    """
    check_counts(length=length, examples=examples)
    if length < 2:
        raise ModelError(f"length={length}: expected 2 steps or more, one number to add in each half")
    data = Drawn(partial(_adding, length), seed, batch_size, examples)
    interface = Interface((length, 2), 1)
    return Task(
        name=f"adding:{length}",
        build=partial(build, model, interface),
        batches=data,
        loss=squared_error,
        metrics={"squared error": squared_error, "right": _right},
        interface=interface,
        features=("number", "mark"),
        lower_is_better=("squared error",),
        about={"seed": seed, "length": length, "examples": data.sizes},
        baselines={"squared error": 1 / 6, "right": NEAR * (2 - NEAR), "loss": 1 / 6},
    )


def copying(
    *, length: int = 100, seed: int = 0, batch_size: int = 50, examples: int = 10_000, model: str = "rnn"
) -> Task:
    """A sequence to be repeated after a wait (Hochreiter & Schmidhuber 1997, in the form of Arjovsky et al. 2016).

    Ten symbols out of eight, ``length`` - 1 blanks, a sign, ten blanks; the outputs that are asked for are
    ``length`` + 10 blanks, then the ten symbols. Who remembers nothing says blanks, then guesses: a cross-entropy
    of 10 ln 8 / (length + 20) nats, and one eighth of the symbols "recalled". ``examples`` is their number in an epoch.

    >>> round(copying(length=100).baselines["loss"], 4)
    0.1733
    """
    check_counts(length=length, examples=examples)
    data = Drawn(partial(_copying, length), seed, batch_size, examples)
    interface = Interface((length + 2 * REMEMBERED,), SYMBOLS + 1, SYMBOLS + 2)
    nothing = REMEMBERED * math.log(SYMBOLS) / (length + 2 * REMEMBERED)
    return Task(
        name=f"copying:{length}",
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"recalled": _recalled},
        interface=interface,
        classes=(*"abcdefgh", "blank"),
        about={"seed": seed, "length": length, "examples": data.sizes},
        baselines={"recalled": 1 / SYMBOLS, "loss": nothing},
    )


@dataclass(frozen=True)
class Drawn(Checked):
    """Examples that are drawn when they are asked for: the training ones anew in each epoch."""

    draw: Draw
    seed: int
    batch_size: int
    examples: int

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size)

    def __call__(self, split: Split, epoch: int) -> Batches:
        training = split == "train"
        inputs, targets = self.draw(self.sizes[split], generator(self.seed, "draw", split, epoch if training else 0))
        return Batches(inputs, targets, torch.arange(len(targets)), self.batch_size if training else 250)

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each split has."""
        return {"train": self.examples, "valid": HELD_OUT, "test": HELD_OUT}


def _adding(length: int, examples: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    numbers = torch.rand(examples, length, generator=random)
    half, rows = length // 2, torch.arange(examples)
    first = torch.randint(half, (examples,), generator=random)
    second = torch.randint(half, length, (examples,), generator=random)
    marks = torch.zeros(examples, length)
    marks[rows, first] = marks[rows, second] = 1.0
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1)


def _copying(length: int, examples: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    blank, sign = SYMBOLS, SYMBOLS + 1
    symbols = torch.randint(SYMBOLS, (examples, REMEMBERED), generator=random)
    inputs = torch.full((examples, length + 2 * REMEMBERED), blank)
    inputs[:, :REMEMBERED] = symbols
    inputs[:, length + REMEMBERED - 1] = sign
    targets = torch.full_like(inputs, blank)
    targets[:, -REMEMBERED:] = symbols
    return inputs, targets


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the sum is right within 0.04, 0 elsewhere."""
    return (outputs[:, 0] - targets).abs().lt(NEAR).to(outputs.dtype)


def _recalled(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the symbols that are repeated right, at the end of each example."""
    hits = outputs[:, -REMEMBERED:].argmax(-1) == targets[:, -REMEMBERED:]
    return hits.to(outputs.dtype).mean(1)
